"""Block masks for the masked-image objective (iBOT), with exact counts.

While it is drawn a mask is one integer, whose bit i is the patch i of the grid, row by row: a block is added, and what
it adds is counted, in two operations, whatever the size of the grid. The heights and widths that a block may have are
in a table. Drawing many masks in step in numpy takes longer, for they need different numbers of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinoreg.config import ConfigError
from dinoreg.data.counter import Purpose, generator

BLOCK = 32  # images whose masks are drawn together; a rank's share is static when this divides it
TRIES = 10  # candidate blocks before a mask is filled up with single patches
AHEAD = 12  # candidates drawn at once for each mask; on grids of 14 x 14 and 16 x 16 it takes 10 of them
FINE = 512  # shapes in the table for each patch of area, for all areas and aspects there; shares are right to 0.5 %
GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo one, are spread evenly wherever they begin and end

Candidate = tuple[int, int]  # random numbers below 2**30, which Python holds in one digit: for a shape and its place
Shape = tuple[int, int, list[int]]  # a block in the first corner; in how many places it fits; its shifts to these
Shapes = list[tuple[list[Shape], int]]  # [patches left]: a list, and how many of its first are the choice for a block
Floats = NDArray[np.floating[Any]]
NOTHING: Shape = (0, 1, [0])  # a candidate that fails


@dataclass
class MaskConfig:
    """Which global crops are masked, and how much of each."""

    probability: float = 0.5  # share of the global crops that get a mask
    ratio: tuple[float, float] = (0.1, 0.5)  # share of patches masked, spread evenly over the masked crops
    min_block: int = 4  # patches in the smallest block
    min_aspect: float = 0.3  # blocks have aspect in [min_aspect, 1 / min_aspect]

    def check(self) -> None:
        """Raises ConfigError on a value that no mask could have."""
        if not 0 <= self.probability <= 1:
            raise ConfigError("must be a probability, between 0 and 1", key="probability")
        if not 0 <= self.ratio[0] <= self.ratio[1] < 1:
            raise ConfigError("must be 0 <= low <= high < 1: at least one patch stays visible", key="ratio")
        if self.min_block < 1:
            raise ConfigError("must be at least one patch", key="min_block")
        if not 0 < self.min_aspect <= 1:
            raise ConfigError("must be in (0, 1]", key="min_aspect")


def block_size(batch_size: int) -> int:
    """Images in one block of masks: the largest divisor of the batch up to BLOCK, so that blocks never cross a step."""
    return max(size for size in range(1, BLOCK + 1) if batch_size % size == 0)


def block_counts(cfg: MaskConfig, images: int, patches: int) -> NDArray[np.int64]:
    """Masked patches of each of the 2 * images global crops of a block, in rising order.

    The share `probability` of the crops is masked; the i-th of them takes the middle of the i-th of as many equal
    intervals of `ratio`. The counts are the same in every block, so the shapes of the objective are static.
    """
    masked = int(2 * images * cfg.probability)
    edges = np.linspace(cfg.ratio[0], cfg.ratio[1], masked + 1)
    counts = (patches * (edges[:-1] + edges[1:]) / 2).astype(np.int64)
    return np.concatenate([np.zeros(2 * images - masked, dtype=np.int64), counts])


def draw_masks(
    cfg: MaskConfig, grid: tuple[int, int], batch_size: int, seed: int, start: int, count: int
) -> NDArray[np.bool_]:
    """Masks (count, 2, h * w) of the images with global sample numbers start .. start + count - 1.

    A pure function of (seed, sample number) for a given batch size: whoever asks for an image gets the same mask.
    """
    size, cells = block_size(batch_size), grid[0] * grid[1]
    blocks = range(start // size, (start + count - 1) // size + 1)
    counts = block_counts(cfg, size, cells)
    shapes = block_shapes(grid, cfg.min_block, cfg.min_aspect)
    rngs = (generator(seed, Purpose.MASK, block) for block in blocks)
    boards = [board for rng in rngs for board in _draw_block(rng, shapes, counts)]
    first = start - blocks.start * size
    return unpack(boards[2 * first : 2 * (first + count)], cells).reshape(count, 2, cells)


def _draw_block(rng: np.random.Generator, shapes: Shapes, counts: NDArray[np.int64]) -> list[int]:
    order = rng.permutation(counts).tolist()
    drawn = candidates(rng, AHEAD * int(np.count_nonzero(counts)))
    return [draw_mask(drawn, shapes, count) for count in order]


def candidates(rng: np.random.Generator, ahead: int) -> Iterator[Candidate]:
    """Random numbers for blocks without end, of which `ahead` are made at once."""

    def chunks() -> Iterator[Iterator[Candidate]]:
        while True:
            yield zip(*rng.integers(2**30, size=(2, ahead)).tolist(), strict=True)

    return chain.from_iterable(chunks())


def draw_mask(drawn: Iterator[Candidate], shapes: Shapes, count: int) -> int:
    """A mask with exactly `count` cells, of rectangular blocks (BEiT, algorithm 1: Bao et al. 2021), as an integer.

    Blocks are smaller than the grid on both sides, cover at most half of it, and may overlap. Where TRIES candidates
    in a row do not fit into what is left, single cells make up the count.
    """
    mask, left = 0, count
    while left:
        table, size = shapes[left]
        for which, where in islice(drawn, TRIES):
            block, places, shifts = table[which % size]
            both = mask | block << shifts[where % places]
            rest = count - both.bit_count()
            if 0 <= rest < left:
                break
        else:
            return _fill(drawn, mask, left, cells=len(shapes) - 1)
        mask, left = both, rest
    return mask


def _fill(drawn: Iterator[Candidate], mask: int, left: int, cells: int) -> int:
    """The mask with `left` more cells, each of the free ones as likely as any other."""
    while left:
        bit = 1 << next(drawn)[1] % cells
        left -= not mask & bit
        mask |= bit
    return mask


@lru_cache(maxsize=4)  # a run has one; it takes 14 ms and 0.5 MB on a grid of 16 x 16, 0.3 s and 8 MB on 64 x 64
def block_shapes(grid: tuple[int, int], min_block: int, min_aspect: float) -> Shapes:
    """Areas are uniform and aspects log-uniform. What reaches from side to side of the grid becomes NOTHING."""
    placed, cells = _placed(*grid), grid[0] * grid[1]

    def rounded(area: Floats, aspect: Floats) -> list[Shape]:
        root = min_aspect ** (0.5 - aspect)  # of the aspect, the widest at 0 and the highest at 1
        heights, widths = np.rint(np.sqrt(area) * root), np.rint(np.sqrt(area) / root)
        return [placed.get(size, NOTHING) for size in zip(heights.tolist(), widths.tolist(), strict=True)]

    areas = min_block + (np.arange(FINE * max(cells // 2 - min_block, 0)) + 0.5) / FINE
    rising = rounded(areas, areas * FINE * GOLDEN % 1)
    least = rounded(np.full(FINE, float(min_block)), (np.arange(FINE) + 0.5) / FINE)
    rooms = [min(left, cells // 2) - min_block for left in range(cells + 1)]
    return [(rising, FINE * room) if room > 0 else (least, FINE) for room in rooms]


def _placed(height: int, width: int) -> dict[tuple[int, int], Shape]:
    """(h, w): the block of h rows and w columns, for all that are smaller than the grid on both sides."""
    cells = range(height * width)
    corners = [[cell for cell in cells if cell % width <= width - w] for w in range(width)]
    rows = [sum(1 << width * row for row in range(h)) for h in range(height)]
    return {
        (h, w): (rows[h] * ((1 << w) - 1), (height - h + 1) * (width - w + 1), corners[w])
        for h in range(1, height)
        for w in range(1, width)
    }


def unpack(masks: Sequence[int], cells: int) -> NDArray[np.bool_]:
    """(n, cells)."""
    size = -(-cells // 8)
    packed = np.frombuffer(b"".join(mask.to_bytes(size, "little") for mask in masks), dtype=np.uint8)
    return np.unpackbits(packed.reshape(-1, size), axis=1, count=cells, bitorder="little").view(np.bool_)
