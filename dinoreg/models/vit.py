"""The vision transformer with registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class ModelConfig:
    """Architecture of the backbone; student and teacher share it."""

    arch: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_so400m", "vit_giant"] = "vit_small"
    embed_dim: int | None = None  # overrides the width of `arch`
    depth: int | None = None  # overrides the number of blocks of `arch`
    num_heads: int | None = None  # overrides the attention heads of `arch`
    patch_size: int = 14
    image_size: int = 224  # pixels; the learnt position grid is image_size / patch_size on each side
    in_channels: int = 3
    num_registers: int = 4
    ffn: Literal["mlp", "swiglu"] = "mlp"
    layerscale: float = 1e-5  # initial gain of each residual branch; 0 leaves LayerScale out
    drop_path: float = 0.0  # share of rows whose residual branch is skipped, student only
    drop_path_shape: Literal["uniform", "linear"] = "uniform"  # same rate in each block, or 0 rising to drop_path
    pos_antialias: bool = True  # resample position embeddings with antialiasing (registers paper, appendix A)
    pos_offset: float = 0.0  # DINOv2 without registers resampled with 0.1
    init_from: str | None = None  # weights to start from: file, Hugging Face folder, timm or DINOv2 state dict
