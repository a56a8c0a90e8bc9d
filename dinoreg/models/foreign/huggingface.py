"""transformers' Dinov2, Dinov2WithRegisters, ViT, CLIP vision and DINOv3 ViT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinoreg.models.foreign.checkpoint import Checkpoint, join, rename
from dinoreg.models.foreign.openclip import NORMALISATION
from dinoreg.models.formats import Weights, WeightsError

KINDS = ("dinov2", "dinov2_with_registers", "vit", "clip", "clip_vision_model", "dinov3_vit")

NAMES = [  # of all kinds together, in files and (since transformers 5 others) in memory
    (r"embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"embeddings\.class_embedding$", "cls_token"),
    (r"embeddings\.position_embeddings$|embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"embeddings\.(patch_embeddings\.projection|patch_embeddings|patch_embedding)\.", "patch_embed.proj."),
    (r"^(encoder\.layers?|layers?)\.(\d+)\.", r"blocks.\2."),
    (r"\.layernorm_before\.|\.layer_norm1\.", ".norm1."),
    (r"\.layernorm_after\.|\.layer_norm2\.", ".norm2."),
    (r"\.attention\.output\.dense\.|\.attention\.o_proj\.|\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.attention\.attention\.(q)uery\.|\.attention\.attention\.(k)ey\.", r".attn.\1\2_proj."),
    (r"\.attention\.attention\.(v)alue\.", r".attn.\1_proj."),
    (r"\.(attention|self_attn)\.([qkv])_proj\.", r".attn.\2_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"layer_scale([12])\.lambda1$", r"ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(layernorm|post_layernorm)\.", "norm."),
]


def demand_known_kind(config: Mapping[str, Any]) -> None:
    """Raises WeightsError for a folder of another kind of model, whatever its tensors are called."""
    kind = config.get("model_type", KINDS[0])
    if kind not in KINDS:
        raise WeightsError(f"a Hugging Face model of the kind {kind}: only {', '.join(KINDS)} fit")


def owns(found: Checkpoint) -> bool:
    """Whether embeddings are called as in transformers."""
    return any(key.startswith("embeddings.") for key in found.state)


def read(found: Checkpoint) -> Weights:
    """The backbone of one of KINDS. Raises WeightsError for another."""
    state = rename(found.state, NAMES)
    state.pop("embeddings.position_ids", None)  # of old files: 0, 1, 2, …
    join(state, ("attn.q_proj", "attn.k_proj", "attn.v_proj"), "attn.qkv")
    join(state, ("mlp.gate_proj", "mlp.up_proj"), "mlp.w12")
    gated = "blocks.0.mlp.w12.weight" in state
    last = "mlp.w3." if gated else "mlp.fc2."
    state = rename(state, [(r"mlp\.up_proj\.", "mlp.fc1."), (r"mlp\.down_proj\.", last)])
    config = {**found.config, **(found.config.get("vision_config") or {})}
    weights = _kind(found, state, config)
    weights.heads = config.get("num_attention_heads")
    weights.norm_eps = config.get("layer_norm_eps", weights.norm_eps)
    weights.normalisation = _normalisation(config, weights.normalisation)
    _activation(weights, config, gated)
    return weights


def _kind(found: Checkpoint, state: dict[str, Tensor], config: Mapping[str, Any]) -> Weights:
    """What the kinds do in their own way, told by the names that only they have."""
    if "embeddings.class_embedding" in found.state:
        state["cls_token"], state["pos_embed"] = state["cls_token"].view(1, 1, -1), state["pos_embed"][None]
        state.setdefault("patch_embed.proj.bias", torch.zeros(len(state["patch_embed.proj.weight"])))
        return Weights(
            state, "Hugging Face CLIP", False, norm_eps=1e-5, activation="quick_gelu", normalisation=NORMALISATION
        )
    if "embeddings.patch_embeddings.weight" in found.state:
        size, base = config.get("image_size"), float(config.get("rope_theta", 100.0))
        size = size if isinstance(size, int) else None
        return Weights(state, "Hugging Face DINOv3", norm_eps=1e-5, rope_base=base, image_size=size)
    if any(key.endswith(".layernorm_before.weight") for key in found.state):
        if "embeddings.distillation_token" in found.state:
            raise WeightsError("a distilled DeiT: its second class token has no place in this architecture")
        return Weights(state, "Hugging Face ViT", False, norm_eps=1e-12)
    return Weights(state, "Hugging Face", "register_tokens" in state)


def _activation(weights: Weights, config: Mapping[str, Any], gated: bool) -> None:
    act = config.get("hidden_act", weights.activation)
    if weights.rope_base and gated:
        fits = act in ("silu", "swish", weights.activation if "hidden_act" not in config else "silu")
    else:
        fits = gated or act in ("gelu", "gelu_python", "quick_gelu")  # Dinov2's gated layers have SiLU whatever it says
    if not fits:
        raise WeightsError(f"its activation is {act}, which this architecture does not have")
    weights.activation = "quick_gelu" if act == "quick_gelu" else "gelu"


def _normalisation(
    config: Mapping[str, Any], default: tuple[list[float], list[float]] | None
) -> tuple[list[float], list[float]] | None:
    said = config.get("preprocessor") or {}
    if said.get("image_mean") and said.get("image_std"):
        return list(said["image_mean"]), list(said["image_std"])
    return default
