"""YOLO's layout: a text file an image, a line an object with its class, centre and size as shares of the image's.

Or with its class and the corners of a polygon around it: then the box is that around the polygon.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dinoreg.config import ConfigError
from dinoreg.data.images import EXTENSIONS, BadImage, open_picture
from eval.boxes.boxed import Boxed, BoxedImages, as_boxes
from eval.dense.pairs import read_bytes

CORNERS = 6  # numbers of a triangle


def read_yolo(root: Path) -> BoxedImages:
    """Every image below images/ with the file of the same name below labels/; no file means no object.

    Raises ConfigError.
    """
    images, labels = root / "images", root / "labels"
    files = sorted(file for file in images.rglob("*") if file.suffix[1:].lower() in EXTENSIONS)
    entries = [_read(file, (labels / file.relative_to(images)).with_suffix(".txt")) for file in files]
    return BoxedImages(str(root), "YOLO's text files", entries)


def _read(image: Path, note: Path) -> Boxed:
    try:
        # The boxes are shares, so sizes must be known; an image whose header is damaged is left out later.
        picture = open_picture(read_bytes(image), 3)
    except BadImage:
        return Boxed(image, as_boxes([]), None)
    rows = []
    try:
        for line in note.read_text().splitlines() if note.is_file() else []:
            if numbers := [float(word) for word in line.split()]:
                sides = _sides(numbers[1:])
                rows.append([side * (picture.width, picture.height)[at % 2] for at, side in enumerate(sides)])
    except (OSError, ValueError) as error:
        raise ConfigError(f"{note} is damaged: {error}", "--data") from error
    return Boxed(image, as_boxes(rows), (picture.height, picture.width))


def _sides(numbers: Sequence[float]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of centre and size, which a confidence may follow, or of three corners or more.

    Raises ValueError.
    """
    if len(numbers) >= CORNERS and len(numbers) % 2 == 0:
        across, down = numbers[::2], numbers[1::2]
        return min(across), min(down), max(across), max(down)
    if len(numbers) not in (4, 5):
        raise ValueError(f"an object has {len(numbers)} numbers")
    x, y, width, height = numbers[:4]
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2
