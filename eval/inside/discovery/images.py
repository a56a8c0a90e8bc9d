"""Images at their own size, those of the same size together, and the size at which a network sees them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from dinoreg.data.images import BadImage
from eval.boxes.boxed import BoxedImages

SMALL = 128  # pixels; networks trained on smaller images would see photos in hundreds of times as many patches
LARGER = 2  # times the size it was trained at: what photos are to networks trained at 224
PAIRS_AT_ONCE = 2**26  # pairs of patches whose products are held at once, a quarter of a GiB in fp32


@dataclass(frozen=True)
class Sight:
    """How large a network sees an image. short: pixels of the short side, 0 = as it is; most: patches."""

    patch: int
    short: int
    most: int

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) before padding."""
        factor = self.short / min(height, width) if self.short else 1.0
        rows, columns = (max(1, round(side * factor)) for side in (height, width))
        if self._patches(rows, columns) <= self.most:
            return rows, columns
        # Whole patches, so that rounding up cannot make more of them.
        factor = math.sqrt(self.most / (rows * columns)) * self.patch
        down, across = (max(1, int(side * factor / self.patch)) for side in (rows, columns))
        down, across = min(down, self.most), min(across, self.most)
        return down * self.patch, across * self.patch

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Patches (down, across) of an image that it sees at this size, the last ones filled up with zeros."""
        return -(-size[0] // self.patch), -(-size[1] // self.patch)

    def pad(self, images: Tensor) -> Tensor:
        """(B, C, H, W), normalised, with zeros below and to the right, so that patches tile it."""
        height, width = images.shape[-2:]
        return F.pad(images, (0, -width % self.patch, 0, -height % self.patch))

    def _patches(self, height: int, width: int) -> int:
        down, across = self.grid((height, width))
        return down * across


def choose_short(asked: int, trained: int) -> int:
    """Pixels of the short side, 0 = images as they are: what was asked (-1 is that), or by the training (0)."""
    if asked:
        return max(0, asked)
    return LARGER * trained if trained < SMALL else 0


class Sized(Dataset[tuple[Tensor, tuple[int, int]]]):
    """place -> pixels as the network sees them, uint8 (3, h, w), and the (height, width) of the image itself.

    What cannot be read has the size (0, 0).
    """

    def __init__(self, images: BoxedImages, sight: Sight) -> None:
        self.images, self.sight = images, sight

    def __getitem__(self, place: int) -> tuple[Tensor, tuple[int, int]]:
        try:
            pixels = self.images.read(place)
        except BadImage:
            return torch.zeros(3, 1, 1, dtype=torch.uint8), (0, 0)
        height, width = pixels.shape[1:]
        return resize(pixels, self.sight.size(height, width)), (height, width)

    def __getitems__(self, places: list[int]) -> list[list[tuple[Tensor, tuple[int, int]]]]:
        """A batch as one item, for annotations do not always tell the truth on sizes, and others cannot be stacked."""
        return [[self[place] for place in places]]


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (3, H, W) -> (3, *size), bicubic and antialiased."""
    if tuple(pixels.shape[1:]) == size:
        return pixels
    image = pixels[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(image, size=size, mode="bicubic", antialias=True)[0]


def buckets(images: BoxedImages, sight: Sight, most: int) -> list[list[int]]:
    """Places in batches of at most so many images that are seen at the same size, by what the annotations say."""
    alike: dict[tuple[int, int] | int, list[int]] = {}
    for place, entry in enumerate(images.entries):
        alike.setdefault(sight.size(*entry.size) if entry.size else -1 - place, []).append(place)
    found = []
    for size, places in alike.items():
        down, across = sight.grid(size) if isinstance(size, tuple) else (1, 1)
        step = max(1, min(most, PAIRS_AT_ONCE // (down * across) ** 2))
        found += [places[at : at + step] for at in range(0, len(places), step)]
    return sorted(found)


def by_size(pixels: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """Images (3, h, w) that have the same size, as one tensor (B, 3, h, w), each with where they were."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for at, image in enumerate(pixels):
        alike.setdefault(tuple(image.shape), []).append(at)
    for places in alike.values():
        yield places, torch.stack([pixels[at] for at in places])
