"""The features that classifiers see, by name, of a batch of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.parallel.precision import Precision
from eval.backbone import Backbone
from eval.compute import Fitting, autocast, normalise
from eval.suite import Context

PATCH_MEAN = "patch-mean"  # the mean of the last block's patch tokens, final-normed


def cls_of(block: int) -> str:
    """The feature that is the class token after the block-th block from the end (1 is the last), final-normed."""
    return f"cls-{block}"


class Forward:
    """Puts uint8 images through a network, in as many passes as memory asks for."""

    def __init__(
        self, backbone: Backbone, names: Sequence[str], context: Context, most: int, precision: Precision
    ) -> None:
        self.backbone, self.names, self.device, self.precision = backbone, list(names), context.device, precision
        blocks = {1 if name == PATCH_MEAN else int(name.partition("-")[2]) for name in names}
        self.blocks = sorted(blocks)
        if self.blocks[-1] > backbone.depth:
            raise ConfigError(f"{self.blocks[-1]} last blocks are asked of a network of {backbone.depth}", "layers")
        self._fitting = Fitting(most, context.say)

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 (B, C, H, W) -> fp32 (B, D) by name, on the device."""
        parts = self._fitting(self._once, pixels)
        return {name: torch.cat([part[name] for part in parts]) for name in self.names}

    @torch.no_grad()
    def _once(self, pixels: Tensor) -> dict[str, Tensor]:
        images = normalise(pixels.to(self.device, non_blocking=True), self.backbone)
        with autocast(self.device, self.precision):
            layers = self.backbone.layers(images, [-block for block in self.blocks])
        found = {cls_of(block): tokens.cls for block, tokens in zip(self.blocks, layers, strict=True)}
        if PATCH_MEAN in self.names:
            found[PATCH_MEAN] = layers[0].patches.float().mean(1)
        return {name: found[name].float() for name in self.names}
