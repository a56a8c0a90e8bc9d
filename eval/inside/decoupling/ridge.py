"""How much of the final CLS is linear in what the last block is given: ridge regression, scored on held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.metrics import bootstrap
from eval.results import Score

PENALTIES = torch.logspace(-7, 1, 17, dtype=torch.float64)  # times the number of images
RANK = 1e-12  # of the largest eigenvalue: less is rounding


@dataclass(frozen=True)
class Ridge:
    """y = (x - centre) weight + offset. penalty: of |weight|², as chosen."""

    centre: Tensor
    weight: Tensor
    offset: Tensor
    penalty: float

    def predict(self, x: Tensor) -> Tensor:
        """(m, p) -> (m, q)."""
        return (x - self.centre) @ self.weight + self.offset


def fit_ridge(x: Tensor, y: Tensor, penalties: Tensor = PENALTIES) -> Ridge:
    """Minimises |y - x w|² + penalty n |w|², the offset free; the penalty with the least error when each image is left
    out in turn, which for ridge is known without fitting again (Golub, Heath and Wahba 1979).

    x: (n, p), y: (n, q), both fp64.
    """
    count, centre, offset = len(x), x.mean(0), y.mean(0)
    x, y = x - centre, y - offset
    left, strengths = _left_vectors(x)
    seen = left.T @ y
    best, best_error = penalties[0] * count, float("inf")
    for penalty in penalties.to(x.device) * count:
        kept = strengths / (strengths + penalty)
        own = 1 / count + left.square() @ kept  # of each image in its own prediction
        error = float(((y - left @ (kept[:, None] * seen)) / (1 - own).clamp_min(1e-9)[:, None]).square().sum())
        if error < best_error:
            best, best_error = penalty, error
    weight = x.T @ (left @ (seen / (strengths + best)[:, None]))
    return Ridge(centre, weight, offset, float(best))


def _left_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors (n, r) and squared singular values (r,), from the smaller of the two products."""
    wide = x.shape[1] > x.shape[0]
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    kept = values > RANK * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    return (vectors if wide else x @ vectors / values.sqrt()), values


def cross_fitted(groups: Sequence[Tensor], y: Tensor) -> Tensor:
    """Squared errors of predictions and of the mean, each image predicted by a fit to the other half: (n, 2).

    groups: predictors, each (n, p_g), scaled as a whole to the same variance, so that the penalty treats them alike.
    y: (n, q). The halves are the even and the odd images.
    """
    y = y.double()
    found = torch.empty(len(y), 2, dtype=torch.float64)
    for held in (0, 1):
        tested = torch.arange(len(y), device=y.device) % 2 == held
        x = torch.cat([_scaled(group.double(), ~tested) for group in groups], dim=1)
        fit = fit_ridge(x[~tested], y[~tested])
        errors = (y[tested] - fit.predict(x[tested])).square().sum(1)
        found[tested.cpu()] = torch.stack([errors, (y[tested] - fit.offset).square().sum(1)], dim=1).cpu()
    return found


def _scaled(x: Tensor, train: Tensor) -> Tensor:
    spread = x[train].var(0, correction=0).sum().sqrt()
    return x / spread if spread > 0 else x


def r2(errors: Tensor, less: Tensor | None = None) -> Score:
    """Of what `cross_fitted` gave, with its interval; with `less`, by how much the one exceeds the other.

    1 is a perfect prediction, 0 is as good as the mean, and below 0 is worse.
    """
    worse = errors if less is None else less
    sums = torch.stack([errors[:, 0], worse[:, 0], errors[:, 1]], dim=1)

    def figure(found: Tensor) -> Tensor:
        base = found[:, 2] if less is None else found[:, 1]
        return (base - found[:, 0]) / found[:, 2]

    return Score(float(figure(sums.sum(0)[None])), *bootstrap(sums, figure), unit="")
