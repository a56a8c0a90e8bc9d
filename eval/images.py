"""Labelled images for classification: where train and test lie, which count, and how a network is shown them."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dinoreg.config import ConfigError
from dinoreg.data.images import BadImage, open_picture
from dinoreg.data.labelled import LabelledImages
from dinoreg.data.stored import Folder
from eval.suite import Place

LONGEST = 16  # times the short side; beyond that only the middle of an image is resized
MOST_CLASSES = 1_000_000  # more are a number that is none of a class, and would ask for all memory
TEST_NAMES = ("val", "validation", "test")  # ImageNet's test set has no labels


class Images(LabelledImages):
    """Encoded images with class numbers, from class folders or shards; see `LabelledImages`. Raises ValueError."""

    def __init__(self, path: str | Path, classes: tuple[str, ...] = (), labelled: bool = True) -> None:
        super().__init__(path, 0, 3, classes, labelled)
        self.path = str(path)

    def read(self, index: int) -> Tensor:
        """Pixels, uint8 (3, H, W). Raises BadImage."""
        return open_picture(self._source.read(index), 3).decode()

    def name(self, index: int) -> str:
        """For messages: the file, or the shard and the member in it."""
        return "/".join(self._source.locate(index))

    def trouble(self, index: int) -> str | None:
        """Why an image cannot be read; None where it can."""
        try:
            self.read(index)
        except BadImage as error:
            return error.reason
        return None

    @cached_property
    def digest(self) -> str:
        """Differs where there are other images, by names and sizes, or other labels; moving them changes nothing."""
        found = hashlib.sha256(self._source.identity().encode())
        found.update(np.ascontiguousarray(self._source.sizes()).tobytes())
        found.update(self.labels.numpy().tobytes())
        return found.hexdigest()

    def changed(self) -> str:
        """A digest of when the files were written last, by which those are found that kept their name and size."""
        if isinstance(self._source, Folder):
            paths = [f"{self._source.root}/{self._source.name(index)}" for index in range(len(self))]
        else:
            paths = self._source.tars
        return hashlib.sha256(np.array([_written(path) for path in paths], dtype=np.int64).tobytes()).hexdigest()


def _written(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns  # noqa: PTH116 (pathlib takes six times as long)
    except OSError:
        return 0


@dataclass(frozen=True)
class View:
    """The short side is resized to `resize` pixels, bicubically and antialiased, and the central square kept."""

    size: int
    resize: int

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 (C, H, W) -> (C, size, size)."""
        pixels = _middle(pixels)
        height, width = pixels.shape[1:]
        short = min(height, width)
        target = [max(self.resize, int(self.resize * side / short)) for side in (height, width)]
        image = pixels[None].contiguous(memory_format=torch.channels_last)
        image = F.interpolate(image, size=target, mode="bicubic", antialias=True)[0]
        top, left = (round((side - self.size) / 2) for side in target)
        return image[:, top : top + self.size, left : left + self.size]

    def __str__(self) -> str:
        return f"short side to {self.resize}, bicubic; central {self.size} x {self.size}"


