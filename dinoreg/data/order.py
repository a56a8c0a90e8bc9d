"""Which sample comes when: exact, elastic, without state. Everything follows from (seed, global sample number)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dinoreg.data.counter import Purpose, generator, make_key, permute

MIX_BLOCK = 4096  # samples in which each source gets its share to within two
LEAST_SHARE = 1 / 1000  # of a weighted source: enough for its share of a block never to round below zero


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

    def locate(self, number: int) -> tuple[int, int, int]:
        """(pass, chunk, place in the chunk) of the number-th sample ever."""
        epoch, place = divmod(number, self.total)
        chunks, ends = self._pass(epoch)
        window = int(np.searchsorted(ends, place, side="right")) // self.window
        first, last = window * self.window, min((window + 1) * self.window, len(chunks))
        start = int(ends[first - 1]) if first else 0
        place = start + permute(place - start, int(ends[last - 1]) - start, make_key(self.key, epoch, window))
        position = int(np.searchsorted(ends, place, side="right"))
        chunk = int(chunks[position])
        return epoch, chunk, place - int(ends[position]) + int(self.chunk_sizes[chunk])

    def _pass(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The order of the chunks in a pass, and where each ends; the two passes that a batch can touch are kept."""
        if epoch not in self._passes:
            chunks = generator(self.key, Purpose.ORDER, epoch).permutation(len(self.chunk_sizes))
            self._passes = {k: v for k, v in self._passes.items() if k == epoch - 1}
            self._passes[epoch] = (chunks, np.cumsum(self.chunk_sizes[chunks]))
        return self._passes[epoch]


class Mixture:
    """Deals sample numbers to weighted sources: exact shares in every block, shuffled, in O(1) time and memory."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        self.edges = np.concatenate([[0.0], np.cumsum(shares)])
        self.edges[-1] = 1.0
        self.seed = seed

    def assign(self, number: int) -> tuple[int, int]:
        """(source, how many samples it was dealt before) of a sample number."""
        block, place = divmod(number, MIX_BLOCK)
        place = permute(place, MIX_BLOCK, make_key(self.seed, Purpose.SOURCE, block))
        before, after = self._dealt(block), self._dealt(block + 1)
        ends = np.cumsum(after - before)
        source = int(np.searchsorted(ends, place, side="right"))
        start = int(ends[source - 1]) if source else 0
        return source, int(before[source]) + place - start

    def _dealt(self, blocks: int) -> NDArray[np.int64]:
        """Samples that each source has been dealt in so many blocks; the rounding never adds up."""
        return np.diff(np.floor(blocks * MIX_BLOCK * self.edges + 0.5)).astype(np.int64)
