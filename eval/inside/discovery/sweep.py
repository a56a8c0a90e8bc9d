"""LOST on every chosen block, feature and bias of an image while its features are in hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoreg.parallel.precision import Precision
from eval.backbone import Backbone
from eval.compute import autocast, normalise
from eval.inside.discovery.images import Sight
from eval.inside.discovery.lost import Maps, boxes_around, expand, gram
from eval.inside.discovery.rules import centre, minus_mean, unit
from eval.inside.walk import walk


@dataclass(frozen=True)
class Found:
    """Boxes of B images for L blocks, F features and S = biases + 2 ways to set the bias.

    boxes: int32 (B, L, F, S, 4), in patches; outside: bool (B, L, F, S), where the seed was outside of its mask. The
    last two of the S are the rules without labels: minus the mean, and centred. apart: fp64 (B, L, F, 2), summed
    distances from the image's mean, of patches that stand out and of all others; loud: int64 (B, L), how many do.
    """

    boxes: NDArray[np.int32]
    outside: NDArray[np.bool_]
    apart: NDArray[np.float64]
    loud: NDArray[np.int64]


@dataclass(frozen=True)
class Scale:
    """How large things are in a network: what biases are multiples of, and from which norm on a patch stands out.

    lengths: fp64 (L, F), mean squared length of features; cutoffs: fp64 (L,), mean norm of the tokens that enter a
    block plus three standard deviations. Both are measured without labels.
    """

    lengths: Tensor
    cutoffs: Tensor


@dataclass(frozen=True)
class Featured:
    """One feature of one block: their places in what is tried.

    patches: (B, N, D), fp32; norms: (B, N), fp32, of the tokens as they enter the block.
    """

    block: int
    kind: int
    patches: Tensor
    norms: Tensor


class Sweep:
    """A network with the blocks and features ("q", "k", "v") of it that are tried."""

    def __init__(
        self,
        backbone: Backbone,
        blocks: Sequence[int],
        features: Sequence[str],
        sight: Sight,
        *,
        company: int,
        unit_length: bool,
        precision: Precision,
    ) -> None:
        self.backbone, self.blocks, self.names, self.sight = backbone, blocks, features, sight
        self.company, self.unit_length, self.precision = company, unit_length, precision

    def __call__(self, pixels: Tensor, biases: Tensor, cutoffs: Tensor) -> Found:
        """pixels: uint8 (B, 3, h, w), as seen; biases: (L, F, S - 2); cutoffs: (L,), see Scale; all on the device."""
        grid = self.sight.grid((pixels.shape[2], pixels.shape[3]))
        shape = len(pixels), len(self.blocks), len(self.names), biases.shape[2] + 2
        boxes, outside = np.zeros((*shape, 4), np.int32), np.zeros(shape, bool)
        apart, loud = np.zeros((*shape[:3], 2)), np.zeros(shape[:2], np.int64)
        for each in self.features(pixels):
            at = (slice(None), each.block, each.kind)
            maps = self.maps(each.patches, biases[each.block, each.kind])
            boxes[at], outside[at] = boxes_around(maps.masks, maps.seeds, grid)
            standing = each.norms > cutoffs[each.block]
            apart[at], loud[:, each.block] = _apart(each.patches, standing), standing.sum(1).cpu().numpy()
        return Found(boxes, outside, apart, loud)

    def maps(self, patches: Tensor, biases: Tensor) -> Maps:
        """LOST with these biases (S - 2,) and by the two rules, of patches (B, N, D)."""
        products = gram(patches)
        tried = torch.cat([biases.expand(len(patches), -1), minus_mean(products)], dim=1)
        told = expand(products, tried, self.company)
        centred = gram(centre(patches))
        other = expand(centred, torch.zeros_like(tried[:, :1]), self.company)
        return Maps(*(torch.cat(pair, dim=1) for pair in zip(vars(told).values(), vars(other).values(), strict=True)))

    def moments(self, pixels: Tensor) -> Tensor:
        """Means over the patches of images (B, 3, h, w), fp64 on the host: (L, F + 2).

        Of the squared length of each feature; of the norm of entering tokens, and of its square.
        """
        found = torch.zeros(len(self.blocks), len(self.names) + 2, dtype=torch.float64)
        for each in self.features(pixels):
            norms = each.norms.double()
            found[each.block, each.kind] = each.patches.double().square().sum(-1).mean().cpu()
            found[each.block, -2:] = torch.stack([norms.mean(), norms.square().mean()]).cpu()
        return found

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Iterator[Featured]:
        """Heads side by side, biases in, unscaled, without class token and registers."""
        images = self.sight.pad(normalise(pixels, self.backbone))
        first = 1 + self.backbone.num_registers
        steps = walk(self.backbone.model, images)
        for _ in range(max(self.blocks) + 1):
            with autocast(pixels.device, self.precision):
                step = next(steps)
                if step.index not in self.blocks:
                    continue
                parts = dict(zip("qkv", step.query_key_value(), strict=True))
            norms = step.entering[:, first:].float().norm(dim=-1)
            for place, name in enumerate(self.names):
                patches = parts[name][:, :, first:].transpose(1, 2).flatten(2).float()
                if self.unit_length:
                    patches = unit(patches)
                yield Featured(self.blocks.index(step.index), place, patches, norms)


def _apart(patches: Tensor, standing: Tensor) -> NDArray[np.float64]:
    """(B, 2): distances from the mean of (B, N, D), summed over patches that stand out (B, N) and over the others."""
    distances = centre(patches).norm(dim=-1).double()
    return torch.stack([(distances * standing).sum(1), (distances * ~standing).sum(1)], dim=1).cpu().numpy()
