"""Index masks: what their numbers mean, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.data.images import BadImage, DataError, open_picture
from eval.dense.metrics import IGNORED
from eval.dense.pairs import TEST_FOLDERS, TRAIN_FOLDERS, FilePairs, find_part, pair_masks, read_bytes, two_places
from eval.suite import Context, Place

ADE_CLASSES = 150
ADE_FOLDER = "ADEChallengeData2016"  # what the official archive unpacks to
ADE_NAMES = "objectInfo150.txt"
NAMES = "classes.txt"  # a line for each number from 0 on
VOID = ("void", "unlabelled", "unlabeled", "ignore", "ignored")  # names of what is no class
MOST = 4096  # classes: more are colours or depths taken for indices


@dataclass(frozen=True)
class Labels:
    """The meaning of a mask's numbers. ignore: those that do not count, as they stand in the file.

    shift: ADE20k's convention: 0 is no class, and the others are one less than they say.
    """

    classes: int
    ignore: tuple[int, ...]
    shift: bool
    names: tuple[str, ...]

    def read(self, path: Path) -> Tensor:
        """int16 (H, W), IGNORED where pixels do not count. Raises BadImage; DataError for a number that is no label."""
        raw = read_indices(path)
        labels = raw.astype(np.int32) - int(self.shift)
        labels[np.isin(raw, self.ignore)] = IGNORED
        if self.shift:
            labels[raw == 0] = IGNORED
        if labels.max(initial=IGNORED) >= self.classes:
            worst = int(raw[labels >= self.classes][0])
            raise DataError(
                f"{path} holds the label {worst}, which is neither one of {self.describe()} nor in "
                f"ignore={list(self.ignore)}"
            )
        return torch.from_numpy(labels.astype(np.int16))

    def describe(self) -> str:
        """For the protocol: which numbers are classes."""
        first = int(self.shift)
        also = ", 0 is ignored" if self.shift else ""
        return f"{self.classes} classes (labels {first} to {self.classes - 1 + first}{also})"


def read_indices(path: Path) -> NDArray[np.int64]:
    """The numbers in a mask (H, W), palette or not. Raises BadImage; DataError for colours."""
    content = open_picture(read_bytes(path), 1).content
    if isinstance(content, np.ndarray):
        raise DataError(f"{path} is an array: masks are images of indices, such as PNG")
    if content.mode not in ("L", "P", "1", "I", "I;16", "I;16B", "I;16L"):
        raise DataError(f"{path} holds colours ({content.mode}), not indices: a mask has one channel of class numbers")
    try:
        return np.asarray(content).astype(np.int64)
    except Exception as error:  # decoders raise anything on broken input
        raise BadImage("unreadable", f"{path.name}: {error}") from error


def open_masks(
    place: Place, context: Context, classes: int, ignore: Sequence[int], shift: str
) -> tuple[FilePairs, FilePairs, Labels]:
    """Training and test images with their masks. classes: 0 = found; shift: auto, yes or no.

    Raises ConfigError, DataError.
    """
    parts = two_places(place) or _parts_of(place.root or Path())
    found = [pair_masks(*_folders(part)) for part in parts]
    official = any(folder.name in ("training", "validation") for folder in parts) or _beside(parts[0], ADE_NAMES)
    ade = shift == "yes" or (shift == "auto" and bool(official))
    names, void = read_names(parts[0], ade)
    ignored = tuple(sorted({*ignore, *void}))
    if not classes:
        masks = [mask for pairs in found for _, mask in pairs]
        known = ADE_CLASSES if ade and official else len(names)
        classes = known or context.ranks.from_main(lambda: count_classes(masks, ignored, ade, context))
    names = (names + [f"class {number}" for number in range(len(names), classes)])[:classes]
    labels = Labels(classes, ignored, ade, tuple(names))
    train, test = (
        FilePairs(str(part), pairs, labels.read, repr(labels)) for part, pairs in zip(parts, found, strict=True)
    )
    return train, test, labels


def _parts_of(root: Path) -> tuple[Path, Path]:
    """`images/train` and the like: the folders of images of both parts."""
    root = root / ADE_FOLDER if (root / ADE_FOLDER).is_dir() else root
    images = root / "images"
    train, test = find_part(images, TRAIN_FOLDERS), find_part(images, TEST_FOLDERS)
    if train is None or test is None:
        raise ConfigError(
            f"{root} holds no images/{'training' if train is None else 'validation'}: give a folder with "
            "images/training, images/validation, annotations/training and annotations/validation (or train and val), "
            "or train=DIR and test=DIR with images and annotations in each",
            "--data",
        )
    return train, test


def _folders(part: Path) -> tuple[Path, Path]:
    """The folders of a part's images and masks."""
    if (part / "images").is_dir():
        images, masks = part / "images", part / "annotations"
    else:
        images, masks = part, part.parent.parent / "annotations" / part.name
    if not masks.is_dir():
        raise ConfigError(f"there is no folder {masks} with the masks of {images}", "--data")
    return images, masks


def _beside(part: Path, name: str) -> Path | None:
    """A file in a part's folder, or in that of the whole data set."""
    return next((folder / name for folder in (part, part.parent.parent) if (folder / name).is_file()), None)


def read_names(part: Path, ade: bool) -> tuple[list[str], list[int]]:
    """The names of the classes where a file says them, and the numbers of those that are none."""
    if ade and (file := _beside(part, ADE_NAMES)):
        rows = [line.split("\t") for line in file.read_text().splitlines()[1:] if line.strip()]
        return [row[-1].split(",")[0].strip() for row in rows], []
    if ade or not (file := _beside(part, NAMES)):
        return [], []
    names = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    void = [number for number, name in enumerate(names) if name.lower() in VOID]
    while names and len(names) - 1 in void:
        names.pop()
    return names, void


def count_classes(masks: Sequence[Path], ignore: Sequence[int], shift: bool, context: Context) -> int:
    """One more than the highest label of all masks that can be read."""
    highest = -1
    with context.progress("looking for classes", len(masks)) as advance:
        for mask in masks:
            try:
                raw = read_indices(mask)
            except BadImage:
                continue
            finally:
                advance(1)
            highest = max(highest, int(raw[~np.isin(raw, ignore)].max(initial=-1)) - int(shift))
            if highest >= MOST:
                raise DataError(f"{mask} holds the label {highest}: these are no class numbers")
    if highest < 0:
        raise DataError(f"{masks[0].parent} holds no mask with a label that counts")
    return highest + 1
