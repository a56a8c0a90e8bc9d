"""Labelled images for evaluation: class folders or shards with `cls` members, one central crop each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from braceexpand import braceexpand
from torch import Tensor
from torch.utils.data import Dataset

from dinoreg.data.crops import resize_box
from dinoreg.data.images import BadImage, open_picture
from dinoreg.data.stored import Folder, Shards

# Share of the short side that is kept, as with the usual resizing to 256 and central crop of 224.
CENTRE = 224 / 256


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """uint8 images (C, size, size) with class numbers. An image that cannot be read is black and has the label -1.

    `path` is a folder with one folder of images a class (classes numbered in the order of their names, or in that of
    `classes` where given), a folder of tar shards, or a pattern of shards as `shards/test-{000..003}.tar`. With
    labelled=False it is any folder or shards of images, and all labels are 0.

    Raises:
        ValueError: nothing is there, or labels are missing; says which.
    """

    def __init__(
        self, path: str | Path, size: int, channels: int = 3, classes: Sequence[str] = (), labelled: bool = True
    ) -> None:
        self.size, self.channels = size, channels
        tars = _find_tars(str(path))
        self._source: Folder | Shards = Shards(tars) if tars else Folder(_existing(path))
        if len(self._source) == 0:
            raise ValueError(f"{path} holds no images")
        self.classes: list[str] = []
        if not labelled:
            self.labels = torch.zeros(len(self._source), dtype=torch.int64)
        elif isinstance(self._source, Shards):
            self.labels = _labels_of_shards(self._source)
        else:
            self.classes, self.labels = _labels_of_folder(self._source, classes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            picture = open_picture(self._source.read(index), self.channels)
            return centre_crop(picture.decode(), self.size), int(self.labels[index])
        except BadImage:
            return torch.zeros(self.channels, self.size, self.size, dtype=torch.uint8), -1


def centre_crop(pixels: Tensor, size: int) -> Tensor:
    """The central square of an image (C, H, W), CENTRE of its short side, resized to (C, size, size)."""
    height, width = pixels.shape[1:]
    side = max(1, round(min(height, width) * CENTRE))
    return resize_box(pixels, [(width - side) // 2, (height - side) // 2, side, side], size)


def _existing(path: str | Path) -> Path:
    if not Path(path).is_dir():
        raise ValueError(f"{path} is neither a folder nor a tar shard")
    return Path(path)


def _find_tars(path: str) -> list[Path]:
    """The shards that a pattern, a file or a folder of them names; none for a folder of images."""
    if path.endswith(".tar"):
        tars = [Path(name) for name in braceexpand(path)]
        if missing := [str(tar) for tar in tars if not tar.is_file()]:
            raise ValueError(f"{missing[0]} does not exist")
        return tars
    return sorted(Path(path).glob("*.tar"))


def _labels_of_shards(shards: Shards) -> Tensor:
    labels = [shards.label(index) for index in range(len(shards))]
    if None in labels:
        tar, member = shards.locate(labels.index(None))
        raise ValueError(f"{member} in {tar} has no label: a labelled shard holds a .cls file beside each image")
    return torch.tensor(labels)


def _labels_of_folder(folder: Folder, classes: Sequence[str]) -> tuple[list[str], Tensor]:
    """The class of an image is the first folder on its path."""
    owners = []
    for index in range(len(folder)):
        owner, slash, _ = folder.name(index).partition("/")
        if not slash:
            raise ValueError(
                f"{owner} in {folder.root} lies in no class folder: a labelled folder has one for each class"
            )
        owners.append(owner)
    names = list(classes) or sorted(set(owners))
    if unknown := set(owners) - set(names):
        raise ValueError(f"{folder.root} has the class {min(unknown)}, which the training images do not have")
    numbers = {name: number for number, name in enumerate(names)}
    return names, torch.tensor([numbers[owner] for owner in owners])
