"""How much there is to see in an image, from its pixels alone, and how that goes with another figure."""

from __future__ import annotations

import torch
from torch import Tensor

from eval.metrics import bootstrap
from eval.results import Score

MEASURES = ("edges", "entropy")
LEVELS = 64  # of grey
GREY = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


def clutter(pixels: Tensor) -> Tensor:
    """uint8 (B, 3, S, S) -> (B, 2): by MEASURES.

    edges: the mean length of the gradient of grey, in grey levels of 256 a pixel; entropy: of the distribution of grey
    over 64 levels, in bits. Both are high where much goes on.
    """
    grey = torch.einsum("bchw,c->bhw", pixels.float(), pixels.new_tensor(GREY, dtype=torch.float32))
    down, across = grey[:, 1:, :-1] - grey[:, :-1, :-1], grey[:, :-1, 1:] - grey[:, :-1, :-1]
    edges = (down.square() + across.square()).sqrt().mean((1, 2))
    levels = (grey * (LEVELS / 256)).long().clamp(0, LEVELS - 1).flatten(1)
    counts = torch.zeros(len(grey), LEVELS, device=grey.device).scatter_add_(1, levels, torch.ones_like(levels).float())
    shares = counts / levels.shape[1]
    return torch.stack([edges, -torch.special.xlogy(shares, shares).sum(1) / torch.tensor(2.0).log()], dim=1)


def rank_correlation(one: Tensor, other: Tensor) -> Score | None:
    """Spearman's, of two figures an image (n,), with a bootstrap's interval; None where one does not vary."""
    x, y = _ranks(one), _ranks(other)
    if len(x) < 4 or not (x.std() > 0 and y.std() > 0):
        return None
    sums = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y], dim=1)
    return Score(float(_pearson(sums.sum(0)[None])), *bootstrap(sums, _pearson), unit="")


def _pearson(sums: Tensor) -> Tensor:
    """From sums (R, 6) of 1, x, y, x², y², xy."""
    n, x, y, xx, yy, xy = sums.unbind(-1)
    return (n * xy - x * y) / ((n * xx - x * x) * (n * yy - y * y)).clamp_min(1e-300).sqrt()


def _ranks(values: Tensor) -> Tensor:
    """Ranks centred on 0, equal ones with their mean rank."""
    _, group, counts = values.double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[group] - (len(values) + 1) / 2
