"""Correct localisation: the share of images whose one box overlaps with any true box by at least a half."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eval.metrics import share_interval
from eval.results import Score

ENOUGH = 0.5  # intersection over union
EPS = 1e-7


def ious(found: NDArray[np.float32], truth: NDArray[np.float32]) -> NDArray[np.float32]:
    """Intersection over union (n, m) of boxes (n, 4) and (m, 4): left, top, right, bottom.

    In fp32 as in the authors' code, where EPS changes nothing that could be a box: an overlap of exactly a half counts.
    """
    one, other = found[:, None].astype(np.float32), truth[None].astype(np.float32)
    sides = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2])
    shared = sides.clip(0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (one, other)]
    return shared / (areas[0] + areas[1] - shared + np.float32(EPS))


def hits(found: NDArray[np.float32], truth: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether each of the boxes (..., 4) is right; none is in an image without true boxes (0, 4)."""
    overlaps = ious(found.reshape(-1, 4), truth)
    return (overlaps >= ENOUGH).any(1).reshape(found.shape[:-1])


def floors(size: tuple[int, int]) -> NDArray[np.float32]:
    """(2, 4): boxes that are drawn without looking, around the whole image, and around its middle 80 %."""
    height, width = size
    return np.array([[0, 0, width, height], [0.1 * width, 0.1 * height, 0.9 * width, 0.9 * height]], dtype=np.float32)


def corloc(right: NDArray[np.bool_] | Sequence[bool]) -> Score:
    """In percent, of images (n,) with whether their box is right; Wilson's interval."""
    per_image = 100 * torch.tensor(np.asarray(right), dtype=torch.float32)
    found = int(np.sum(right))
    return Score(100 * found / len(per_image), *share_interval(found, len(per_image)), per_image=per_image)


def in_pixels(boxes: NDArray[Any], patch: int, seen: tuple[int, int], size: tuple[int, int]) -> NDArray[np.float32]:
    """Boxes (..., 4) in patches as pixels of the image.

    seen: the (height, width) at which the network saw it, before padding; size: its own. The box ends where the image
    does.
    """
    height, width = seen
    clipped = np.minimum(boxes * patch, np.array([width, height, width, height]))
    across, down = size[1] / width, size[0] / height
    return (clipped * np.array([across, down, across, down])).astype(np.float32)
