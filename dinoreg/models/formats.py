"""Names and layouts of public weight files, brought to this project's own (which are DINOv2's).

Everything here works on state dicts in memory; reading files is `weights.py`'s part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from dinoreg.models.vit import ARCHS, ModelConfig


class WeightsError(ValueError):
    """A file that holds no usable backbone, or one that does not fit, in one line."""


@dataclass
class Weights:
    """A backbone's parameters under this project's names, and what is known beside their shapes.

    kind: the format in words; heads: attention heads where the source says; antialias, offset: how the source's own
    code resamples position embeddings; unused: keys of the file that are no part of a backbone; config: the
    architecture, normalisation: mean and std of the training images a channel, and step: that of the training, where
    the source says so.
    """

    state: dict[str, Tensor]
    kind: str
    antialias: bool
    offset: float
    heads: int | None = None
    unused: list[str] = field(default_factory=list)
    config: ModelConfig | None = None
    normalisation: tuple[list[float], list[float]] | None = None
    step: int | None = None


def convert(checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Weights:
    """A checkpoint of any known kind. `config` is a Hugging Face folder's config.json. Raises WeightsError."""
    raw = _state_dict(checkpoint)
    state, unused = _backbone_part(raw)
    heads = config.get("num_attention_heads") if config else None
    if any(key.startswith("embeddings.") for key in state):
        registers = "embeddings.register_tokens" in state
        return _finish(_from_huggingface(state), "Hugging Face", registers, 0.0, unused, heads)
    if "rope_embed.periods" in state or "storage_tokens" in state:
        raise WeightsError("these are DINOv3 weights: their rotary positions have no place in this architecture")
    if "patch_embed.proj.weight" not in state:
        shown = ", ".join(list(raw)[:3])
        raise WeightsError(
            f"no vision transformer in it: no patch_embed.proj.weight among {len(raw)} keys ({shown}, …)"
        )
    if "reg_token" in state or _has_folded_cls(state) or "mask_token" not in state:
        return _finish(_from_timm(state), "timm or DINO", True, 0.0, unused, heads)
    # DINOv2's models without registers resample positions without antialiasing and with an offset (hub/backbones.py).
    registers = "register_tokens" in state
    return _finish(state, "DINOv2", registers, 0.0 if registers else 0.1, unused, heads)


def infer_config(weights: Weights) -> ModelConfig:
    """The architecture that these shapes belong to. Raises WeightsError where they leave it open."""
    if weights.config is not None:
        return weights.config
    state = weights.state
    dim, channels, patch, _ = state["patch_embed.proj.weight"].shape
    depth = depth_of(state)
    swiglu = "blocks.0.mlp.w12.weight" in state
    hidden = state["blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"].shape[1]
    known = {arch.embed_dim: name for name, arch in ARCHS.items()}
    heads = weights.heads or (ARCHS[known[dim]].num_heads if dim in known else None)
    if heads is None:
        raise WeightsError(
            f"unknown architecture: width {dim} is none of {sorted(known)}, and heads are not written in"
        )
    config = ModelConfig(
        arch=known.get(dim, "vit_small"),  # type: ignore[arg-type]
        embed_dim=None if dim in known else dim,
        patch_size=patch,
        image_size=patch * grid_side(state["pos_embed"]),
        in_channels=channels,
        num_registers=registers_of(state),
        ffn="swiglu" if swiglu else "mlp",
        layerscale=1e-5 if "blocks.0.ls1.gamma" in state else 0.0,
        pos_antialias=weights.antialias,
        pos_offset=weights.offset,
    )
    config.depth = None if config.size.depth == depth else depth
    config.num_heads = None if config.size.num_heads == heads else heads
    if config.ffn_hidden != hidden:
        raise WeightsError(
            f"unknown architecture: feed-forward layers {hidden} wide at width {dim}, not {config.ffn_hidden}"
        )
    return config


def depth_of(state: Mapping[str, Tensor]) -> int:
    """Number of blocks. Raises WeightsError where one is left out: a name alone would make a model of any depth."""
    found = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    if strange := found - {str(number) for number in range(len(found))}:
        raise WeightsError(f"has {len(found)} blocks, one of them called {min(strange)[:30]}")
    return len(found)


def registers_of(state: Mapping[str, Tensor]) -> int:
    """Number of register tokens."""
    return state["register_tokens"].shape[1] if "register_tokens" in state else 0


def grid_side(pos_embed: Tensor) -> int:
    """Side of the square grid of a (1, 1 + side^2, D) position embedding."""
    count = pos_embed.shape[1] - 1
    side = isqrt(max(0, count))
    if side == 0 or side * side != count:
        raise WeightsError(f"position embeddings of {count} patches are no square grid")
    return side


