"""Where in the image outliers lie: border against centre, and stripes (registers paper, appendix A)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dinoreg.models.vit import VisionTransformer, resample_positions
from eval.inside.artifacts.neighbours import on_border
from eval.inside.artifacts.norms import patch_norms_at
from eval.inside.artifacts.tally import Tally
from eval.inside.look import Batch

NARROWEST = 6  # columns of which an autocorrelation at lag 2 can be told

Map = NDArray[np.float64]


def edge_sums(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Values (..., N) by position, summed on the border and inside: (..., 2)."""
    border = on_border(grid, values.device)
    return torch.stack([values[..., border].sum(-1), values[..., ~border].sum(-1)], dim=-1)


def border_ratio(sums: Tensor, grid: tuple[int, int]) -> Tensor:
    """How much more there is at a place on the border than inside: sums (..., 2) as of `edge_sums` -> (...).

    Where nothing lies inside, half a token is taken to. The grid must have an inside.
    """
    inside = (grid[0] - 2) * (grid[1] - 2)
    outer, inner = sums.double().unbind(-1)
    return (outer / (grid[0] * grid[1] - inside)) / (inner.clamp(min=0.5) / inside)


def stripes(rates: Map, lag: int = 2, along: int = 1) -> float | None:
    """Autocorrelation at a lag of the profile of a map (h, w) along its columns (1) or rows (0), -1 to 1.

    The profile's best parabola is taken off first, for a preference for the border is none for every other column.
    None where the profile is too short, or flat.
    """
    profile = rates.mean(1 - along)
    if len(profile) < NARROWEST:
        return None
    at = np.arange(len(profile))
    rest = profile - np.polyval(np.polyfit(at, profile, 2), at)
    power = float((rest**2).sum())
    if power <= 1e-20 * max(float((profile**2).sum()), 1e-300):
        return None
    return float((rest[lag:] * rest[:-lag]).sum() / power)


def resampling_gradient(old: tuple[int, int], new: tuple[int, int], antialias: bool, offset: float = 0.0) -> Map:
    """How much each learnt position counts after the grid was resampled: (h, w) of the old grid.

    It is the gradient of the sum over the new grid (figure 11); all alike is best.
    """
    with torch.enable_grad():
        positions = torch.zeros(1, old[0] * old[1], 1, requires_grad=True)
        resample_positions(positions, old, new, antialias=antialias, offset=offset).sum().backward()
    assert positions.grad is not None
    return positions.grad.view(old).double().numpy()


def smaller_grid(native: int, used: int) -> int:
    """Patches along a side at which positions are resampled: those that are used anyway, or fewer than the native ones.

    In the paper networks of 37 are seen with images of 16. Aliasing needs about that ratio: from 8 to 6 there is none.
    """
    return used if used != native else max(1, round(native * 16 / 37))


@contextmanager
def resampling(model: VisionTransformer, antialias: bool, offset: float) -> Iterator[None]:
    """The network with its positions resampled in another way, and as it was afterwards."""
    config = model.config
    before = config.pos_antialias, config.pos_offset
    config.pos_antialias, config.pos_offset = antialias, offset
    try:
        yield
    finally:
        config.pos_antialias, config.pos_offset = before


def look_both_ways(model: VisionTransformer, batch: Batch, side: int, layer: int, cutoff: float) -> Tally:
    """With antialiasing, and without, on images of side x side patches.

    sums: places int64 (2, N), place_norms float64 (2, N): outliers and norms by position; seen int64 (1,).
    """
    size = side * model.patch_size
    images = batch.images
    if images.shape[-1] != size:
        images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
    norms = []
    for antialias in (True, False):
        with resampling(model, antialias, 0.0):
            norms.append(patch_norms_at(model, images, layer))
    both = torch.stack(norms)
    return Tally(
        {
            "places": (both > cutoff).sum(1),
            "place_norms": both.double().sum(1),
            "seen": torch.tensor([len(batch)]),
        }
    )
