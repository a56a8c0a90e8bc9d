"""AdamW with DINOv2's per-parameter rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class OptimConfig:
    """Learning rate, weight decay and their rules. Durations: '10 epochs', '5000 steps', '1e6 images' or a fraction."""

    lr: float = 4e-3  # peak, at `lr_reference_batch` images
    lr_scaling: Literal["sqrt", "linear", "none"] = "sqrt"  # with train.batch_size / lr_reference_batch
    lr_reference_batch: int = 1024
    lr_end: float = 1e-6
    warmup: int | float | str = 0.1
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 0.9  # learning rate of block i is multiplied by layer_decay ** (depth - i)
    patch_embed_lr: float = 0.2  # extra factor for the patch embedding
    decay_tokens: bool = True  # DINOv2 decays class, register, mask tokens and positions; timm does not
    decay_prototype_scale: bool = True  # DINOv2 decays weight_g of the heads
    freeze_last_layer: int | float | str = 0.01  # prototypes keep still for this long
    clip: float = 3.0  # gradient norm; 0 turns clipping off
    clip_per_module: bool = True  # backbone and heads clipped each on its own, as DINOv2 does
