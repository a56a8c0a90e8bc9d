"""timm's vision transformers, in files and in folders with a config.json."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dinoreg.models.foreign.checkpoint import Checkpoint, demand, rename
from dinoreg.models.foreign.dino import with_class_position, without_class_position
from dinoreg.models.formats import Weights, WeightsError
from dinoreg.models.vit import ModelConfig, VisionTransformer


def owns(found: Checkpoint) -> bool:
    """Whether the patch embedding has timm's name, as in many libraries: this one is asked last."""
    return "patch_embed.proj.weight" in found.state


def read(found: Checkpoint) -> Weights:
    """The backbone of a timm model. Raises WeightsError for one that has no counterpart."""
    state = dict(found.state)
    if "norm.weight" not in state and any(key.startswith("fc_norm.") for key in found.unused):
        raise WeightsError("a timm model whose only norm follows average pooling (fc_norm): its tokens have none")
    registers = state.pop("reg_token", None)
    if registers is not None:
        state["register_tokens"] = _with_positions(state, registers)
    state = _swiglu(with_class_position(state))
    weights = Weights(state, "timm in OpenCLIP" if "visual.trunk" in found.within else "timm")
    # Its CLIP models have no bias in the patch embedding and another eps.
    if "norm_pre.weight" in state:
        weights.norm_eps = 1e-5
        state.setdefault("patch_embed.proj.bias", torch.zeros(len(state["patch_embed.proj.weight"])))
        name = found.config.get("architecture", "")
        weights.activation = "quick_gelu" if "quickgelu" in name else "gelu"
        weights.notes += [] if name else ["gelu assumed"]
    _read_config(weights, found)
    return weights


def _with_positions(state: dict[str, Tensor], registers: Tensor) -> Tensor:
    """Registers with their positions where the model has some: they are constants; taken out of `pos_embed`."""
    positions, first = state.get("pos_embed"), 1 + registers.shape[1]
    if positions is None or without_class_position(state):
        return registers
    state["pos_embed"] = torch.cat([positions[:, :1], positions[:, first:]], dim=1)
    return registers + positions[:, 1:first]


def _swiglu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With SwiGLUPacked's two layers under their own names, told by the second being half as wide as the first."""
    wide, narrow = state.get("blocks.0.mlp.fc1.weight"), state.get("blocks.0.mlp.fc2.weight")
    if wide is None or narrow is None or wide.shape[0] != 2 * narrow.shape[1]:
        return state
    return rename(state, [(r"mlp\.fc1\.", "mlp.w12."), (r"mlp\.fc2\.", "mlp.w3.")])


def _read_config(weights: Weights, found: Checkpoint) -> None:
    arguments = found.config.get("model_args") or {}
    preset = found.config.get("pretrained_cfg") or {}
    weights.heads = arguments.get("num_heads")
    if arguments.get("act_layer") == "quick_gelu":
        weights.activation = "quick_gelu"
    if preset.get("mean") and preset.get("std"):
        weights.normalisation = (list(preset["mean"]), list(preset["std"]))


def write(
    model: VisionTransformer, mean: list[float], std: list[float]
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Weights and config.json of a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`, and notes.

    Raises WeightsError for what timm's vision transformer has no place for.
    """
    config = model.config
    eps = 1e-5 if config.pre_norm else 1e-6  # which of them is a matter of the architecture's name
    demand(config, f"timm's {'CLIP' if config.pre_norm else 'DINOv2'} transformer", rope_base=0, norm_eps=eps)
    if config.pre_norm and (config.ffn == "swiglu" or model.patch_embed.proj.bias.any()):  # type: ignore[union-attr]
        raise WeightsError("timm's CLIP transformer has no place for ffn=swiglu or a bias of the patch embedding")
    state = dict(model.state_dict())
    del state["mask_token"]
    positions = state["pos_embed"]
    state["cls_token"], state["pos_embed"] = state["cls_token"] + positions[:, :1], positions[:, 1:]
    if config.num_registers:
        state["reg_token"] = state.pop("register_tokens")
    if config.pre_norm:
        del state["patch_embed.proj.bias"]
    state = rename(state, [(r"mlp\.w12\.", "mlp.fc1."), (r"mlp\.w3\.", "mlp.fc2.")])
    notes = [] if (config.pos_antialias, config.pos_offset) == (True, 0.0) else [
        f"at other image sizes than {config.image_size} timm resamples positions with antialiasing, this network was "
        f"used with antialias={config.pos_antialias}, offset={config.pos_offset:g}"
    ]  # fmt: skip
    return state, _config(config, mean, std), notes


def _config(config: ModelConfig, mean: list[float], std: list[float]) -> dict[str, Any]:
    dim, depth, heads, _ = config.size
    kind = {"mlp": "vit_base_patch14_reg4_dinov2", "swiglu": "vit_giant_patch14_reg4_dinov2"}[config.ffn]
    hidden = config.ffn_hidden * (2 if config.ffn == "swiglu" else 1)
    arguments: dict[str, Any] = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.in_channels,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": (hidden + 0.5) / dim,  # timm rounds the product down
        "init_values": config.layerscale or None,
        "reg_tokens": config.num_registers,
        "no_embed_class": True,
        "pre_norm": config.pre_norm,
    }
    if config.ffn == "mlp":
        arguments["act_layer"] = config.activation
    size = [config.in_channels, config.image_size, config.image_size]
    return {
        "architecture": "vit_base_patch16_clip_224" if config.pre_norm else kind,
        "num_classes": 0,
        "num_features": dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": size, "mean": mean, "std": std, "num_classes": 0, "crop_pct": 0.875,
            "interpolation": "bicubic", "first_conv": "patch_embed.proj", "classifier": "head",
        },
    }  # fmt: skip
