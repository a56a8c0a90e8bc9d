"""Is one checkpoint better than another? The difference of two scores, image by image where that was kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.dense.metrics import class_ious
from eval.metrics import bootstrap
from eval.report.read import Evaluation


@dataclass(frozen=True)
class Difference:
    """Score minus reference, with the 95 % interval of that. paired: from the same images, one by one."""

    value: float
    low: float
    high: float
    paired: bool
    better: str  # higher or lower

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `within`: the interval has 0 in it, so that the difference may be chance."""
        if self.low <= 0 <= self.high:
            return "within"
        return "better" if (self.value > 0) == (self.better == "higher") else "worse"


def difference(one: Evaluation, reference: Evaluation, name: str) -> Difference:
    """Of the score `name`, which both have, on the same data."""
    ours, theirs = one.scores[name], reference.scores[name]
    value = ours.value - theirs.value
    pair = _pair(one, reference, name)
    if pair is not None:
        low, high = _interval(*pair)
        return Difference(value, low, high, True, ours.better)
    below = math.hypot(ours.value - ours.low, theirs.high - theirs.value)
    above = math.hypot(ours.high - ours.value, theirs.value - theirs.low)
    return Difference(value, value - below, value + above, False, ours.better)


def _pair(one: Evaluation, reference: Evaluation, name: str) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """What each image adds to both scores; None where it was not kept or the images are not the same."""
    ours, theirs = one.outcomes.get(name), reference.outcomes.get(name)
    same = one.data.get("hash") == reference.data.get("hash") and set(one.bad) == set(reference.bad)
    if ours is None or theirs is None or not same or ours.shape != theirs.shape:
        return None
    return ours, theirs


def _interval(ours: NDArray[Any], theirs: NDArray[Any]) -> tuple[float, float]:
    """Both scores are computed on the same drawn images, so that what makes images hard or easy cancels."""
    both = torch.stack([torch.from_numpy(values.astype(np.float64)) for values in (ours, theirs)], dim=1)
    if both.ndim == 2:  # means
        with_ones = torch.cat([both, torch.ones(len(both), 1, dtype=torch.float64)], dim=1)
        return bootstrap(with_ones, lambda sums: (sums[:, 0] - sums[:, 1]) / sums[:, 2])

    def gap(sums: Tensor) -> Tensor:
        ious = 100 * class_ious(sums).nanmean(-1)
        return ious[:, 0] - ious[:, 1]

    return bootstrap(both, gap)
