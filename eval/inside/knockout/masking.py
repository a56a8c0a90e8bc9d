"""Is the attention map a map of what matters? Patches are greyed, and the change of CLS is measured (D4)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

ClsOf = Callable[[Tensor], Tensor]  # images (B, C, H, W), normalised -> (B, D)


def greyed(images: Tensor, hidden: Tensor, patch: int) -> Tensor:
    """Images (B, C, H, W), normalised, whose patches `hidden`, bool (B, N), have the mean colour of training images."""
    high, wide = images.shape[-2] // patch, images.shape[-1] // patch
    mask = hidden.unflatten(1, (high, wide)).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return images.masked_fill(mask[:, None], 0.0)


def deletion(cls_of: ClsOf, images: Tensor, order: Tensor, steps: int, patch: int) -> Tensor:
    """1 - cosine between CLS of the images and of what is left of them: (B, steps + 1).

    order: (B, N), patches in the order in which they are greyed; after step s it is s / steps of them.
    """
    count = order.shape[1]
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(count, device=order.device).expand_as(order))
    plain = cls_of(images)
    changes = [torch.zeros_like(plain[:, 0])]
    for step in range(1, steps + 1):
        left = cls_of(greyed(images, rank < round(count * step / steps), patch))
        changes.append(1 - torch.cosine_similarity(left, plain, dim=1))
    return torch.stack(changes, dim=1)


def random_orders(places: Tensor, count: int, draw: int) -> Tensor:
    """(B, count) permutations that depend on the image and the draw alone."""
    return torch.stack(
        [
            torch.randperm(count, generator=torch.Generator().manual_seed(int(place) * 1009 + draw))
            for place in places
        ]
    )  # fmt: skip


def area(curve: Tensor) -> Tensor:
    """Under curves (..., steps + 1) over shares from 0 to 1, by trapezoids."""
    return torch.trapezoid(curve, dx=1 / (curve.shape[-1] - 1), dim=-1)


def insertion(deleted: Tensor) -> Tensor:
    """Likeness while patches appear, from the curve of the opposite order in which they vanish: (B, steps + 1)."""
    return 1 - deleted.flip(-1)


def leave_one_out(cls_of: ClsOf, image: Tensor, patch: int, at_once: int) -> Tensor:
    """1 - cosine of CLS when one patch is greyed, for each: (N,). image: (C, H, W)."""
    count = (image.shape[-2] // patch) * (image.shape[-1] // patch)
    plain = cls_of(image[None])
    each = torch.eye(count, dtype=torch.bool, device=image.device)
    changes = [
        1 - torch.cosine_similarity(cls_of(greyed(image.expand(len(hidden), -1, -1, -1), hidden, patch)), plain, dim=1)
        for hidden in each.split(at_once)
    ]
    return torch.cat(changes)


def rank_correlation(one: Tensor, other: Tensor) -> float | None:
    """Spearman's, ties at their mean rank; None where either is constant."""
    first, second = (_ranks(each) for each in (one, other))
    if first.std() == 0 or second.std() == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: Tensor) -> np.ndarray:
    _, where, counts = np.unique(values.double().cpu().numpy(), return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts - 1) / 2)[where]
