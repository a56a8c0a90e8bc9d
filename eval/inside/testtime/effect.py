"""What a network does with its outliers, image by image, with and without test-time registers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.backbone import Backbone
from eval.inside.frozen import Frozen
from eval.inside.walk import walk

EDGES = torch.logspace(-1, 5, 241)  # of histograms of norms: 40 bins for each power of ten


@dataclass
class Effect:
    """What one batch shows. Registers' columns are not numbers where there are none.

    share: (B, 2), of the patches beyond the cutoff after the block where outliers are told, and after the last one.
    norm: (B, 4), of CLS, registers (mean), patches (mean) and the longest patch after the former block. mass: (B, 4),
    the attention of CLS in the last block, a mean over heads, on itself, on registers, on patches that are outliers in
    the plain network, on all other patches. cls: (B, D) after the final norm. counts: (3, bins), norms of CLS,
    registers and patches after the block where outliers are told.
    """

    share: Tensor
    norm: Tensor
    mass: Tensor
    cls: Tensor
    counts: Tensor


def effect(backbone: Backbone, images: Tensor, outliers: Tensor, detect: int, cutoff: float) -> Effect:
    """images (B, C, H, W); outliers: bool (B, N), of the plain network."""
    first = 1 + backbone.num_registers
    for step in walk(backbone.model, images):
        if step.index == detect:
            norms = step.leaving.float().norm(dim=-1)  # (B, T)
    last = step.leaving.float().norm(dim=-1)
    rows = step.attention(slice(0, 1))[:, :, 0].mean(1)  # (B, T)
    share = torch.stack([(each[:, first:] > cutoff).float().mean(1) for each in (norms, last)], dim=1)
    cls, registers, patches = norms[:, 0], norms[:, 1:first], norms[:, first:]
    norm = torch.stack([cls, registers.mean(1), patches.mean(1), patches.amax(1)], dim=1)
    to_patches = rows[:, first:]
    to_registers = rows[:, 1:first].sum(1) if first > 1 else torch.full_like(cls, torch.nan)
    mass = [rows[:, 0], to_registers, (to_patches * outliers).sum(1), (to_patches * ~outliers).sum(1)]
    counts = torch.stack([histogram(each) for each in (cls, registers, patches)])
    return Effect(share, norm, torch.stack(mass, dim=1), backbone.model.norm(step.leaving[:, 0]).float(), counts)


def histogram(norms: Tensor) -> Tensor:
    """Counts in the bins between EDGES, int64 (bins,); what lies beyond counts in the first and the last."""
    edges = EDGES.to(norms.device)
    at = torch.bucketize(norms.flatten().contiguous(), edges[1:-1].contiguous())
    return torch.bincount(at, minlength=len(edges) - 1)


def rows_of(found: Effect, plain: Tensor, frozen: Frozen | None, labels: Tensor) -> Tensor:
    """One row an image (B, 12), on the host: share, norm, mass, cosine of CLS with `plain` (B, D), and whether the
    frozen classifier is right (not a number where there is none)."""
    cosine = torch.cosine_similarity(found.cls, plain, dim=1)[:, None]
    right = torch.full_like(cosine, torch.nan)
    if frozen is not None:
        right = (frozen.predict(found.cls).cpu() == labels).float()[:, None].to(cosine.device)
    return torch.cat([found.share, found.norm, found.mass, cosine, right], dim=1).double().cpu()


COLUMNS = (
    "share", "share_last", "norm_cls", "norm_registers", "norm_patches", "norm_longest", "mass_cls", "mass_registers",
    "mass_outliers", "mass_others", "cosine", "right",
)  # fmt: skip
