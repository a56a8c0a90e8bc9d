"""Make the weights of one architecture fit another of the same depth and width."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.models.formats import Weights, grid_side, registers_of
from dinoreg.models.vit import VisionTransformer, resample_positions


def adapt(weights: Weights, model: VisionTransformer) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`weights` in the shapes of `model`, and for each tensor that had to change, how, in words."""
    state, how = dict(weights.state), dict[str, str]()
    _adapt_positions(state, how, weights, model)
    _adapt_patches(state, how, model)
    _adapt_registers(state, how, model)
    _adapt_layerscale(state, how, model)
    return state, how


def _adapt_positions(state: dict[str, Tensor], how: dict[str, str], weights: Weights, model: VisionTransformer) -> None:
    if model.pos_embed is None or "pos_embed" not in state:
        return  # rotary on one side: reported as unused or missing
    side, positions = grid_side(state["pos_embed"]), state["pos_embed"].float()
    if (side, side) == model.grid:
        return
    # As the source's own code would for such an image, so that the model starts with the source's features.
    patches = resample_positions(
        positions[:, 1:], (side, side), model.grid, antialias=weights.antialias, offset=weights.offset
    )
    state["pos_embed"] = torch.cat([positions[:, :1], patches], dim=1)
    how["pos_embed"] = f"{side} x {side} grid resampled to {model.grid[0]} x {model.grid[1]}, bicubic"


def _adapt_patches(state: dict[str, Tensor], how: dict[str, str], model: VisionTransformer) -> None:
    key = "patch_embed.proj.weight"
    _, channels, patch, _ = state[key].shape
    said = []
    if channels != model.in_channels:
        state[key] = spread_channels(state[key], model.in_channels)
        said.append(f"{channels} input channels spread over {model.in_channels}")
    if patch != model.patch_size:
        state[key] = resize_patch_kernel(state[key], model.patch_size)
        said.append(f"kernel of {patch} pixels resized to {model.patch_size} by pseudo-inverse")
    if said:
        how[key] = "; ".join(said)


def spread_channels(kernel: Tensor, channels: int) -> Tensor:
    """A patch kernel (D, C, p, p) for another number of channels.

    An image whose channels are all equal gets the same tokens as before: with more channels each source channel is
    repeated in turn and shared among its copies, with fewer each gets an equal share of the sum.
    """
    old = kernel.shape[1]
    if channels <= old:
        return (kernel.sum(1, keepdim=True) / channels).expand(-1, channels, -1, -1).contiguous()
    source = torch.arange(channels, device=kernel.device) % old
    copies = torch.bincount(source).to(kernel.dtype)
    return kernel[:, source] / copies[source][:, None, None]


def resize_patch_kernel(kernel: Tensor, size: int) -> Tensor:
    """A patch kernel (D, C, p, p) for patches of `size` pixels: FlexiViT's PI-resize (arXiv 2212.08013, section 3.4).

    With B the matrix that resizes a patch, the new kernel solves B^T w' = w in the least-squares sense, so that a
    resized patch gives the token that the original patch gave (exactly so when patches grow).
    """
    old = kernel.shape[-1]
    basis = torch.eye(old * old, dtype=torch.float64).view(-1, 1, old, old)
    resized = F.interpolate(basis, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    inverse = torch.linalg.pinv(resized.flatten(1))  # the resized unit patches are the rows of B^T
    return (kernel.double().flatten(2) @ inverse.T).unflatten(2, (size, size)).to(kernel.dtype)


def _adapt_registers(state: dict[str, Tensor], how: dict[str, str], model: VisionTransformer) -> None:
    theirs, own = registers_of(state), model.register_tokens
    if own is None or theirs == 0 or theirs == own.shape[1]:
        return  # none wanted: reported as unused; none there: reported as missing
    fresh = own.detach().to(device=state["register_tokens"].device, dtype=state["register_tokens"].dtype)
    state["register_tokens"] = torch.cat([state["register_tokens"], fresh[:, theirs:]], dim=1)[:, : own.shape[1]]
    how["register_tokens"] = f"first {min(theirs, own.shape[1])} kept" + (
        f", {own.shape[1] - theirs} freshly initialised" if own.shape[1] > theirs else f" of {theirs}"
    )


def _adapt_layerscale(state: dict[str, Tensor], how: dict[str, str], model: VisionTransformer) -> None:
    """Gains of 1 where the source has none; gains folded into the layer before them where the model has none."""
    wanted, there = bool(model.config.layerscale), "blocks.0.ls1.gamma" in state
    if wanted and not there:
        for name, parameter in model.named_parameters():
            if name.endswith(".gamma"):
                state[name], how[name] = torch.ones(parameter.shape), "1, because the source has no LayerScale"
    elif there and not wanted:
        for name in [name for name in state if name.endswith(".gamma")]:
            gain = state.pop(name)
            block, _, which = name.removesuffix(".gamma").rpartition(".")
            for last in _last_layer(state, block, which):
                state[last] = state[last] * (gain[:, None] if last.endswith("weight") else gain)
                how[last] = "multiplied by the source's LayerScale"


def _last_layer(state: dict[str, Tensor], block: str, which: str) -> list[str]:
    names = r"attn\.proj" if which == "ls1" else r"mlp\.(fc2|w3)"
    return [key for key in state if re.fullmatch(rf"{re.escape(block)}\.{names}\.(weight|bias)", key)]
