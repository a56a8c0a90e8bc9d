"""Pascal VOC's layout: an XML file an image (Everingham et al., IJCV 2010)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from dinoreg.config import ConfigError
from eval.boxes.boxed import Boxed, BoxedImages, as_boxes, images_by_stem


def read_voc(root: Path, split: str, hard: bool) -> BoxedImages:
    """The images of ImageSets/Main/SPLIT.txt, or all that have an annotation where there are no lists.

    Annotations and images may lie in Annotations and JPEGImages (or images), or all in one folder. hard: keep objects
    that are marked truncated or difficult; without them, images that have no others are left out. Raises ConfigError.
    """
    notes = root / "Annotations" if (root / "Annotations").is_dir() else root
    folder = next((root / name for name in ("JPEGImages", "images") if (root / name).is_dir()), root)
    files = images_by_stem(folder)
    found = []
    for name in _names(root, notes, split):
        entry = _read(notes / f"{name}.xml", files.get(name, folder / f"{name}.jpg"), hard)
        if hard or len(entry.boxes):
            found.append(entry)
    return BoxedImages(str(root), f"Pascal VOC, {split}", found)


def _names(root: Path, notes: Path, split: str) -> Sequence[str]:
    lists = root / "ImageSets" / "Main"
    if not lists.is_dir():
        return sorted(file.stem for file in notes.glob("*.xml"))
    file = lists / f"{split}.txt"
    if not file.is_file():
        there = ", ".join(sorted(each.stem for each in lists.glob("*.txt"))[:5])
        raise ConfigError(f"there is no {file}; the lists there: {there or 'none'}", "split")
    return [line.split()[0] for line in file.read_text(errors="replace").splitlines() if line.strip()]


def _read(note: Path, image: Path, hard: bool) -> Boxed:
    """Raises ConfigError where the annotation is missing or damaged: without it the score would be another one."""
    try:
        content = ElementTree.parse(note).getroot()
        rows = [_box(each) for each in content.iter("object") if hard or not _is_hard(each)]
        size = [round(float(content.findtext(f"size/{side}", "0"))) for side in ("height", "width")]
    except FileNotFoundError:
        raise ConfigError(f"{image.name} has no annotation: {note} is missing", "--data") from None
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise ConfigError(f"{note} is damaged: {error}", "--data") from error
    return Boxed(image, as_boxes(rows), (size[0], size[1]) if min(size) > 0 else None)


def _box(thing: ElementTree.Element) -> list[float]:
    """Annotations count pixels from 1, and both corners are in the box. Raises ValueError."""
    sides = {side: thing.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")}
    if None in sides.values():
        raise ValueError(f"an object has no {next(side for side, said in sides.items() if said is None)}")
    left, top, right, bottom = (float(said or "") for said in sides.values())
    return [left - 1, top - 1, right, bottom]


def _is_hard(thing: ElementTree.Element) -> bool:
    return any((thing.findtext(mark) or "").strip() == "1" for mark in ("truncated", "difficult"))
