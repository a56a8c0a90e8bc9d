"""Where an image lies among its patches, and maps of features of images of any size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.parallel.precision import Precision
from eval.backbone import Backbone
from eval.compute import Fitting, autocast, normalise
from eval.suite import Context


@dataclass(frozen=True)
class Frame:
    """An image in the middle of the next larger one that patches tile."""

    height: int
    width: int
    patch: int

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (down, across)."""
        return -(-self.height // self.patch), -(-self.width // self.patch)

    @property
    def corner(self) -> tuple[int, int]:
        """Pixels (above, left) of the image in the padded one."""
        return (-self.height % self.patch) // 2, (-self.width % self.patch) // 2

    def pad(self, images: Tensor) -> Tensor:
        """(B, C, H, W) with zeros around."""
        (top, left), (rows, columns) = self.corner, self.grid
        below, right = rows * self.patch - self.height - top, columns * self.patch - self.width - left
        return F.pad(images, (left, right, top, below))

    def cut(self, maps: Tensor, every: int = 1) -> Tensor:
        """Maps (B, C, h, w) of the padded image, of any resolution, at the image's pixels: (B, C, H, W), bilinear.

        every: or at every so-manyth pixel, down and across, from the first on.
        """
        sides = zip(self.corner, (self.height, self.width), self.grid, maps.shape[2:], strict=True)
        down, across = (
            bilinear(length, patches * self.patch, torch.arange(first, first + size, every, device=maps.device))
            for first, size, patches, length in sides
        )
        return down @ maps @ across.T


def bilinear(length: int, size: int, wanted: Tensor) -> Tensor:
    """The weights (wanted, length) with which a line of `length` values becomes one of `size`, at wanted places of it.

    As F.interpolate without aligned corners, which would compute all places; and a product has the faster gradient.
    """
    at = ((wanted + 0.5) * (length / size) - 0.5).clamp(0, length - 1)
    return (1 - (at[:, None] - torch.arange(length, device=wanted.device)).abs()).clamp(min=0)


@dataclass
class Maps:
    """Class token and patch tokens (B, L, 1 + N, D) of L blocks, fp32, of images of the same size."""

    tokens: Tensor
    frame: Frame

    def __len__(self) -> int:
        return len(self.tokens)


class Mapper:
    """Puts images of any size through a network."""

    def __init__(
        self,
        backbone: Backbone,
        blocks: list[int],
        context: Context,
        *,
        norm: bool,
        most: int,
        precision: Precision,
    ) -> None:
        self.backbone, self.blocks, self.norm = backbone, blocks, norm
        self.device, self.precision = context.device, precision
        self._fitting = Fitting(most, context.say)

    def __call__(self, pixels: Tensor, sizes: Tensor | None = None) -> Maps:
        """pixels: (B, 3, H, W) in 0..255. sizes: (B, 2), rows and columns that are image; the rest is made zeros."""
        images = normalise(pixels.to(self.device, non_blocking=True), self.backbone)
        for image, (height, width) in zip(images, sizes.tolist() if sizes is not None else [], strict=False):
            image[:, height:] = 0
            image[:, :, width:] = 0
        frame = Frame(pixels.shape[2], pixels.shape[3], self.backbone.patch_size)
        return Maps(torch.cat(self._fitting(self._once, frame.pad(images))), frame)

    @torch.no_grad()
    def _once(self, images: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            layers = self.backbone.layers(images, self.blocks, norm=self.norm)
        return torch.stack([torch.cat([t.cls[:, None], t.patches], dim=1) for t in layers], dim=1).float()
