"""L2-regularised multinomial logistic regression by L-BFGS, on whatever device the features are on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 2**27  # logits held at once: 1 GiB in fp64
HISTORY = 10  # pairs of steps that L-BFGS remembers
LINE_SEARCH = 25  # evaluations of one line search; torch's own limit


@dataclass
class Linear:
    """A linear classifier: weight (K, D), bias (K,)."""

    weight: Tensor
    bias: Tensor
    iterations: int = 0
    gradient: float = 0.0  # largest entry at the end, of the mean loss

    def logits(self, features: Tensor) -> Tensor:
        """(n, D) -> (n, K)."""
        return features.to(self.weight.dtype) @ self.weight.T + self.bias

    def predict(self, features: Tensor) -> Tensor:
        """Classes int64 (n,)."""
        step = max(1, ROWS // len(self.bias))
        return torch.cat([self.logits(rows).argmax(1) for rows in features.split(step)])


@torch.no_grad()
def fit_logistic(
    features: Tensor,
    labels: Tensor,
    C: float,
    num_classes: int,
    *,
    max_iter: int = 1000,
    tol: float = 1e-12,
    start: Linear | None = None,
) -> Linear:
    """Minimises sum(cross entropy) + |W|^2 / 2C; the bias is free. In the features' precision.

    features (n, D), labels int64 (n,) in [0, num_classes). tol: of the largest entry of the gradient of this divided by
    n. start: a solution for a nearby C, from which fewer iterations are needed; there is only one minimum.
    """
    # Centred features have the same W, for the free bias takes the mean up, and a far rounder objective.
    mean = features.mean(0)
    theta = features.new_zeros(num_classes, features.shape[1] + 1)
    if start is not None:
        theta[:, :-1], theta[:, -1] = start.weight, start.bias + start.weight @ mean
    theta.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], lr=1, max_iter=max_iter, max_eval=LINE_SEARCH * max_iter, tolerance_grad=tol, tolerance_change=1e-14,
        history_size=HISTORY, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        loss, theta.grad = _objective(theta, features, mean, labels, C)
        return loss

    optimizer.step(closure)
    iterations = int(optimizer.state[theta]["n_iter"])
    weight = theta.detach()[:, :-1].clone()
    assert theta.grad is not None
    return Linear(weight, theta.detach()[:, -1] - weight @ mean, iterations, float(theta.grad.abs().max()))


def _objective(theta: Tensor, features: Tensor, mean: Tensor, labels: Tensor, C: float) -> tuple[Tensor, Tensor]:
    """(cross entropy + |W|^2 / 2C) / n and its gradient, in chunks of rows."""
    count, classes = len(labels), len(theta)
    weight, bias = theta.detach()[:, :-1], theta.detach()[:, -1]
    gradient = torch.zeros_like(theta)
    loss = theta.new_zeros(())
    for rows, truth in zip(features.split(step := max(1, ROWS // classes)), labels.split(step), strict=True):
        centred = rows - mean
        scores = F.log_softmax(centred @ weight.T + bias, dim=1)
        loss -= scores.gather(1, truth[:, None]).sum()
        error = scores.exp_()
        error.scatter_add_(1, truth[:, None], -torch.ones_like(truth[:, None], dtype=error.dtype))
        gradient[:, :-1] += error.T @ centred
        gradient[:, -1] += error.sum(0)
    gradient[:, :-1] += weight / C
    return (loss + weight.square().sum() / (2 * C)) / count, gradient / count
