"""Geometry and colours of the published training pipelines, on uint8 images (3, H, W) and their targets (H, W).

Images are resized bilinearly without antialiasing and targets to the nearest pixel, as OpenCV does it in those.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from eval.dense.metrics import IGNORED

CROPS = 10  # further crops that are drawn while one class fills too much of it
BRIGHTNESS = 32  # of 255, added
FACTORS = (0.5, 1.5)  # of contrast and of saturation
HUE = 36  # degrees, to either side
EDGES = (43, 45, 608, 472)  # left, top, right, bottom of what NYU's frames show inside of their white border
ROTATION = 2.5  # degrees, to either side
GAMMAS, LIGHTS, TINTS = (0.9, 1.1), (0.75, 1.25), (0.9, 1.1)

Rng = np.random.Generator


def size_for(height: int, width: int, short: int) -> tuple[int, int]:
    """The (height, width) whose short side is `short` pixels."""
    factor = short / min(height, width)
    return int(height * factor + 0.5), int(width * factor + 0.5)


def resize_image(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (3, H, W) -> (3, *size)."""
    if tuple(pixels.shape[1:]) == size:
        return pixels
    found = F.interpolate(pixels[None].float().contiguous(), size=size, mode="bilinear")[0]
    return found.round_().clamp_(0, 255).to(torch.uint8)


def resize_target(target: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W) -> size, of any type."""
    rows, columns = (
        (torch.arange(new) * old).div(new, rounding_mode="floor") for new, old in zip(size, target.shape, strict=True)
    )
    return target[rows][:, columns]


def place(pixels: Tensor, target: Tensor, size: tuple[int, int], unknown: float) -> tuple[Tensor, Tensor, Tensor]:
    """Both in the upper left corner of that size, and the (rows, columns) that they fill there."""
    height, width = pixels.shape[1:]
    below, right = size[0] - height, size[1] - width
    return (
        F.pad(pixels, (0, right, 0, below)),
        F.pad(target, (0, right, 0, below), value=unknown),
        torch.tensor([height, width]),
    )


def draw_corner(shape: tuple[int, ...], size: tuple[int, int], rng: Rng) -> tuple[int, int]:
    """Where a crop of at most that size begins (top, left), uniformly."""
    top, left = (
        int(rng.integers(max(0, length - crop) + 1)) for length, crop in zip(shape[-2:], size, strict=True)
    )  # fmt: skip
    return top, left


@dataclass(frozen=True)
class MaskAugmentation:
    """Short side to `short` times a ratio, a crop in which no class fills more than `most`, a flip, other colours."""

    short: int
    ratio: tuple[float, float]
    crop: int
    most: float
    unknown: float = IGNORED

    @property
    def size(self) -> tuple[int, int]:
        return self.crop, self.crop

    def __call__(self, pixels: Tensor, target: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """Of at most `size`."""
        size = size_for(pixels.shape[1], pixels.shape[2], int(self.short * rng.uniform(*self.ratio)))
        target = resize_target(target, size)
        top, left = self._corner(target, rng)
        box = slice(top, top + self.crop), slice(left, left + self.crop)
        pixels, target = resize_image(pixels, size)[:, box[0], box[1]], target[box]
        if rng.random() < 0.5:
            pixels, target = pixels.flip(-1), target.flip(-1)
        return distort(pixels, rng), target

    def _corner(self, target: Tensor, rng: Rng) -> tuple[int, int]:
        for _ in range(CROPS + 1):
            top, left = draw_corner(target.shape, self.size, rng)
            found = target[top : top + self.crop, left : left + self.crop]
            counts = torch.bincount(found[found != IGNORED].long())
            if (counts > 0).sum() > 1 and counts.max() < self.most * counts.sum():
                break
        return top, left


def distort(pixels: Tensor, rng: Rng) -> Tensor:
    """Brightness, contrast, saturation and hue, each half of the time; contrast before or after the last two."""
    image = pixels.permute(1, 2, 0).numpy().astype(np.float32)
    if rng.random() < 0.5:
        image = _as_stored(image + rng.uniform(-BRIGHTNESS, BRIGHTNESS))
    early, contrast = rng.random() < 0.5, rng.uniform(*FACTORS) if rng.random() < 0.5 else 1.0
    if early:
        image = _as_stored(image * contrast)
    image = _recolour(image, rng)
    if not early:
        image = _as_stored(image * contrast)
    return torch.from_numpy(image.astype(np.uint8)).permute(2, 0, 1)


def _as_stored(image: np.ndarray) -> np.ndarray:
    """What 8 bits keep."""
    return np.floor(image.clip(0, 255))


def _recolour(image: np.ndarray, rng: Rng) -> np.ndarray:
    """Saturation and hue, as Pillow counts them."""
    saturation = rng.uniform(*FACTORS) if rng.random() < 0.5 else 1.0
    turn = rng.uniform(-HUE, HUE) if rng.random() < 0.5 else 0.0
    if saturation == 1 and turn == 0:
        return image
    hsv = np.asarray(Image.fromarray(image.astype(np.uint8)).convert("HSV")).astype(np.float32)
    hsv[:, :, 0] = (hsv[:, :, 0] + round(turn * 256 / 360)) % 256
    hsv[:, :, 1] = _as_stored(hsv[:, :, 1] * saturation)
    return np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")).astype(np.float32)


@dataclass(frozen=True)
class DepthAugmentation:
    """A small rotation, a flip and other colours, each half of the time, and a crop of (height, width).

    edges: cut off NYU's border first.
    """

    crop: tuple[int, int]
    edges: bool
    unknown: float = 0.0

    @property
    def size(self) -> tuple[int, int]:
        return self.crop

    def __call__(self, pixels: Tensor, target: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """Of at most `size`."""
        if self.edges:
            left, top, right, bottom = EDGES
            pixels, target = pixels[:, top:bottom, left:right], target[top:bottom, left:right]
        if rng.random() < 0.5:
            pixels, target = rotate(pixels, target, rng.uniform(-ROTATION, ROTATION))
        if rng.random() < 0.5:
            pixels, target = pixels.flip(-1), target.flip(-1)
        top, left = draw_corner(target.shape, self.crop, rng)
        box = slice(top, top + self.crop[0]), slice(left, left + self.crop[1])
        pixels, target = pixels[:, box[0], box[1]], target[box]
        return (tint(pixels, rng) if rng.random() < 0.5 else pixels), target


def rotate(pixels: Tensor, target: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    """About the centre; black and unknown (0) come in at the corners."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    turned = np.array(image.rotate(degrees, Image.Resampling.BILINEAR))
    depth = np.array(Image.fromarray(target.contiguous().numpy()).rotate(degrees, Image.Resampling.NEAREST))
    return torch.from_numpy(turned).permute(2, 0, 1), torch.from_numpy(depth)


def tint(pixels: Tensor, rng: Rng) -> Tensor:
    """Another gamma (of values up to 255, as published, so that it changes the brightness too), light and tint."""
    gamma, light = rng.uniform(*GAMMAS), rng.uniform(*LIGHTS)
    factors = torch.from_numpy(light * rng.uniform(*TINTS, size=3)).float()
    return (pixels.float().pow(gamma) * factors[:, None, None]).clamp_(0, 255).to(torch.uint8)
