"""Which layout a folder has."""

from __future__ import annotations

from pathlib import Path

from dinoreg.config import ConfigError
from eval.boxes.boxed import BoxedImages
from eval.boxes.coco import read_coco
from eval.boxes.voc import read_voc
from eval.boxes.yolo import read_yolo
from eval.suite import Place

WANTED = "Pascal VOC's Annotations and JPEGImages, COCO's instances_*.json, or YOLO's images and labels"


def open_boxes(place: Place, split: str = "trainval", hard: bool = True, names: str = "") -> BoxedImages:
    """The images of a folder, or of images=FOLDER and annotations=FILE.json (or a folder of XML files' root).

    split: the list of images in Pascal VOC's layout; hard: keep objects marked truncated or difficult, which only
    Pascal VOC marks; names: a text file that lists the images that count. Raises ConfigError.
    """
    found = _read(place, split, hard)
    if not found.entries:
        raise ConfigError(f"{place} holds no images with boxes", "--data")
    return found.named(Path(names)) if names else found


def _read(place: Place, split: str, hard: bool) -> BoxedImages:
    if place.root is None:
        return _read_parts(place)
    root = _devkit(place.root)
    if root.is_file():
        return read_coco(root, root.parent)
    if (root / "Annotations").is_dir() or any(root.glob("*.xml")):
        return read_voc(root, split, hard)
    if jsons := sorted([*root.glob("instances_*.json"), *root.glob("annotations/instances_*.json")]):
        if len(jsons) > 1:
            raise ConfigError(
                f"{root} has {len(jsons)} lists of boxes ({', '.join(file.name for file in jsons[:4])}): say which, by "
                f"--data images={root} --data annotations={jsons[0]}",
                "--data",
            )
        return read_coco(jsons[0], root)
    if (root / "images").is_dir() and (root / "labels").is_dir():
        return read_yolo(root)
    raise ConfigError(f"{root} holds no images with boxes: {WANTED}", "--data")


def _read_parts(place: Place) -> BoxedImages:
    """images=FOLDER annotations=FILE."""
    for part in ("images", "annotations"):
        if part not in place.parts:
            raise ConfigError(
                f"both parts are needed, and {part}= is missing: images=FOLDER annotations=FILE", "--data"
            )
        if not Path(place.parts[part]).exists():
            raise ConfigError(f"there is no {place.parts[part]}", "--data")
    return read_coco(Path(place.parts["annotations"]), Path(place.parts["images"]))


def _devkit(root: Path) -> Path:
    """Where archives of Pascal VOC were unpacked, the one year that is there."""
    for folder in (root / "VOCdevkit", root):
        years = sorted(each for each in folder.glob("VOC20[01][0-9]") if (each / "Annotations").is_dir())
        if len(years) > 1:
            raise ConfigError(f"{folder} holds several years: give one of them, such as {years[0]}", "--data")
        if years:
            return years[0]
    return root
