"""COCO's JSON with the boxes of all images (Lin et al., ECCV 2014)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinoreg.config import ConfigError
from eval.boxes.boxed import Boxed, BoxedImages, as_boxes

TRIED = 100  # images of the list by which their folder is found: some may be missing


def read_coco(file: Path, folder: Path) -> BoxedImages:
    """All images of an instances_*.json, in its order. Boxes around crowds do not count. Raises ConfigError.

    folder: where the images lie, or one that has them in a folder called as the set ("train2014"), or in images.
    """
    try:
        content = json.loads(file.read_bytes())
        boxes = _boxes(content["annotations"])
        images = [(str(image["file_name"]), _size(image), boxes[image["id"]]) for image in content["images"]]
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}", "--data") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is damaged: {error}", "--data") from error
    except (KeyError, TypeError, IndexError) as error:
        raise ConfigError(
            f"{file} is no JSON of COCO with images, annotations and boxes ({error!r})", "--data"
        ) from error
    if not images:
        raise ConfigError(f"{file} lists no images", "--data")
    place = _folder(file, folder, [name for name, _, _ in images[:TRIED]])
    entries = [Boxed(place / name, as_boxes(rows), size) for name, size, rows in images]
    return BoxedImages(str(place), f"COCO, {file.name}", entries)


def _boxes(notes: list[dict[str, Any]]) -> dict[Any, list[list[float]]]:
    """By image, rounded to pixels: COCO says left, top, width, height."""
    found: dict[Any, list[list[float]]] = defaultdict(list)
    for note in notes:
        if not note.get("iscrowd"):
            left, top, width, height = map(float, note["bbox"])
            found[note["image_id"]].append([round(side) for side in (left, top, left + width, top + height)])
    return found


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    height, width = int(image.get("height") or 0), int(image.get("width") or 0)
    return (height, width) if height > 0 and width > 0 else None


def _folder(file: Path, folder: Path, first: Sequence[str]) -> Path:
    """The first folder that holds one of these images, or would."""
    name = file.stem.removeprefix("instances_").partition("_")[0]
    tried = [folder, folder / name, folder / "images" / name, folder / "images"]
    if found := next((each for each in tried if any((each / one).is_file() for one in first)), None):
        return found
    there = next((each for each in tried[1:] if each.is_dir()), None)
    if there is None and not any(folder.glob("*.jpg")):
        raise ConfigError(
            f"the images of {file.name} are not in {folder}: give images=FOLDER annotations={file}", "--data"
        )
    return there or folder
