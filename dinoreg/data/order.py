"""Which sample comes when: exact, elastic, without state. Everything follows from (seed, global sample number).

A sample costs a handful of operations on integers, for those that are read together lie in the same window or block,
whose tables are kept. That is as fast as numpy on the 64 samples of a rank's share, and serves any number of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinoreg.data.counter import Purpose, generator, make_key, permute

MIX_BLOCK = 4096  # samples in which each source gets its share to within two
LEAST_SHARE = 1 / 1000  # of a weighted source: enough for its share of a block never to round below zero
KEPT = 8  # windows; a block of a mixture is drawn from several of them where shards are small


@dataclass(frozen=True)
class Window:
    """Successive chunks of a pass that are shuffled together. Samples are numbered over all passes."""

    epoch: int
    start: int  # its first sample
    size: int
    key: int  # of its permutation
    chunks: list[int]
    starts: list[int]  # of the chunks, within the window

    def locate(self, number: int) -> tuple[int, int, int]:
        """(pass, chunk, place in the chunk)."""
        place = permute(number - self.start, self.size, self.key)
        position = bisect_right(self.starts, place) - 1
        return self.epoch, self.chunks[position], place - self.starts[position]


class EpochOrder:
    """Passes over samples that lie in chunks (shards); each pass is a permutation that reads few chunks at a time.

    In every pass the chunks are shuffled, then the samples of each `window` successive chunks are shuffled together.
    """

    def __init__(self, chunk_sizes: NDArray[np.int64], window: int, key: int) -> None:
        self.chunk_sizes = chunk_sizes
        self.window = window
        self.key = key
        self.total = int(chunk_sizes.sum())
        self._passes: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._windows: dict[tuple[int, int], Window] = {}
        self._last: Window | None = None

    def locate(self, number: int) -> tuple[int, int, int]:
        """(pass, chunk, place in the chunk) of the number-th sample ever."""
        window = self._last
        if window is None or not 0 <= number - window.start < window.size:
            window = self._last = self._find(number)
        return window.locate(number)

    def _find(self, number: int) -> Window:
        """The window that a sample lies in."""
        epoch, place = divmod(number, self.total)
        _, ends = self._pass(epoch)
        which = epoch, int(np.searchsorted(ends, place, side="right")) // self.window
        if which not in self._windows:
            while len(self._windows) >= KEPT:
                del self._windows[next(iter(self._windows))]
            self._windows[which] = self._open(*which)
        return self._windows[which]

    def _open(self, epoch: int, which: int) -> Window:
        chunks, ends = self._pass(epoch)
        part = slice(which * self.window, (which + 1) * self.window)
        chunks, ends = chunks[part], ends[part]
        starts = ends - self.chunk_sizes[chunks]
        start, size = int(starts[0]), int(ends[-1] - starts[0])
        key = make_key(self.key, epoch, which)
        return Window(epoch, epoch * self.total + start, size, key, chunks.tolist(), (starts - start).tolist())

    def _pass(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The order of the chunks in a pass, and where each ends; the two passes that a batch can touch are kept."""
        if epoch not in self._passes:
            chunks = generator(self.key, Purpose.ORDER, epoch).permutation(len(self.chunk_sizes))
            self._passes = {k: v for k, v in self._passes.items() if k == epoch - 1}
            self._passes[epoch] = (chunks, np.cumsum(self.chunk_sizes[chunks]))
        return self._passes[epoch]


@dataclass(frozen=True)
class Deal:
    """How a block of a mixture is dealt out."""

    key: int  # of its permutation
    starts: list[int]  # of the sources, within the block
    before: list[int]  # samples that each of them was dealt in earlier blocks


class Mixture:
    """Deals sample numbers to weighted sources: exact shares in every block, shuffled, in O(1) time and memory."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        self.edges = np.concatenate([[0.0], np.cumsum(shares)])
        self.edges[-1] = 1.0
        self.seed = seed
        self._last: tuple[int, Deal] | None = None

    def assign(self, number: int) -> tuple[int, int]:
        """(source, how many samples it was dealt before) of a sample number."""
        block, place = divmod(number, MIX_BLOCK)
        if self._last is None or self._last[0] != block:
            self._last = block, self._deal(block)
        deal = self._last[1]
        place = permute(place, MIX_BLOCK, deal.key)
        source = bisect_right(deal.starts, place) - 1
        return source, deal.before[source] + place - deal.starts[source]

    def _deal(self, block: int) -> Deal:
        before, after = self._dealt(block), self._dealt(block + 1)
        starts = np.cumsum(after - before) - (after - before)
        return Deal(make_key(self.seed, Purpose.SOURCE, block), starts.tolist(), before.tolist())

    def _dealt(self, blocks: int) -> NDArray[np.int64]:
        """Samples that each source has been dealt in so many blocks; the rounding never adds up."""
        return np.diff(np.floor(blocks * MIX_BLOCK * self.edges + 0.5)).astype(np.int64)