def _middle(pixels: Tensor) -> Tensor:
    """The part of a very long image of which something will be kept: resized as a whole, it could fill the memory."""
    height, width = pixels.shape[1:]
    most = LONGEST * min(height, width)
    # An equal number from both ends, so that the centre stays where it is.
    top, left = (max(0, (side - most) // 2) for side in (height, width))
    return pixels[:, top : height - top, left : width - left]


@dataclass(frozen=True)
class Part:
    """The images of a part that count. rows: int64 (n,), increasing places in `images`."""

    images: Images
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> Tensor:
        """int64 (n,)."""
        return self.images.labels[torch.from_numpy(self.rows)]

    def subset(self, places: NDArray[np.int64]) -> Part:
        """Those of the images that count."""
        return Part(self.images, self.rows[places])

    def digest(self) -> str:
        """Of the images that count."""
        return hashlib.sha256(self.images.digest.encode() + self.rows.tobytes()).hexdigest()


class Viewed(Dataset[tuple[Tensor, bool]]):
    """The images of a part through a view, each with whether it could be read; black where not."""

    def __init__(self, part: Part, view: View) -> None:
        self.part, self.view = part, view

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, place: int) -> tuple[Tensor, bool]:
        try:
            return self.view(self.part.images.read(int(self.part.rows[place]))), True
        except BadImage:
            return torch.zeros(3, self.view.size, self.view.size, dtype=torch.uint8), False


def open_parts(place: Place, max_train: int = 0, max_test: int = 0) -> tuple[Part, Part]:
    """Training and test images with the same classes. At most so many, drawn evenly over the classes; 0 = all.

    Raises ConfigError, ValueError where something is missing or the classes differ.
    """
    train_path, test_path = find_parts(place)
    train = Images(train_path)
    test = Images(test_path, tuple(train.classes))
    _demand_same_classes(train, test)
    return Part(train, draw_evenly(train.labels, max_train)), Part(test, draw_evenly(test.labels, max_test))


def find_parts(place: Place) -> tuple[str, str]:
    """Where the training and the test images lie."""
    if place.root is None:
        test = next((place.parts[name] for name in ("test", "val") if name in place.parts), None)
        if "train" not in place.parts or test is None:
            raise ConfigError("both parts are needed: train=DIR and test=DIR", "--data")
        return place.parts["train"], test
    train = _part_in(place.root, "train")
    test = next((found for name in TEST_NAMES if (found := _part_in(place.root, name))), None)
    if train is None or test is None:
        if packed := sorted(path.name for ending in ("tar.gz", "tgz") for path in place.root.glob(f"*.{ending}")):
            raise ConfigError(
                f"{place.root}/{packed[0]} is compressed, and cannot be read in any order: gunzip it", "--data"
            )
        raise ConfigError(
            f"{place.root} holds no {'train' if train is None else 'val or test'} folder or shards: give a folder with "
            "train/CLASS and val/CLASS or with train-*.tar and val-*.tar, or both parts as train=DIR and test=DIR",
            "--data",
        )
    return train, test


def _part_in(root: Path, name: str) -> str | None:
    """The folder or the shards of that name in a folder."""
    if (root / name).is_dir():
        return str(root / name)
    tars = sorted(tar.stem for tar in root.glob(f"{name}*.tar"))
    if len(tars) < 2:
        return str(root / f"{tars[0]}.tar") if tars else None
    return str(root / f"{{{','.join(tars)}}}.tar")


def _demand_same_classes(train: Images, test: Images) -> None:
    """Scores over classes that one part lacks would be wrong without a sign of it."""
    known, asked = set(train.labels.tolist()), set(test.labels.tolist())
    if min(known | asked) < 0:
        raise ConfigError(f"labels are numbers from 0 on, not {min(known | asked)}", "--data")
    if max(known | asked) >= MOST_CLASSES:
        raise ConfigError(f"the label {max(known | asked)} is no number of a class, which count from 0", "--data")
    for lacking, has, where in ((asked - known, "test", train), (known - asked, "training", test)):
        if lacking:
            names = [train.classes[number] if train.classes else f"number {number}" for number in sorted(lacking)[:3]]
            others = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
            raise ConfigError(
                f"the class {', '.join(names)}{others} of the {has} images has no image in {where.path}", "--data"
            )


def draw_evenly(labels: Tensor, most: int, seed: int = 0) -> NDArray[np.int64]:
    """Increasing places of `most` images (0 = all), as many of each class as possible, always the same ones."""
    count = len(labels)
    if not 0 < most < count:
        return np.arange(count)
    order = np.random.default_rng(seed).permutation(count)
    drawn = labels.numpy()[order]
    by_class = drawn.argsort(kind="stable")
    first = np.searchsorted(drawn[by_class], drawn[by_class])  # where each one's class begins
    turn = np.empty(count, dtype=np.int64)  # the how-manyth of its class an image is, in the order drawn
    turn[by_class] = np.arange(count) - first
    return np.sort(order[turn.argsort(kind="stable")[:most]])


def hold_out(count: int, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Increasing places of the images that are held out, and of those that are kept, always the same.

    Raises ConfigError where there are too few.
    """
    order = np.random.default_rng(seed).permutation(count)
    held = max(1, round(count * share))
    if held >= count:
        raise ConfigError(f"{count} training images are too few to hold some out", "heldout")
    return np.sort(order[:held]), np.sort(order[held:])
