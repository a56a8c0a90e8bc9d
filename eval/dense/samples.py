"""Where training batches come from: augmented images through the network, or maps of whole images from the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dinoreg.config import ConfigError
from dinoreg.data.counter import Purpose, generator
from dinoreg.data.images import BadImage, DataError
from eval.augment import Order, numbers_of
from eval.compute import load
from eval.dense.frame import Frame, Mapper, Maps
from eval.dense.pairs import Pairs, reason_of
from eval.dense.transforms import place, resize_image, resize_target, size_for
from eval.results import write_atomically
from eval.suite import Context

VERSION = 1  # of what is stored
LEAST_TRIED = 100  # images before the share of bad ones is judged
KEPT = 1024  # targets in memory
UNREADABLE = "unreadable"

Batch = list[tuple[Maps, Tensor]]  # maps of equally large images, and their targets (B, H, W) on the device


class Augmentation(Protocol):
    """Changes an image and its target together, to at most `size`. unknown: the target's value where there is none."""

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def unknown(self) -> float: ...

    def __call__(self, pixels: Tensor, target: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]: ...


class Source(Protocol):
    """Each rank gets its share."""

    def batches(self, start: int) -> Iterator[Batch]: ...


def attempt(pairs: Pairs, where: int) -> tuple[Tensor, Tensor, str]:
    """An image, its target and the trouble: none, UNREADABLE, or what is wrong with the data, for `good_ones`.

    A process that decodes cannot raise what is one line for people: torch adds its own history to it.
    """
    try:
        return *pairs.read(where), ""
    except BadImage:
        trouble = UNREADABLE
    except DataError as error:
        trouble = str(error)
    return torch.zeros(3, 1, 1, dtype=torch.uint8), torch.zeros(1, 1), trouble


def good_ones(troubles: Sequence[str]) -> list[bool]:
    """Which could be read. Raises DataError."""
    for trouble in troubles:
        if trouble not in ("", UNREADABLE):
            raise DataError(trouble)
    return [not trouble for trouble in troubles]


class Augmented(Dataset[tuple[Tensor, Tensor, Tensor, int, str]]):
    """number -> pixels and target, the size they fill, the place in the pairs, the trouble with them.

    What cannot be read is black, with a target that is unknown everywhere.
    """

    def __init__(self, pairs: Pairs, augmentation: Augmentation, seed: int) -> None:
        self.pairs, self.augmentation, self.seed = pairs, augmentation, seed
        self.order = Order(len(pairs), seed)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor, int, str]:
        where, change = self.order.place(number), self.augmentation
        pixels, target, trouble = attempt(self.pairs, where)
        if trouble:
            target = torch.full_like(target, change.unknown)
        pixels, target = change(pixels, target, generator(self.seed, Purpose.CROP, number))
        return *place(pixels, target.float(), change.size, change.unknown), where, trouble


class FromImages:
    """Augmented images, put through the network. bad: places of those pairs that cannot be read."""

    def __init__(
        self, images: Augmented, mapper: Mapper, steps: int, batch: int, context: Context, max_bad_share: float
    ) -> None:
        self.images, self.mapper, self.steps, self.batch, self.context = images, mapper, steps, batch, context
        self.max_bad_share = max_bad_share
        self.bad: set[int] = set()
        self._tried = self._failed = 0

    def batches(self, start: int) -> Iterator[Batch]:
        """From step `start` on. Raises ConfigError where too many cannot be read."""
        numbers = numbers_of(start, self.steps, self.batch, self.context.ranks)
        height, width = self.images.augmentation.size
        for pixels, target, sizes, places, troubles in load(self.images, numbers, self.context, 7 * height * width):
            good = good_ones(troubles)
            self._judge([place for place, fine in zip(places.tolist(), good, strict=True) if not fine], len(good))
            yield [(self.mapper(pixels, sizes), target.to(self.context.device, non_blocking=True))]

    def _judge(self, bad: list[int], count: int) -> None:
        self.bad.update(bad)
        self._tried += count
        self._failed += len(bad)
        if bad and self._tried >= LEAST_TRIED and self._failed > self.max_bad_share * self._tried:
            raise too_many(self.images.pairs, bad, self._failed, self._tried, self.max_bad_share)


def too_many(pairs: Pairs, bad: Sequence[int], failed: int, tried: int, most: float) -> ConfigError:
    """The error for data of which too much cannot be read."""
    return ConfigError(
        f"{failed} of {tried} images or their targets cannot be read, more than max_bad_share={most}; the first is "
        f"{pairs.name(bad[0])} ({reason_of(pairs, bad[0])})",
        "--data",
    )


