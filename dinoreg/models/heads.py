"""Projection heads onto prototypes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class HeadConfig:
    """An MLP, L2-normalised, against unit-norm prototypes (DINO, section 3.2)."""

    prototypes: int = 65536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    layers: int = 3
    train_scale: bool = True  # DINOv2 leaves each prototype's length (weight_g) trainable; DINO froze it at 1
