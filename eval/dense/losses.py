"""Losses of masks and depth maps, per image sizes that differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.dense.metrics import IGNORED

EPSILON = 1e-3  # metres, added before logarithms
MEAN_WEIGHT = 0.15  # of the squared mean of the error in the logarithm, beside its variance
SCALES = (1, 2, 4, 6)  # every so-manyth pixel is looked at by the gradient loss
TINY = 1e-12  # below the square root, whose slope at zero is infinite


def mask_loss(logits: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Cross entropy of (B, K, H, W) and (B, H, W): its sum over the pixels that count, by the number of ALL pixels.

    As mmsegmentation does it: an image half of which is ignored counts half.
    """
    pairs = zip(logits, targets, strict=True)
    sums = [F.cross_entropy(some, truth.long(), ignore_index=IGNORED, reduction="sum") for some, truth in pairs]
    return torch.stack(sums).sum() / sum(truth.numel() for truth in targets)


def log_errors(predicted: Sequence[Tensor], truth: Sequence[Tensor]) -> list[Tensor]:
    """log of prediction by truth, a map for each image; 0 where the truth is unknown (0)."""
    return [
        ((p + EPSILON).log() - (t + EPSILON).log()) * (t > 0) for p, t in zip(predicted, truth, strict=True)
    ]  # fmt: skip


def scale_invariant_loss(errors: Sequence[Tensor], truth: Sequence[Tensor], warming_up: bool = False) -> Tensor:
    """sqrt(var(g) + 0.15 mean(g)^2) over all known pixels of some images together (SigLoss; Eigen et al. 2014).

    warming_up: the mean alone. Zero where not a pixel is known.
    """
    g = torch.cat([error[t > 0] for error, t in zip(errors, truth, strict=True)])
    if len(g) < 2:
        return sum((error.sum() for error in errors), torch.zeros((), device=g.device)) * 0
    squared = MEAN_WEIGHT * g.mean().square()
    return (squared if warming_up else squared + g.var()).clamp(min=TINY).sqrt()


def gradient_loss(errors: Sequence[Tensor], truth: Sequence[Tensor]) -> Tensor:
    """Differences of the log errors (H, W) of pixels two apart, down and across, by the number of known pixels.

    Summed over scales, at each of which every so-manyth pixel is left (Li and Snavely 2018, MegaDepth).
    """
    total = errors[0].new_zeros(())
    for every in SCALES:
        parts = [
            _differences(error[::every, ::every], t[::every, ::every] > 0)
            for error, t in zip(errors, truth, strict=True)
        ]
        known = torch.stack([(t[::every, ::every] > 0).sum() for t in truth]).sum()
        total = total + torch.stack(parts).sum() / known.clamp(min=1)
    return total


def _differences(error: Tensor, known: Tensor) -> Tensor:
    down = (error[2:] - error[:-2]).abs() * (known[2:] & known[:-2])
    across = (error[:, 2:] - error[:, :-2]).abs() * (known[:, 2:] & known[:, :-2])
    return down.sum() + across.sum()
