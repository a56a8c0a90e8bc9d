"""Predictions of large images, window by window."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

AT_ONCE = 4  # windows whose predictions are held at once
CLASSES_AT_ONCE = 32  # whose scores are held at full size


def starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows begin along one side: every `stride` pixels, the last one so that it ends with the image."""
    count = max(length - crop + stride - 1, 0) // stride + 1
    return [max(0, min(number * stride, length - crop)) for number in range(count)]


def slide(pixels: Tensor, crop: int, stride: int, predict: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean of what is predicted in all windows that see a pixel: (3, H, W) -> (K, H, W).

    predict: windows (B, 3, h, w) -> (B, K, h, w). crop: the windows' side, at most the image's; 0 = one window of all.
    """
    height, width = pixels.shape[1:]
    if not crop:
        return predict(pixels[None])[0]
    corners = [(top, left) for top in starts(height, crop, stride) for left in starts(width, crop, stride)]
    total: Tensor | None = None
    seen = torch.zeros(height, width)
    for start in range(0, len(corners), AT_ONCE):
        some = corners[start : start + AT_ONCE]
        found = predict(torch.stack([pixels[:, top : top + crop, left : left + crop] for top, left in some]))
        total = found.new_zeros(found.shape[1], height, width) if total is None else total
        for (top, left), values in zip(some, found, strict=True):
            total[:, top : top + crop, left : left + crop] += values
            seen[top : top + crop, left : left + crop] += 1
    assert total is not None
    return total / seen.to(total.device)


def resize_scores(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """(K, h, w) -> (K, H, W), bilinear."""
    return F.interpolate(scores[None], size=size, mode="bilinear")[0]


def classify(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The class with the highest score at each pixel of an image of that size: (K, h, w) -> int64 (H, W).

    A few classes at a time: 150 of them at the size of ADE20k's largest images would take several gigabytes.
    """
    best, label = None, None
    for start in range(0, len(scores), CLASSES_AT_ONCE):
        top, which = resize_scores(scores[start : start + CLASSES_AT_ONCE], size).max(0)
        if best is None or label is None:
            best, label = top, which
        else:
            label = torch.where(top > best, which + start, label)
            best = torch.maximum(top, best)
    assert label is not None
    return label
