"""Other libraries' models with random weights, for comparison. No weights are downloaded."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

_declarations: list[torch.library.Library] = []  # a declaration lives as long as its Library


def allow_torchvision() -> None:
    """Make `import torchvision` pass beside a torch without its C++ operators; timm and transformers import it."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declarations.append(library)
    except ImportError:
        pass


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
    pytest.importorskip("timm")
    allow_torchvision()
    import timm

    return randomise(timm.create_model(name, pretrained=False, num_classes=0, **options))
