"""Block masks for the masked-image objective (iBOT), with exact counts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinoreg.config import ConfigError
from dinoreg.data.counter import Purpose, generator

BLOCK = 32  # images whose masks are drawn together; a rank's share is static when this divides it
TRIES = 10  # candidate blocks before a mask is filled up with single patches


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
    size = block_size(batch_size)
    blocks = range(start // size, (start + count - 1) // size + 1)
    masks = np.concatenate([_draw_block(cfg, grid, size, seed, block) for block in blocks])
    first = start - blocks.start * size
    return masks[first : first + count]


def _draw_block(cfg: MaskConfig, grid: tuple[int, int], images: int, seed: int, block: int) -> NDArray[np.bool_]:
    rng = generator(seed, Purpose.MASK, block)
    counts = rng.permutation(block_counts(cfg, images, grid[0] * grid[1]))
    masks = np.stack([draw_mask(rng, grid, int(count), cfg.min_block, cfg.min_aspect) for count in counts])
    return masks.reshape(images, 2, -1)


def draw_mask(
    rng: np.random.Generator, grid: tuple[int, int], count: int, min_block: int = 4, min_aspect: float = 0.3
) -> NDArray[np.bool_]:
    """A mask (h, w) with exactly `count` cells, of rectangular blocks (BEiT, algorithm 1: Bao et al. 2021).

    Blocks are smaller than the grid on both sides, cover at most half of it, and may overlap. Where TRIES candidates
    in a row do not fit into what is left, single cells make up the count.
    """
    height, width = grid
    mask = np.zeros(grid, dtype=bool)
    left, failed = count, 0
    largest = max(height * width // 2, min_block)
    while left > 0 and failed < TRIES:
        failed = 0
        for area_u, aspect_u, top_u, left_u in rng.random((TRIES, 4)):
            area = min_block + area_u * (max(min(left, largest), min_block) - min_block)
            aspect = min_aspect ** (1 - 2 * aspect_u)  # log-uniform
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            failed += 1
            if not (0 < h < height and 0 < w < width):
                continue
            top, side = int(top_u * (height - h + 1)), int(left_u * (width - w + 1))
            view = mask[top : top + h, side : side + w]
            new = h * w - int(np.count_nonzero(view))
            if 0 < new <= left:
                view[...] = True
                left -= new
                failed = 0
                break
    if left > 0:
        mask.flat[rng.permutation(np.flatnonzero(~mask))[:left]] = True
    return mask
