"""transformers' Dinov2, Dinov2WithRegisters, ViT, CLIP vision and DINOv3 ViT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinoreg.models.foreign.checkpoint import Checkpoint, demand, join, rename, split, with_layerscale
from dinoreg.models.foreign.openclip import NORMALISATION
from dinoreg.models.formats import Weights, WeightsError
from dinoreg.models.layers import SwiGLU
from dinoreg.models.vit import ModelConfig, VisionTransformer

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
    weights.norm_eps = float(config.get("layer_norm_eps", weights.norm_eps))
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
    if gated and not weights.rope_base:
        return  # Dinov2's gated layers have SiLU whatever is written there
    act = config.get("hidden_act", "silu" if gated else weights.activation)
    if act not in (("silu", "swish") if gated else ("gelu", "gelu_python", "quick_gelu")):
        raise WeightsError(f"its activation is {act}, which this architecture does not have")
    weights.activation = "quick_gelu" if act == "quick_gelu" else "gelu"


def _normalisation(
    config: Mapping[str, Any], default: tuple[list[float], list[float]] | None
) -> tuple[list[float], list[float]] | None:
    said = config.get("preprocessor") or {}
    if said.get("image_mean") and said.get("image_std"):
        return list(said["image_mean"]), list(said["image_std"])
    return default


_TOKENS = (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1")
_ATTENTION = (r"\.attn\.([qkv])_proj\.", r".attention.\1_proj.")
_SCALES = (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1")
WRITTEN = {  # our names in those of three kinds
    "dinov2": [
        _TOKENS,
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^blocks\.", "encoder.layer."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.attn\.q_proj\.", ".attention.attention.query."),
        (r"\.attn\.k_proj\.", ".attention.attention.key."),
        (r"\.attn\.v_proj\.", ".attention.attention.value."),
        (r"\.mlp\.w12\.", ".mlp.weights_in."),
        (r"\.mlp\.w3\.", ".mlp.weights_out."),
        _SCALES,
        (r"^norm\.", "layernorm."),
    ],
    "dinov3_vit": [
        _TOKENS,
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
        (r"^blocks\.", "layer."),
        (r"\.attn\.proj\.", ".attention.o_proj."),
        _ATTENTION,
        (r"\.mlp\.fc1\.", ".mlp.up_proj."),
        (r"\.mlp\.(fc2|w3)\.", ".mlp.down_proj."),
        _SCALES,
    ],
    "clip_vision_model": [
        (r"^cls_token$", "embeddings.class_embedding"),
        (r"^pos_embed$", "embeddings.position_embedding.weight"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
        (r"^norm_pre\.", "pre_layrnorm."),
        (r"^blocks\.", "encoder.layers."),
        (r"\.norm([12])\.", r".layer_norm\1."),
        (r"\.attn\.proj\.", ".self_attn.out_proj."),
        (r"\.attn\.([qkv])_proj\.", r".self_attn.\1_proj."),
        (r"^norm\.", "post_layernorm."),
        (r"^", "vision_model."),
    ],
}


def write(model: VisionTransformer) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Weights and config.json of the kind of model in transformers that can hold this network, and notes.

    Raises WeightsError where none can.
    """
    config = model.config
    if config.rope_base:
        state, said, notes = _write_dinov3(model)
    elif config.pre_norm:
        state, said, notes = _write_clip(model)
    else:
        state, said, notes = _write_dinov2(model)
    dim, depth, heads, _ = config.size
    split(state, "attn.qkv", ("attn.q_proj", "attn.k_proj", "attn.v_proj"))
    kind = said["model_type"].removesuffix("_with_registers")
    if not said.get("key_bias", True):
        state = {key: tensor for key, tensor in state.items() if not key.endswith(".k_proj.bias")}
    common = {
        "hidden_size": dim, "num_hidden_layers": depth, "num_attention_heads": heads, "image_size": config.image_size,
        "patch_size": config.patch_size, "num_channels": config.in_channels, "layer_norm_eps": config.norm_eps,
        "hidden_act": config.activation, "dtype": "float32",
    }  # fmt: skip
    return rename(state, WRITTEN[kind]), common | said, notes


def _write_dinov2(model: VisionTransformer) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    config, dim = model.config, model.embed_dim
    hidden = config.ffn_hidden
    width = SwiGLU.hidden_size if config.ffn == "swiglu" else int
    ratio = next((ratio for ratio in range(1, 65) if width(ratio * dim) == hidden), 0)
    if not ratio:
        raise WeightsError(f"Hugging Face's Dinov2 has no place for feed-forward layers {hidden} wide at width {dim}")
    # The model with registers, of which there may be none, is the one that resamples positions with antialiasing.
    registers = config.num_registers > 0 or config.pos_antialias
    state = with_layerscale(model.state_dict())
    said: dict[str, Any] = {"use_swiglu_ffn": config.ffn == "swiglu", "mlp_ratio": ratio, "qkv_bias": True}
    if registers:
        said |= {"model_type": "dinov2_with_registers", "architectures": ["Dinov2WithRegistersModel"]}
        said["num_register_tokens"] = config.num_registers
        state.setdefault("register_tokens", torch.zeros(1, 0, dim))
    else:
        said |= {"model_type": "dinov2", "architectures": ["Dinov2Model"]}
    return state, said, _resampling_note(config, registers)


def _write_dinov3(model: VisionTransformer) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    config = model.config
    demand(config, "Hugging Face's DINOv3", pre_norm=False)
    state = with_layerscale(model.state_dict())
    state["mask_token"] = state["mask_token"][None]
    state.setdefault("register_tokens", torch.zeros(1, 0, model.embed_dim))
    split(state, "mlp.w12", ("mlp.gate_proj", "mlp.up_proj"))
    keys = [bias.chunk(3)[1] for name, bias in state.items() if name.endswith(".attn.qkv.bias")]
    said: dict[str, Any] = {
        "model_type": "dinov3_vit", "architectures": ["DINOv3ViTModel"], "intermediate_size": config.ffn_hidden,
        "num_register_tokens": config.num_registers, "use_gated_mlp": config.ffn == "swiglu",
        "key_bias": any(bool(bias.any()) for bias in keys), "rope_theta": config.rope_base,
    }  # fmt: skip
    if config.ffn == "swiglu":
        said["hidden_act"] = "silu"
    return state, said, []


def _write_clip(model: VisionTransformer) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    config = model.config
    demand(config, "Hugging Face's CLIP", num_registers=0, layerscale=0.0, ffn="mlp")
    state = dict(model.state_dict())
    if state.pop("patch_embed.proj.bias").any():
        raise WeightsError("Hugging Face's CLIP has no place for a bias of the patch embedding")
    del state["mask_token"]
    state["cls_token"], state["pos_embed"] = state["cls_token"].flatten(), state["pos_embed"][0]
    said = {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}
    said |= {"intermediate_size": config.ffn_hidden}  # type: ignore[dict-item]
    return state, said, _resampling_note(config, False)


def _resampling_note(config: ModelConfig, antialias: bool) -> list[str]:
    if (config.pos_antialias, config.pos_offset) == (antialias, 0.0):
        return []
    return [
        f"at other image sizes than {config.image_size} transformers resamples positions with antialias={antialias}, "
        f"offset=0, this network was used with antialias={config.pos_antialias}, offset={config.pos_offset:g}"
    ]
