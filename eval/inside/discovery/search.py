"""All images of a set through LOST by all ranks, in bounded memory: what is kept of one are a few bits a setting."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoreg.config import ConfigError
from eval.boxes.boxed import BoxedImages
from eval.compute import Fitting, load
from eval.inside.discovery.corloc import floors, hits, in_pixels
from eval.inside.discovery.images import Sized, buckets, by_size
from eval.inside.discovery.sweep import Found, Scale, Sweep
from eval.suite import Context

MEASURED = 32  # images on which it is measured how long features and tokens are
STANDS_OUT = 3  # standard deviations above the mean norm, the rule of test-time registers (Jiang et al., 2025)
USUAL = 2**20  # pixels of an image whose annotation does not say, for the memory that workers share


@dataclass
class Outcome:
    """Of n images that could be read, in the order of the set, for L blocks, F features, S ways to set the bias.

    places: int64 (n,), in the set. right: bool (n, L, F, S), whether the box is; outside: bool, alike, whether the
    seed was outside of its mask; areas: fp32, alike, the share of the image that the box covers. floors: bool (n, 2),
    whether boxes drawn without looking are right. empty: bool (n,), images without a true box; resized: bool (n,),
    those that have another size than their annotation says. patches: int64 (n,), as which they are seen. apart: fp64
    (n, L, F, 2), loud: int64 (n, L), as in Found. seconds: of this rank, in the network and LOST, and all of them.
    """

    places: NDArray[np.int64]
    right: NDArray[np.bool_]
    outside: NDArray[np.bool_]
    areas: NDArray[np.float32]
    floors: NDArray[np.bool_]
    empty: NDArray[np.bool_]
    resized: NDArray[np.bool_]
    patches: NDArray[np.int64]
    apart: NDArray[np.float64]
    loud: NDArray[np.int64]
    seconds: tuple[float, float] = (0.0, 0.0)


@dataclass
class _Row:
    """What is kept of an image."""

    place: int
    right: NDArray[np.bool_]
    outside: NDArray[np.bool_]
    areas: NDArray[np.float32]
    floors: NDArray[np.bool_]
    empty: bool
    resized: bool
    patches: int
    apart: NDArray[np.float64]
    loud: NDArray[np.int64]


@dataclass
class Search:
    """The images, and the network that looks for objects in them. All methods are for all ranks together."""

    images: BoxedImages
    sweep: Sweep
    context: Context
    batch: int
    max_bad_share: float
    bad: dict[str, str] = field(default_factory=dict)

    def scale(self) -> Scale:
        """Measured on a few images, to so few digits that it is the same for any number of ranks."""
        ranks, sized = self.context.ranks, Sized(self.images, self.sweep.sight)
        places = np.unique(np.linspace(0, len(self.images) - 1, MEASURED).round().astype(int))
        total = torch.zeros(len(self.sweep.blocks), len(self.sweep.names) + 2, dtype=torch.float64)
        count = torch.zeros(1, dtype=torch.float64)
        for place in places[ranks.rank :: ranks.world]:
            pixels, size = sized[int(place)]
            if all(size):
                total += Fitting(1, self.context.say)(self.sweep.moments, pixels[None].to(self.context.device))[0]
                count += 1
        summed = ranks.sum_(torch.cat([total.flatten(), count]).to(self.context.device)).cpu()
        mean = (summed[:-1] / summed[-1].clamp(min=1)).view_as(total)
        norm, square = mean[:, -2:].unbind(1)
        spread = (square - norm.square()).clamp(min=0).sqrt()
        return Scale(_rounded(mean[:, :-2]), _rounded(norm + STANDS_OUT * spread))

    def through(self, biases: Tensor, cutoffs: Tensor) -> Outcome:
        """LOST on every image. biases: fp32 (L, F, S - 2); cutoffs: fp64 (L,), see Scale.

        Raises ConfigError where too many images cannot be read.
        """
        ranks = self.context.ranks
        batches = buckets(self.images, self.sweep.sight, self.batch)[ranks.rank :: ranks.world]
        sized = Sized(self.images, self.sweep.sight)
        loaded = load(sized, batches, self.context, self._most_bytes())
        fitting = Fitting(self.batch, self.context.say)
        rows: list[_Row] = []
        start, inside = time.perf_counter(), 0.0
        with self.context.progress("looking for objects", len(self.images)) as advance:
            for places, items in zip(batches, loaded, strict=True):
                begun = time.perf_counter()
                rows += self._look(places, items, biases, cutoffs, fitting)
                inside += time.perf_counter() - begun
                advance(len(places) * ranks.world)  # the others are about as far
        seconds = inside, time.perf_counter() - start
        gathered = [row for share in ranks.gather_objects(rows) for row in share]
        self._leave_out(gathered)
        return _outcome(sorted(gathered, key=lambda row: row.place), seconds)

    def _most_bytes(self) -> int:
        """Of an image as it is seen, as far as annotations say."""
        sizes = [self.sweep.sight.size(*entry.size) for entry in self.images.entries if entry.size]
        known = len(sizes) == len(self.images)
        return 3 * max([height * width for height, width in sizes] + ([] if known else [USUAL]))

    def _look(self, places: Sequence[int], items: Sequence[tuple[Tensor, Sequence[Tensor]]], biases: Tensor,
              cutoffs: Tensor, fitting: Fitting) -> list[_Row]:  # fmt: skip
        """items: pixels (1, 3, h, w) and the sizes of the images, as a batch of one comes from the loader."""
        good = [at for at, (_, (height, width)) in enumerate(items) if int(height) and int(width)]
        biases, cutoffs = biases.to(self.context.device), cutoffs.float().to(self.context.device)
        rows = []
        for which, pixels in by_size([items[at][0][0] for at in good]):
            pixels = pixels.to(self.context.device, non_blocking=True)
            pieces = fitting(lambda piece: self.sweep(piece, biases, cutoffs), pixels)
            found = {name: np.concatenate([vars(piece)[name] for piece in pieces]) for name in vars(pieces[0])}
            for row, number in enumerate(which):
                at = good[number]
                size = int(items[at][1][0]), int(items[at][1][1])
                seen = pixels.shape[2], pixels.shape[3]
                one = Found(**{name: values[row] for name, values in found.items()})
                rows.append(self._judge(places[at], one, seen, size))
        return rows

    def _judge(self, place: int, one: Found, seen: tuple[int, int], size: tuple[int, int]) -> _Row:
        """one: what is found in one image, without the first axis; seen, size: (height, width)."""
        truth, said = self.images.entries[place].boxes, self.images.entries[place].size
        found = in_pixels(one.boxes, self.sweep.sight.patch, seen, size)
        areas = (found[..., 2:] - found[..., :2]).prod(-1) / (size[0] * size[1])
        down, across = self.sweep.sight.grid(seen)
        without_looking = hits(floors(size), truth)
        return _Row(
            place, hits(found, truth), one.outside, areas, without_looking, not len(truth), said not in (None, size),
            down * across, one.apart, one.loud,
        )  # fmt: skip

    def _leave_out(self, rows: Sequence[_Row]) -> None:
        """Names the images that cannot be read. Raises ConfigError where they are too many."""
        places = sorted(set(range(len(self.images))) - {row.place for row in rows})
        self.bad = {self.images.name(at): self.images.trouble(at) or "unreadable a moment ago" for at in places}
        if not self.bad:
            return
        name, reason = next(iter(self.bad.items()))
        if len(self.bad) > self.max_bad_share * len(self.images) or not rows:
            raise ConfigError(
                f"{len(self.bad)} of {len(self.images)} images cannot be read, more than "
                f"max_bad_share={self.max_bad_share}; the first is {name} ({reason})",
                "--data",
            )
        some = ", ".join(f"{name} ({reason})" for name, reason in list(self.bad.items())[:3])
        self.context.say(f"careful: {len(self.bad)} images cannot be read and are left out: {some}")


def _outcome(rows: Sequence[_Row], seconds: tuple[float, float]) -> Outcome:
    fields = {name: np.array([vars(row)[name] for row in rows]) for name in vars(rows[0])}
    return Outcome(fields.pop("place"), **fields, seconds=seconds)


def _rounded(values: Tensor) -> Tensor:
    """To three digits that count."""
    digits = [float(f"{value:.3g}") for value in values.flatten().tolist()]
    return torch.tensor(digits, dtype=torch.float64).view_as(values)
