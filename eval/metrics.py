"""Figures over images, and how much they would differ with other images of the same kind."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from eval.results import Score

RESAMPLES = 1000
LEVEL = 0.95
Z = 1.959964  # standard deviations that hold LEVEL of a normal distribution
AT_ONCE = 2**25  # counts held at once: 256 MiB in fp64


def bootstrap(
    per_image: Tensor,
    statistic: Callable[[Tensor], Tensor],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile interval of a figure that is made of sums over images, were they drawn anew with replacement.

    per_image: (n, ...), what each image adds to the sums; for a mean, a column of ones is among it. statistic: sums
    (R, ...) in fp64 -> figures (R,). Always the same for the same input.
    """
    count = len(per_image)
    generator = torch.Generator().manual_seed(seed)
    values = per_image.detach().cpu().double().flatten(1)
    figures = []
    for start in range(0, resamples, step := max(1, AT_ONCE // count)):
        rounds = min(step, resamples - start)
        drawn = torch.randint(count, (rounds, count), generator=generator)
        times = torch.zeros(rounds, count, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones(1, 1).double().expand_as(drawn)
        )
        figures.append(statistic((times @ values).unflatten(1, per_image.shape[1:])))
    tail = (1 - level) / 2
    low, high = torch.cat(figures).double().quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def mean_score(values: Tensor, unit: str = "", better: str = "higher") -> Score:
    """The mean of one figure an image (n,), with its interval."""
    with_ones = torch.stack([values.double(), torch.ones_like(values, dtype=torch.float64)], dim=1)
    low, high = bootstrap(with_ones, lambda sums: sums[:, 0] / sums[:, 1])
    return Score(float(values.double().mean()), low, high, unit, better, values.detach().cpu().float())


def accuracy_score(predicted: Tensor, truth: Tensor) -> Score:
    """Top-1 accuracy in percent: predictions and labels (n,), or the k first guesses (n, k) for top-k."""
    right = predicted == truth if predicted.ndim == 1 else (predicted == truth[:, None]).any(1)
    per_image = 100.0 * right.detach().cpu().float()
    low, high = share_interval(int(right.sum()), len(right))
    return Score(float(per_image.double().mean()), low, high, "%", per_image=per_image)


def share_interval(found: int, count: int) -> tuple[float, float]:
    """Wilson's interval, in percent, of a share of which `found` of `count` images were seen.

    For many images it is the bootstrap's. For few, or where nearly all are right, the bootstrap's is far too narrow,
    down to a width of 0 where all are.
    """
    share, spread = found / count, Z**2 / count
    centre = share + spread / 2
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4)
    low, high = (round(100 * (centre + sign * half) / (1 + spread), 9) for sign in (-1, 1))  # 100 is to be 100
    return low, high


def accuracy_by_class(predicted: Tensor, truth: Tensor, num_classes: int) -> list[float]:
    """Percent of each class's images that are found; 0 where a class has no image."""
    total = torch.bincount(truth, minlength=num_classes).clamp(min=1)
    right = torch.bincount(truth[predicted == truth], minlength=num_classes)
    return [round(value, 3) for value in (100.0 * right / total).tolist()]
