"""The form that weights of every source are brought to, and the architecture that can be told from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Literal

from torch import Tensor

from dinoreg.models.vit import ARCHS, ModelConfig

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # mean and std that most backbones were trained with

# Attention heads at a width, which shapes do not show: those of this project's sizes, CLIP's, DeiT-III's and timm's.
HEADS = {arch.embed_dim: arch.num_heads for arch in ARCHS.values()} | {
    256: 4, 320: 5, 512: 8, 640: 10, 896: 14, 1408: 16, 1664: 16,
}  # fmt: skip


class WeightsError(ValueError):
    """A file that holds no usable backbone, or one that does not fit, in one line."""


@dataclass
class Weights:
    """A backbone's parameters under this project's names, and what is known beside their shapes.

    kind: the format in words; antialias, offset: how the source's own code resamples position embeddings; heads,
    image_size (pixels): where the source says; norm_eps, activation, rope_base: as in ModelConfig; unused: keys of the
    file that are no part of a backbone; notes: what had to be assumed; config: the architecture, in this project's
    own files; normalisation: mean and std of the training images a channel, and step: that of the training, where
    the source says so.
    """

    state: dict[str, Tensor]
    kind: str
    antialias: bool = True
    offset: float = 0.0
    heads: int | None = None
    image_size: int | None = None
    norm_eps: float = 1e-6
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    rope_base: float = 0.0
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    config: ModelConfig | None = None
    normalisation: tuple[list[float], list[float]] | None = None
    step: int | None = None


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
    heads = weights.heads or HEADS.get(dim)
    if heads is None:
        raise WeightsError(
            f"unknown architecture: width {dim} is none of {sorted(HEADS)}, and heads are not written in"
        )
    config = ModelConfig(
        arch=known.get(dim, "vit_small"),  # type: ignore[arg-type]
        embed_dim=None if dim in known else dim,
        patch_size=patch,
        image_size=_image_size(weights, patch),
        in_channels=channels,
        num_registers=registers_of(state),
        ffn="swiglu" if swiglu else "mlp",
        activation=weights.activation,
        pre_norm="norm_pre.weight" in state,
        norm_eps=weights.norm_eps,
        layerscale=1e-5 if "blocks.0.ls1.gamma" in state else 0.0,
        rope_base=weights.rope_base,
        pos_antialias=weights.antialias,
        pos_offset=weights.offset,
    )
    config.depth = None if config.size.depth == depth else depth
    config.num_heads = None if config.size.num_heads == heads else heads
    config.ffn_width = None if config.ffn_hidden == hidden else hidden
    return config


def describe(weights: Weights, config: ModelConfig) -> str:
    """Format, architecture, what the source does in its own way, what was assumed and left out, in one line."""
    dim, depth, heads, _ = config.size
    changed = (config.embed_dim, config.depth, config.num_heads) != (None, None, None)
    parts = [
        f"{weights.kind}: {f'{depth} blocks of width {dim}, {heads} heads' if changed else config.arch}",
        f"patches of {config.patch_size} at {config.image_size} pixels",
        f"{config.num_registers} registers",
        f"{config.ffn}, {config.activation}" if config.ffn == "mlp" else config.ffn,
        "norm before the blocks" if config.pre_norm else "",
        f"rotary positions, base {config.rope_base:g}"
        if config.rope_base
        else f"positions resampled {'with' if config.pos_antialias else 'without'} antialiasing, "
        f"offset {config.pos_offset:g}",
        *weights.notes,
        f"after {weights.step} steps" if weights.step is not None else "",
    ]
    if left := sorted({key.split(".")[0] for key in weights.unused}):
        parts.append(f"left out: {', '.join(left[:4])}" + (f" and {len(left) - 4} more" if len(left) > 4 else ""))
    return ", ".join(part for part in parts if part)


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


def _image_size(weights: Weights, patch: int) -> int:
    """Pixels of the images that the network was made for; with rotary positions no shape tells."""
    if "pos_embed" in weights.state:
        return patch * grid_side(weights.state["pos_embed"])
    return (weights.image_size or 224) // patch * patch
