"""Figures of predicted masks and depth maps, with intervals by a bootstrap over images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eval.metrics import bootstrap, mean_score
from eval.results import Score

IGNORED = -1  # in a mask: pixels that count neither as right nor as wrong
# Of each image: square root of the mean squared error, mean of |p - t| / t, mean of |log10 p - log10 t|, and the
# shares of pixels whose ratio max(p / t, t / p) is below 1.25, its square and its cube.
DEPTH_VALUES = ("rmse", "absrel", "log10", "delta1", "delta2", "delta3")


def areas(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """int64 (3, C): pixels of each class in both masks, in the prediction, in the truth; all of an image's that count.

    Both masks are integers (H, W); those pixels count where the truth is not IGNORED.
    """
    counted = truth != IGNORED
    predicted, truth = predicted[counted].long(), truth[counted].long()
    both = truth[predicted == truth]
    return torch.stack([torch.bincount(labels, minlength=classes) for labels in (both, predicted, truth)]).cpu()


def class_ious(sums: Tensor) -> Tensor:
    """Intersection over union of areas (..., 3, C), (..., C); NaN for a class that neither mask holds anywhere."""
    both, predicted, truth = sums.double().unbind(-2)
    return both / (predicted + truth - both)


def class_accuracies(sums: Tensor) -> Tensor:
    """The share of each class's pixels that were found, (..., C); NaN for a class without any."""
    both, _, truth = sums.double().unbind(-2)
    return both / truth


def _pixel_accuracy(sums: Tensor) -> Tensor:
    both, _, truth = sums.double().unbind(-2)
    return both.sum(-1) / truth.sum(-1)


def mask_scores(per_image: Tensor) -> dict[str, Score]:
    """Of areas (n, 3, C), in percent. Classes that occur nowhere are no part of the means."""
    figures = {
        "miou": lambda sums: class_ious(sums).nanmean(-1),
        "pixel_accuracy": _pixel_accuracy,
        "mean_accuracy": lambda sums: class_accuracies(sums).nanmean(-1),
    }
    found = {}
    for name, figure in figures.items():
        low, high = bootstrap(per_image, figure)
        kept = per_image.to(torch.int32) if name == "miou" else None
        found[name] = Score(100 * float(figure(per_image.sum(0))), 100 * low, 100 * high, "%", per_image=kept)
    return found


def class_table(per_image: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each class: its name, share of the true pixels, IoU and accuracy in percent; None where absent."""
    sums = per_image.sum(0)
    share = sums[2] / sums[2].sum().clamp(min=1)
    columns = zip(names, share.tolist(), class_ious(sums).tolist(), class_accuracies(sums).tolist(), strict=True)
    return [
        {"class": name, "pixels": _percent(share), "iou": _percent(iou), "accuracy": _percent(accuracy)}
        for name, share, iou, accuracy in columns
    ]


def _percent(share: float) -> float | None:
    return round(100 * share, 3) if share == share else None  # NaN is no JSON


def depth_values(predicted: Tensor, truth: Tensor) -> Tensor:
    """DEPTH_VALUES of one image, fp64 (6,): depths in metres (n,) of the pixels that count, at least one."""
    p, t = predicted.double(), truth.double()
    ratio = torch.maximum(p / t, t / p)
    within = [(ratio < 1.25**power).double().mean() for power in (1, 2, 3)]
    errors = [(p - t).square().mean().sqrt(), ((p - t).abs() / t).mean(), (p.log10() - t.log10()).abs().mean()]
    return torch.stack([*errors, *within]).cpu()


def depth_scores(per_image: Tensor, suffix: str = "") -> dict[str, Score]:
    """The means over images of DEPTH_VALUES (n, 6)."""
    return {
        f"{name}{suffix}": mean_score(
            per_image[:, column], "m" if name == "rmse" else "", "higher" if name.startswith("delta") else "lower"
        )
        for column, name in enumerate(DEPTH_VALUES)
    }
