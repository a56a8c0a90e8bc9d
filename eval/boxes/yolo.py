"""YOLO's layout: a text file an image, a line an object with its class, centre and size as shares of the image's."""

from __future__ import annotations

from pathlib import Path

from dinoreg.config import ConfigError
from dinoreg.data.images import EXTENSIONS, BadImage, open_picture
from eval.boxes.boxed import Boxed, BoxedImages, as_boxes
from eval.dense.pairs import read_bytes


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
            _, across, down, width, height = map(float, line.split()[:5])
            left, top = (across - width / 2) * picture.width, (down - height / 2) * picture.height
            rows.append([left, top, left + width * picture.width, top + height * picture.height])
    except (OSError, ValueError) as error:
        raise ConfigError(f"{note} is damaged: {error}", "--data") from error
    return Boxed(image, as_boxes(rows), (picture.height, picture.width))
