"""Figures over images, and how much they would differ with other images of the same kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eval.results import Score

RESAMPLES = 1000
LEVEL = 0.95
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
    return mean_score(100.0 * right, "%")


def accuracy_by_class(predicted: Tensor, truth: Tensor, num_classes: int) -> list[float]:
    """Percent of each class's images that are found; NaN never, for every class has images."""
    total = torch.bincount(truth, minlength=num_classes).clamp(min=1)
    right = torch.bincount(truth[predicted == truth], minlength=num_classes)
    return [round(value, 3) for value in (100.0 * right / total).tolist()]
