"""LOST on every chosen block, feature and bias of an image while its features are in hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.backbone import Backbone
from eval.compute import Precision, autocast, normalise
from eval.inside.discovery.images import Sight
from eval.inside.discovery.lost import Maps, boxes_around, expand, gram
from eval.inside.discovery.rules import centre, minus_mean, unit
from eval.inside.walk import walk


@dataclass(frozen=True)
class Found:
    """Boxes of B images for L blocks, F features and S = biases + 2 ways to set the bias.

    boxes: int32 (B, L, F, S, 4), in patches; outside: bool (B, L, F, S), where the seed was outside of its mask. The
    last two of the S are the rules without labels: minus the mean, and centred.
    """

    boxes: NDArray[np.int32]
    outside: NDArray[np.bool_]


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

    def __call__(self, pixels: Tensor, biases: Tensor) -> Found:
        """pixels: uint8 (B, 3, h, w) on the device, as seen; biases: (L, F, S - 2) on the device."""
        grid = self.sight.grid((pixels.shape[2], pixels.shape[3]))
        shape = len(pixels), len(self.blocks), len(self.names), biases.shape[2] + 2
        boxes, outside = np.zeros((*shape, 4), np.int32), np.zeros(shape, bool)
        for block, kind, patches in self.features(pixels):
            maps = self.maps(patches, biases[block, kind])
            boxes[:, block, kind], outside[:, block, kind] = boxes_around(maps.masks, maps.seeds, grid)
        return Found(boxes, outside)

    def maps(self, patches: Tensor, biases: Tensor) -> Maps:
        """LOST with these biases (S - 2,) and by the two rules, of patches (B, N, D)."""
        products = gram(patches)
        tried = torch.cat([biases.expand(len(patches), -1), minus_mean(products)], dim=1)
        told = expand(products, tried, self.company)
        centred = gram(centre(patches))
        other = expand(centred, torch.zeros_like(tried[:, :1]), self.company)
        return Maps(*(torch.cat(pair, dim=1) for pair in zip(vars(told).values(), vars(other).values(), strict=True)))

    def lengths(self, pixels: Tensor) -> Tensor:
        """The mean squared length of the patches of images (B, 3, h, w), in fp64 on the host: (L, F)."""
        found = torch.zeros(len(self.blocks), len(self.names), dtype=torch.float64)
        for block, kind, patches in self.features(pixels):
            found[block, kind] = patches.double().square().sum(-1).mean().cpu()
        return found

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """The places of a block and of a feature in what is tried, and the patches (B, N, D) of it, fp32.

        Heads side by side, biases in, unscaled, without class token and registers.
        """
        images = self.sight.pad(normalise(pixels, self.backbone))
        first = 1 + self.backbone.num_registers
        steps = walk(self.backbone.model, images)
        for _ in range(max(self.blocks) + 1):
            with autocast(pixels.device, self.precision):
                step = next(steps)
                if step.index not in self.blocks:
                    continue
                parts = dict(zip("qkv", step.query_key_value(), strict=True))
            for place, name in enumerate(self.names):
                patches = parts[name][:, :, first:].transpose(1, 2).flatten(2).float()
                yield self.blocks.index(step.index), place, unit(patches) if self.unit_length else patches