def _state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The dictionary of tensors in a checkpoint; of several networks the teacher, which is the one to use."""
    for key in ("teacher", "model", "state_dict", "model_state_dict"):
        if isinstance(inner := checkpoint.get(key), Mapping):
            return _state_dict(inner)
    tensors = {key: value for key, value in checkpoint.items() if isinstance(value, Tensor)}
    state = {key: tensor for key, tensor in tensors.items() if tensor.layout is torch.strided}  # not sparse
    if not state:
        raise WeightsError("no tensors in it")
    return state


_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.|_fsdp_wrapped_module\.|dinov2_with_registers\.|dinov2\.)+")
_HEADS = re.compile(r"(dino_head|ibot_head|head|classifier|fc_norm|attn_pool)\.")


def _backbone_part(raw: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors that are no heads, without prefixes of wrappers and of block chunks; and the keys left out."""
    state = {_WRAPPERS.sub("", key): tensor for key, tensor in raw.items()}
    if any(key.startswith("backbone.") for key in state):
        unused = [key for key in state if not key.startswith("backbone.")]
        state = {_WRAPPERS.sub("", k[len("backbone.") :]): t for k, t in state.items() if k.startswith("backbone.")}
    else:
        unused = []
    heads = [key for key in state if _HEADS.match(key)]
    kept = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", k): t for k, t in state.items() if k not in heads}
    if not kept:
        raise WeightsError("only heads in it, no backbone")
    return kept, unused + heads


def _finish(
    state: dict[str, Tensor], kind: str, antialias: bool, offset: float, unused: list[str], heads: int | None
) -> Weights:
    for key in ("cls_token", "pos_embed", "patch_embed.proj.weight"):
        if key not in state:
            raise WeightsError(f"a {kind} model without {key} has no counterpart in this architecture")
    return Weights(state, kind, antialias, offset, heads, unused)


def _has_folded_cls(state: Mapping[str, Tensor]) -> bool:
    """timm's `no_embed_class`: positions for patches only, CLS's already added to cls_token."""
    count = state["pos_embed"].shape[1] if "pos_embed" in state else 2
    return isqrt(count) ** 2 == count


def _from_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = dict(state)
    registers = out.pop("reg_token", None)
    if "pos_embed" in out and "cls_token" in out:
        positions = out["pos_embed"]
        if _has_folded_cls(out):
            out["pos_embed"] = torch.cat([torch.zeros_like(out["cls_token"]), positions], dim=1)
        elif registers is not None:  # positions for registers too: they are constants, so they join the registers
            first = 1 + registers.shape[1]
            registers = registers + positions[:, 1:first]
            out["pos_embed"] = torch.cat([positions[:, :1], positions[:, first:]], dim=1)
    if registers is not None:
        out["register_tokens"] = registers
    wide, narrow = out.get("blocks.0.mlp.fc1.weight"), out.get("blocks.0.mlp.fc2.weight")
    if wide is not None and narrow is not None and wide.shape[0] == 2 * narrow.shape[1]:  # SwiGLUPacked
        out = {re.sub(r"mlp\.fc1\.", "mlp.w12.", re.sub(r"mlp\.fc2\.", "mlp.w3.", k)): t for k, t in out.items()}
    return out


_HUGGINGFACE = [  # the second spelling of a line is that of modules in memory since transformers 5
    (r"embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"attention\.output\.dense\.|attention\.o_proj\.", "attn.proj."),
    (r"attention\.attention\.(query|key|value)\.", r"attn.\1."),
    (r"attention\.([qkv])_proj\.", r"attn.\1."),
    (r"layer_scale([12])\.lambda1", r"ls\1.gamma"),
    (r"mlp\.weights_in\.", "mlp.w12."),
    (r"mlp\.weights_out\.|mlp\.down_proj\.", "mlp.w3."),
    (r"^layernorm\.", "norm."),
]


def _from_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        for pattern, name in _HUGGINGFACE:
            key = re.sub(pattern, name, key)
        out[key] = tensor
    for parts, whole in (
        (("attn.query", "attn.key", "attn.value"), "attn.qkv"),
        (("attn.q", "attn.k", "attn.v"), "attn.qkv"),
        (("mlp.gate_proj", "mlp.up_proj"), "mlp.w12"),
    ):
        for key in [key for key in out if f".{parts[0]}." in key]:
            pieces = [out.pop(key.replace(f".{parts[0]}.", f".{part}.")) for part in parts]
            out[key.replace(f".{parts[0]}.", f".{whole}.")] = torch.cat(pieces)
    return out
