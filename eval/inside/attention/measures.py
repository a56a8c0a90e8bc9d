"""How an attention map is spread: pure functions of weights over patches, in whose precision the outcome is."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LEAST = 1e-12  # of a median, which may be 0 where the softmax underflows


def normalised(weights: Tensor) -> Tensor:
    """Weights (..., N) over patches as a distribution over patches: what went to other tokens is left out."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def entropy(distribution: Tensor) -> Tensor:
    """(..., N) -> (...), in nats: 0 where all is on one patch, log N where each gets the same."""
    return torch.special.entr(distribution).sum(-1)


def peak(distribution: Tensor) -> Tensor:
    """(..., N) -> (...): the largest weight in units of the median; 1 where nothing goes to any patch."""
    ordered, n = distribution.sort(-1).values, distribution.shape[-1]
    median = (ordered[..., (n - 1) // 2] + ordered[..., n // 2]) / 2
    return ordered[..., -1].clamp(min=LEAST) / median.clamp(min=LEAST)


def mass_on(distribution: Tensor, chosen: Tensor) -> Tensor:
    """Share of a distribution (B, ..., N) on the patches chosen for each image (bool (B, N)): (B, ...)."""
    between = (1,) * (distribution.ndim - chosen.ndim)
    return (distribution * chosen.view(len(chosen), *between, -1)).sum(-1)


def cosine(maps: Tensor) -> Tensor:
    """Of each pair of maps (B, Q, N): (B, Q, Q). Weights are never negative, so 0 means that maps do not overlap."""
    units = torch.nn.functional.normalize(maps.double(), dim=-1)  # autocast would take three digits of anything less
    return (units @ units.mT).to(maps.dtype)


def jensen_shannon(distributions: Tensor) -> Tensor:
    """Jensen-Shannon divergence in bits of each pair of (B, Q, N): (B, Q, Q), 0 where alike, 1 without overlap."""
    own = entropy(distributions)
    mixed = entropy((distributions[:, :, None] + distributions[:, None, :]) / 2)
    divergence = mixed - (own[:, :, None] + own[:, None, :]) / 2
    return divergence.clamp(min=0) / math.log(2)


def mean_of_pairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Of symmetric matrices (B, Q, Q): the first row's mean without the diagonal, and the others' among themselves.

    Both (B,): CLS with the registers, and the registers with one another. NaN where there are too few.
    """
    count = matrix.shape[-1] - 1
    others = matrix[:, 1:, 1:]
    among = (others.sum((1, 2)) - others.diagonal(dim1=1, dim2=2).sum(1)) / (count * (count - 1) or math.nan)
    return matrix[:, 0, 1:].mean(1), among


class Lie(NamedTuple):
    """Where a map lies on the grid. row, column: its centre of gravity, 0 at the top or left, 1 at the other end;
    border: weight of a patch at the border in units of one inside; reach: root mean square distance from `origin`, in
    units of what an even map has. NaN where there is nothing to compare with, and everywhere for a map of zeros.
    """

    row: float
    column: float
    border: float
    reach: float


def lie_of(weights: Tensor, origin: tuple[float, float]) -> Lie:
    """Of one map (h, w). origin: a place on the grid, (row, column) in patches."""
    height, width = weights.shape
    p = (weights / weights.sum()).double().cpu()
    rows, columns = (torch.arange(length, dtype=torch.float64) for length in (height, width))
    squared = (rows[:, None] - origin[0]) ** 2 + (columns[None] - origin[1]) ** 2
    inside = p[1:-1, 1:-1]
    weight = float(inside.sum())
    around = (1 - weight) / (p.numel() - inside.numel())
    return Lie(
        float((p.sum(1) * rows).sum()) / max(1, height - 1),
        float((p.sum(0) * columns).sum()) / max(1, width - 1),
        around / weight * inside.numel() if weight else math.nan,
        math.sqrt(float((p * squared).sum()) / float(squared.mean())) if p.numel() > 1 else math.nan,
    )


def central_patch(grid: tuple[int, int]) -> tuple[int, int]:
    """(row, column) of the patch in the middle, of the later one where there are two."""
    return grid[0] // 2, grid[1] // 2
