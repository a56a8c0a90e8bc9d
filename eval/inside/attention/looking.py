"""What a batch's attention is, and what is noted of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dinoreg.models.vit import VisionTransformer
from eval.inside.attention.measures import (
    central_patch,
    cosine,
    entropy,
    jensen_shannon,
    mass_on,
    mean_of_pairs,
    normalised,
    peak,
)
from eval.inside.walk import walk

ON_PATCHES, ENTROPY, HEAD_ENTROPY, LOG_PEAK, OUTLIER_MASS = range(5)  # columns of what is noted of each token
CLS_COSINE, COSINE, CLS_DIVERGENCE, DIVERGENCE = range(4)  # of what is noted of pairs


@dataclass
class Attended:
    """weights: attention (B, heads, Q, N), fp32, of CLS, of each register and of the central patch, to the patches.
    What a row lacks to 1 went to CLS and the registers. norms: of the patch tokens, (B, N)."""

    weights: Tensor
    norms: Tensor


def attend(model: VisionTransformer, images: Tensor, layer: int, norm_layer: int) -> Attended:
    """The attention in block `layer`; norms in the residual stream after block `norm_layer`. Images: (B, C, H, W)."""
    first, grid = 1 + model.num_registers, tuple(side // model.patch_size for side in images.shape[-2:])
    row, column = central_patch((grid[0], grid[1]))
    centre = first + row * grid[1] + column
    kept: dict[str, Tensor] = {}
    for step in walk(model, images):
        if step.index == layer:
            rows = [step.attention(slice(0, first)), step.attention(slice(centre, centre + 1))]
            kept["weights"] = torch.cat(rows, dim=2)[..., first:].float()
        if step.index == norm_layer:
            kept["norms"] = step.leaving[:, first:].float().norm(dim=-1)
        if len(kept) == 2:
            break
    return Attended(**kept)


@dataclass
class Noted:
    """Of a batch. tokens: (B, Q, 5), of the mean over heads; heads: (B, heads, 4), of CLS, without HEAD_ENTROPY, in the
    same order; pairs: (B, 4), means over pairs of CLS and registers; outliers: (B,), how many patches are outliers;
    similarities: (2, Q - 1, Q - 1), sums over the batch of cosine and Jensen-Shannon divergence; average: (Q, N), sum
    of the weights, averaged over heads."""

    tokens: Tensor
    heads: Tensor
    pairs: Tensor
    outliers: Tensor
    similarities: Tensor
    average: Tensor


def note(weights: Tensor, outliers: Tensor) -> Noted:
    """weights: as in `Attended`; outliers: bool (B, N).

    All figures are of the distribution over patches, which is what is left where the other tokens are taken out.
    """
    mean = weights.mean(1)
    spread, by_head = normalised(mean), normalised(weights)
    columns = [mean.sum(-1), entropy(spread), entropy(by_head).mean(1), peak(spread).log(), mass_on(spread, outliers)]
    cls = by_head[:, :, 0]
    of_heads = [weights[:, :, 0].sum(-1), entropy(cls), peak(cls).log(), mass_on(cls, outliers)]
    no_place = spread[:, :-1]
    alike, apart = cosine(no_place), jensen_shannon(no_place)
    pairs = torch.stack([*mean_of_pairs(alike), *mean_of_pairs(apart)], dim=-1)
    return Noted(
        torch.stack(columns, dim=-1),
        torch.stack(of_heads, dim=-1),
        pairs,
        outliers.sum(-1),
        torch.stack([alike.double().sum(0), apart.double().sum(0)]),
        mean.double().sum(0),
    )
