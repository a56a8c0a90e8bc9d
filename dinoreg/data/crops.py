"""Crop geometry: from one decoded image to uint8 crops."""

from __future__ import annotations

from dataclasses import dataclass


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
