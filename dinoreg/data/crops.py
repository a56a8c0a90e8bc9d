"""Crop geometry: from one decoded image to uint8 crops."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.data.images import Picture

TRIES = 10  # boxes drawn for a crop before it falls back to the centre, as in torchvision's RandomResizedCrop


@dataclass
class CropConfig:
    """Multi-crop geometry (SwAV, section 3.3; values of DINOv2). Scales are shares of the image's area."""

    global_size: int = 224  # pixels
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_count: int = 8
    local_size: int = 98  # pixels
    local_scale: tuple[float, float] = (0.05, 0.32)
    aspect: tuple[float, float] = (0.75, 4 / 3)  # width / height, drawn log-uniformly
    flip: float = 0.5  # probability of a horizontal flip

    def check(self) -> None:
        """Raises ConfigError on a geometry that no crop can have."""
        for key in ("global_size", "local_size"):
            if getattr(self, key) < 1:
                raise ConfigError("must be at least one pixel", key=key)
        for key in ("global_scale", "local_scale"):
            low, high = getattr(self, key)
            if not 0 < low <= high <= 1:
                raise ConfigError("must be 0 < low <= high <= 1, shares of the image's area", key=key)
        if self.local_count < 0:
            raise ConfigError("must not be negative", key="local_count")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ConfigError("must be 0 < low <= high", key="aspect")
        if not 0 <= self.flip <= 1:
            raise ConfigError("must be a probability, between 0 and 1", key="flip")


@dataclass
class Boxes:
    """Where the 2 + L crops of one image are cut. boxes: int (2 + L, 4) of left, top, width, height."""

    boxes: NDArray[np.int64]
    flips: NDArray[np.bool_]


def draw_boxes(cfg: CropConfig, rng: np.random.Generator, width: int, height: int) -> Boxes:
    """Random resized crops, global ones first: area uniform in the scale, aspect log-uniform, place uniform."""
    crops = 2 + cfg.local_count
    u = rng.random((crops, 2 * TRIES + 3))
    scale = np.array([cfg.global_scale] * 2 + [cfg.local_scale] * cfg.local_count)
    low, high = np.log(cfg.aspect)
    areas = width * height * (scale[:, :1] + (scale[:, 1:] - scale[:, :1]) * u[:, :TRIES])
    aspects = np.exp(low + (high - low) * u[:, TRIES : 2 * TRIES])
    w = np.rint(np.sqrt(areas * aspects)).astype(np.int64)
    h = np.rint(np.sqrt(areas / aspects)).astype(np.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(1)
    rows = np.arange(crops)
    w, h = w[rows, first], h[rows, first]
    place = u[:, 2 * TRIES : 2 * TRIES + 2]
    left = (place[:, 0] * (width - w + 1)).astype(np.int64)
    top = (place[:, 1] * (height - h + 1)).astype(np.int64)
    boxes = np.stack([left, top, w, h], axis=1)
    boxes[~fits.any(1)] = _centre(cfg, width, height)
    return Boxes(boxes, u[:, -1] < cfg.flip)


def _centre(cfg: CropConfig, width: int, height: int) -> tuple[int, int, int, int]:
    """The largest centred box whose aspect is allowed: what remains for very long images."""
    w, h = width, height
    if width / height < cfg.aspect[0]:
        h = max(1, round(width / cfg.aspect[0]))
    elif width / height > cfg.aspect[1]:
        w = max(1, round(height * cfg.aspect[1]))
    return (width - w) // 2, (height - h) // 2, w, h


def allowed_shrink(cfg: CropConfig, boxes: NDArray[np.int64]) -> int:
    """The largest of 1, 2, 4, 8 by which the image may be decoded smaller without any crop being enlarged for it."""
    sizes = np.array([cfg.global_size] * 2 + [cfg.local_size] * cfg.local_count)
    room = float((boxes[:, 2:] / sizes[:, None]).min())
    return max(shrink for shrink in (1, 2, 4, 8) if shrink == 1 or shrink <= room)


def cut(cfg: CropConfig, picture: Picture, rng: np.random.Generator, global_out: Tensor, local_out: Tensor) -> None:
    """Draws the crops of one image and writes them to uint8 (2, C, Hg, Wg) and (L, C, Hl, Wl). Raises BadImage."""
    drawn = draw_boxes(cfg, rng, picture.width, picture.height)
    shrink = allowed_shrink(cfg, drawn.boxes)
    pixels = picture.decode(shrink)
    shrunk = pixels.shape[2] < picture.width  # only JPEGs are
    boxes = (_shrink(drawn.boxes, shrink, pixels) if shrunk else drawn.boxes).tolist()
    for i, (box, flip) in enumerate(zip(boxes, drawn.flips.tolist(), strict=True)):
        out = global_out[i] if i < 2 else local_out[i - 2]
        crop = resize_box(pixels, box, out.shape[1])
        out.copy_(crop.flip(-1) if flip else crop)


def _shrink(boxes: NDArray[np.int64], shrink: int, pixels: Tensor) -> NDArray[np.int64]:
    """Boxes of the full image in the pixels of its smaller decoding, to the nearest pixel.

    One pixel there is exactly `shrink` of the image's; a last one that is not filled does not change the ratio.
    """
    limit = np.array([pixels.shape[2], pixels.shape[1]])
    start = np.minimum(np.rint(boxes[:, :2] / shrink).astype(np.int64), limit - 1)
    size = np.clip(np.rint(boxes[:, 2:] / shrink).astype(np.int64), 1, limit - start)
    return np.concatenate([start, size], axis=1)


def resize_box(pixels: Tensor, box: list[int], size: int) -> Tensor:
    """The box (left, top, width, height) of uint8 (C, H, W) as (C, size, size): bicubic, antialiased, as Pillow does.

    torch's kernel for interleaved uint8 is several times faster than Pillow's; 99.99 % of the values agree within 1 of
    255 (benchmarks/data.py prints both; the rest lie at sharp edges, where both clip between the two passes). The
    explicit copy to that layout costs less than the kernel's strided path.
    """
    left, top, width, height = box
    view = pixels[None, :, top : top + height, left : left + width]
    view = view.contiguous(memory_format=torch.channels_last)
    return F.interpolate(view, size=(size, size), mode="bicubic", antialias=True)[0]
