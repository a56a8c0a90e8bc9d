"""timm's vision transformers, in files and in folders with a config.json."""

from __future__ import annotations

import torch
from torch import Tensor

from dinoreg.models.foreign.checkpoint import Checkpoint, rename
from dinoreg.models.foreign.dino import with_class_position, without_class_position
from dinoreg.models.formats import Weights, WeightsError


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
    if (
        "norm_pre.weight" in state
    ):  # its CLIP models, whose patch embedding has no bias and whose norms have another eps
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