class Whole(Dataset[tuple[Tensor, Tensor, str]]):
    """Whole images with their targets and the trouble, the images resized to a short side (0 = as they are)."""

    def __init__(self, pairs: Pairs, short: int) -> None:
        self.pairs, self.short = pairs, short

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, where: int) -> tuple[Tensor, Tensor, str]:
        pixels, target, trouble = attempt(self.pairs, where)
        return self.resize(pixels), target, trouble

    def resize(self, pixels: Tensor) -> Tensor:
        """uint8 (3, H, W) -> (3, h, w)."""
        return resize_image(pixels, size_for(pixels.shape[1], pixels.shape[2], self.short)) if self.short else pixels


class Stored:
    """Maps of whole images as they are, each computed once: a file an image, which is there when it is complete.

    They are fp16, or fp32 where values are too large for it. What a killed process leaves is right, and ranks that
    share the folder share the work.
    """

    def __init__(self, pairs: Pairs, short: int, mapper: Mapper, context: Context, what: str) -> None:
        self.pairs, self.images, self.mapper, self.context = pairs, Whole(pairs, short), mapper, context
        self.what = what
        about = [
            VERSION, mapper.backbone.digest, mapper.blocks, mapper.norm, mapper.precision,
            [list(map(float, each)) for each in mapper.backbone.normalisation], short, pairs.digest(), pairs.changed(),
        ]  # fmt: skip
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
        self.folder = context.cache / f"maps-{key}"
        self._target = lru_cache(KEPT)(self._read_target)

    def make(self, max_bad_share: float) -> list[int]:
        """Computes what is not there yet; returns the places of the pairs that can be read. Raises ConfigError."""
        ranks, count = self.context.ranks, len(self.pairs)
        missing = ranks.from_main(self._missing)
        mine = missing[ranks.rank :: ranks.world]
        with self.context.progress(self.what, count, count - len(missing)) as advance:
            batches = [[place] for place in mine]
            loaded = load(self.images, batches, self.context, 2**22)
            for place, (pixels, _, troubles) in zip(mine, loaded, strict=True):
                self._write(place, pixels, good_ones(troubles)[0])
                advance(ranks.world)
        ranks.barrier()
        bad = ranks.from_main(lambda: sorted(int(file.stem) for file in self.folder.glob("*.bad")))
        if bad and len(bad) > max_bad_share * count:
            raise too_many(self.pairs, bad, len(bad), count, max_bad_share)
        return sorted(set(range(count)) - set(bad))

    def file(self, place: int) -> Path:
        return self.folder / f"{place:08d}.pt"

    def _missing(self) -> list[int]:
        done = {int(file.stem) for file in self.folder.glob("*.*") if not file.name.startswith(".")}
        return sorted(set(range(len(self.pairs))) - done)

    def _write(self, place: int, pixels: Tensor, good: bool) -> None:
        if not good:
            write_atomically(self.file(place).with_suffix(".bad"), lambda _: None)
            return
        tokens = self.mapper(pixels).tokens[0].cpu()
        if not tokens.isfinite().all():
            raise ConfigError(f"the features of {self.pairs.name(place)} are not finite", "--weights")
        half = tokens.half()  # which some networks' residual stream exceeds
        state = {"size": list(pixels.shape[2:]), "tokens": half if half.isfinite().all() else tokens}
        write_atomically(self.file(place), lambda file: torch.save(state, file))

    def _load(self, place: int) -> dict[str, Any]:
        try:
            return torch.load(self.file(place), map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise ConfigError(
                f"{self.folder} is not seen by all processes: give a folder they share", "--cache"
            ) from error

    def maps(self, place: int) -> Maps:
        """Of one image, (1, L, 1 + N, D)."""
        state = self._load(place)
        frame = Frame(state["size"][0], state["size"][1], self.mapper.backbone.patch_size)
        return Maps(state["tokens"][None].to(self.context.device).float(), frame)

    def _read_target(self, place: int) -> Tensor:
        size = self._load(place)["size"]
        return resize_target(self.pairs.target(place), (size[0], size[1]))

    def merged(self, places: Sequence[int]) -> Batch:
        """Maps and targets in that order, those of equal size that follow each other together."""
        found = [(self.maps(place), self._target(place)) for place in places]
        batch = []
        for frame, group in groupby(found, key=lambda pair: pair[0].frame):
            maps, targets = zip(*group, strict=True)
            tokens = torch.cat([some.tokens for some in maps])
            batch.append((Maps(tokens, frame), torch.stack(targets).to(self.context.device)))
        return batch


class FromStored:
    """Stored maps of whole images, those at `good` places."""

    def __init__(self, stored: Stored, good: Sequence[int], steps: int, batch: int, seed: int) -> None:
        self.stored, self.good, self.steps, self.batch = stored, good, steps, batch
        self.order = Order(len(good), seed)

    def batches(self, start: int) -> Iterator[Batch]:
        """From step `start` on."""
        for numbers in numbers_of(start, self.steps, self.batch, self.stored.context.ranks):
            yield self.stored.merged([self.good[self.order.place(number)] for number in numbers])
