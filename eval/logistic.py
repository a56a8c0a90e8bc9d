"""L2-regularised multinomial logistic regression by L-BFGS, on whatever device the features are on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 2**27  # logits held at once: 1 GiB in fp64
HISTORY = 10  # pairs of steps that L-BFGS remembers


@dataclass
class Linear:
    """A linear classifier: weight (K, D), bias (K,)."""

    weight: Tensor
    bias: Tensor
    iterations: int = 0

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
    n, in coordinates in which the curvature is about 1. start: a solution for a nearby C, from which fewer iterations
    are needed; there is only one minimum.
    """
    mean, scale = _conditioning(features, C, num_classes)
    theta = features.new_zeros(num_classes, features.shape[1] + 1)
    if start is not None:
        theta[:, :-1], theta[:, -1] = start.weight, start.bias + start.weight @ mean
    theta = (theta / scale).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=max_iter,
        tolerance_grad=tol,
        tolerance_change=torch.finfo(features.dtype).eps,  # of the loss, which stops changing before the gradient does
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        loss, gradient = _objective(theta.detach() * scale, features, mean, labels, C)
        theta.grad = gradient * scale
        return loss

    optimizer.step(closure)
    iterations = int(optimizer.state[theta]["n_iter"])
    solution = theta.detach() * scale
    return Linear(solution[:, :-1].clone(), solution[:, -1] - solution[:, :-1] @ mean, iterations)


def _conditioning(features: Tensor, C: float, num_classes: int) -> tuple[Tensor, Tensor]:
    """The mean (D,) and a scale (D + 1,) for each feature and the bias, with which the curvature is about 1 everywhere.

    Where the features are centred, W is the same, for the free bias takes the mean up. The curvature along a weight is
    that of the cross entropy while all classes are as likely, and that of the penalty.
    """
    likely = (1 - 1 / num_classes) / num_classes
    variance, mean = torch.var_mean(features, dim=0, correction=0)
    curvature = torch.cat([variance * likely + 1 / (C * len(features)), variance.new_tensor([likely])])
    return mean, curvature.rsqrt()


def _objective(theta: Tensor, features: Tensor, mean: Tensor, labels: Tensor, C: float) -> tuple[Tensor, Tensor]:
    """(cross entropy + |W|^2 / 2C) / n and its gradient, in chunks of rows."""
    count, classes = len(labels), len(theta)
    weight, bias = theta[:, :-1], theta[:, -1]
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
