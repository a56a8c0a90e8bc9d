"""How much a patch is like those beside it, before the network has looked at it (registers paper, section 2.1)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

COSINES = 400  # bins between -1 and 1

How = Literal["mean", "pairs"]


def neighbour_cosines(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cosine of each patch to the one above, below, left and right: (B, N, D) -> (B, N, 4), NaN beyond the border."""
    x = F.normalize(tokens.float(), dim=-1).unflatten(1, grid)
    found = x.new_full((*x.shape[:3], 4), torch.nan)
    down, right = (x[:, 1:] * x[:, :-1]).sum(-1), (x[:, :, 1:] * x[:, :, :-1]).sum(-1)
    found[:, 1:, :, 0], found[:, :-1, :, 1] = down, down
    found[:, :, 1:, 2], found[:, :, :-1, 3] = right, right
    return found.flatten(1, 2)


def on_border(grid: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Whether a patch lies on the border: bool (N,)."""
    inside = torch.zeros(grid, dtype=torch.bool, device=device)
    inside[1:-1, 1:-1] = True
    return ~inside.flatten()


def cosine_histograms(cosines: Tensor, outliers: Tensor, how: How) -> Tensor:
    """Of each image, of its normal patches and of its outliers: (B, N, 4), bool (B, N) -> int64 (B, 2, COSINES).

    how: a patch counts once with the mean over its neighbours, or once for each of them.
    """
    values = cosines.nanmean(-1, keepdim=True) if how == "mean" else cosines
    there = ~values.isnan()
    places = ((values.nan_to_num() + 1) * (COSINES / 2)).floor().clamp(0, COSINES - 1).long()
    image = torch.arange(len(values), device=values.device)[:, None, None]
    slots = (image * 2 + outliers[..., None].long()) * COSINES + places
    return torch.bincount(slots[there], minlength=len(values) * 2 * COSINES).view(-1, 2, COSINES)


def auroc(normal: Tensor, outlier: Tensor) -> Tensor:
    """The chance that an outlier's value is above a normal patch's, equal ones counted half.

    Histograms (..., bins) in increasing order -> (...); NaN where one of the two has nothing.
    """
    normal, outlier = normal.double(), outlier.double()
    below = normal.cumsum(-1) - normal
    return (outlier * (below + normal / 2)).sum(-1) / (normal.sum(-1) * outlier.sum(-1))


def cosine_centres() -> NDArray[np.float64]:
    """The middle of each bin."""
    return np.linspace(-1, 1, 2 * COSINES + 1)[1::2]
