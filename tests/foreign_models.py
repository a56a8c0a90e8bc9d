"""Other libraries' models with random weights, for comparison. No weights are downloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.foreign import allow_torchvision


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter with numbers large enough that a misplaced one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = "norm" in name and name.endswith("weight")
            scale = 0.3 / max(1.0, parameter[0].numel() ** 0.5 / 4) if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + gain)
    return model.eval()


def huggingface(registers: int | None, swiglu: bool = False, dim: int = 32, heads: int = 2, **more: Any) -> nn.Module:
    """Dinov2WithRegistersModel, or Dinov2Model where `registers` is None, small and random."""
    pytest.importorskip("transformers")
    allow_torchvision()
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    options: dict[str, Any] = {
        "hidden_size": dim, "num_hidden_layers": 3, "num_attention_heads": heads, "image_size": 28, "patch_size": 7,
        "use_swiglu_ffn": swiglu, "layerscale_value": 0.5, "mlp_ratio": 4, **more,
    }  # fmt: skip
    if registers is None:
        return randomise(Dinov2Model(Dinov2Config(**options)))
    return randomise(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=registers, **options)))


def timm_model(name: str, **options: Any) -> nn.Module:
    """A timm model, random."""
    allow_torchvision()  # first: timm imports it at once
    pytest.importorskip("timm")
    import timm

    return randomise(timm.create_model(name, pretrained=False, num_classes=0, **options))


def transformers_model(kind: str, dim: int = 32, heads: int = 2, **more: Any) -> nn.Module:
    """A model of transformers called `kind`, as in "ViT" or "DINOv3ViT", with its kind's config, small and random."""
    transformers = pytest.importorskip("transformers")
    allow_torchvision()
    options: dict[str, Any] = {
        "hidden_size": dim, "num_hidden_layers": 3, "num_attention_heads": heads, "intermediate_size": 4 * dim,
        "image_size": 28, "patch_size": 7, **more,
    }  # fmt: skip
    family = next(name for name in ("DINOv3ViT", "CLIPVision", "CLIP", "ViT") if kind.startswith(name))
    config = getattr(transformers, f"{family}Config")
    if family == "CLIP":
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        ids = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
        return randomise(getattr(transformers, kind)(config(vision_config=options, text_config={**text, **ids})))
    return randomise(getattr(transformers, kind)(config(**options)))


def openclip_tower(**more: Any) -> nn.Module:
    """OpenCLIP's own image tower, small and random."""
    allow_torchvision()
    transformer = pytest.importorskip("open_clip.transformer")
    options = {"image_size": 28, "patch_size": 7, "width": 192, "layers": 3, "heads": 3, "mlp_ratio": 2.0, **more}
    return randomise(transformer.VisionTransformer(output_dim=16, output_tokens=True, **options))
