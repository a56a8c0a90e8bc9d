"""Photometric augmentation: parameters drawn on the host, applied to batches on the device."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class PhotometricConfig:
    """DINOv2's colour recipe. Triples are (first global crop, second global crop, local crops)."""

    jitter: float = 0.8  # probability that a crop is jittered at all
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grey: float = 0.2  # probability
    # The released code passed 1 - p to its blur, so what trained the public weights is (0, 0.9, 0.5);
    # the paper's intention was (1.0, 0.1, 0.5).
    blur: tuple[float, float, float] = (0.0, 0.9, 0.5)  # probability
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarise: tuple[float, float, float] = (0.0, 0.2, 0.0)  # probability; inverts values >= 128
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])  # one per channel, in [0, 1]
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
