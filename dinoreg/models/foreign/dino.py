"""Meta's own checkpoints: DINO, iBOT, DeiT and MAE, DeiT-III, DINOv2, DINOv3."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

import torch
from torch import Tensor

from dinoreg.models.foreign.checkpoint import Checkpoint, demand, join, rename, with_layerscale
from dinoreg.models.formats import HEADS, Weights, WeightsError
from dinoreg.models.vit import VisionTransformer


def owns(found: Checkpoint) -> bool:
    """Whether the names are those of one of these repositories, whose files, unlike timm's, were all pickled."""
    state = found.state
    if {"storage_tokens", "rope_embed.periods"} & state.keys():
        return True
    if "patch_embed.proj.weight" not in state or "reg_token" in state:
        return False
    marks = {"mask_token", "masked_embed", "dist_token", "blocks.0.gamma_1", "blocks.0.0.norm1.weight"}
    if marks & state.keys() or {"teacher", "student"} & set(found.within):
        return True
    plain = "norm_pre.weight" not in state and "norm.weight" in state
    plain = plain and ("model" in found.within or not without_class_position(state))
    headless = not any(key.startswith("head.") for key in found.unused)
    return found.pickled and plain and (headless or "model" in found.within)


def read(found: Checkpoint) -> Weights:
    """The backbone of a checkpoint that `owns` has claimed. Raises WeightsError."""
    state = rename(found.state, [(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."), (r"\.gamma_([12])$", r".ls\1.gamma")])
    if "dist_token" in state:
        raise WeightsError("a distilled DeiT: its second class token has no place in this architecture")
    if "storage_tokens" in state or "rope_embed.periods" in state:
        return _dinov3(state)
    if "mask_token" in state:
        # DINOv2's models without registers resample positions without antialiasing and with an offset.
        registers = "register_tokens" in state
        return Weights(state, "DINOv2", registers, 0.0 if registers else 0.1)
    if "blocks.0.ls1.gamma" in state:
        return Weights(with_class_position(state), "DeiT-III", False)
    masked = state.pop("masked_embed", None)
    if masked is not None:
        return Weights({**state, "mask_token": masked}, "iBOT", False, 0.1)
    if "model" in found.within:
        return Weights(with_class_position(state), "DeiT or MAE", False)
    return Weights(state, "DINO or iBOT", False, 0.1)


def without_class_position(state: Mapping[str, Tensor]) -> bool:
    """Whether there are positions for patches only, told by their number being a square."""
    count = state["pos_embed"].shape[1] if "pos_embed" in state and "cls_token" in state else 2
    return isqrt(count) ** 2 == count


def with_class_position(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Positions that begin with the class token's, of zeros where the source has them for patches only."""
    if not without_class_position(state):
        return state
    return {**state, "pos_embed": torch.cat([torch.zeros_like(state["cls_token"]), state["pos_embed"]], dim=1)}


def _dinov3(state: dict[str, Tensor]) -> Weights:
    unknown = [key for key in ("pos_embed", "cls_norm.weight") if key in state]
    if unknown or "rope_embed.periods" not in state:
        raise WeightsError(f"a DINOv3 model {'with' if unknown else 'without'} {[*unknown, 'rope_embed.periods'][0]}")
    state = rename(state, [("^storage_tokens$", "register_tokens")])
    base, heads = _rotary_base(state)
    for key in [key for key in state if key.endswith(".qkv.bias_mask")]:
        state[key.removesuffix("_mask")] = state[key.removesuffix("_mask")] * state.pop(key)  # keys have no bias
    join(state, ("w1", "w2"), "w12")
    return Weights(state, "DINOv3", heads=heads, norm_eps=1e-5, rope_base=base, image_size=256)


def _rotary_base(state: dict[str, Tensor]) -> tuple[float, int]:
    """Base and number of heads, which the periods of the channels give away: base ** (i / n), i < n = head_dim / 4."""
    periods = state.pop("rope_embed.periods").double()
    count = len(periods)
    base = float(round(periods[-1].item() ** (count / (count - 1)))) if count > 1 else 0.0
    powers = base ** (torch.arange(count, dtype=torch.float64) / count)
    if base < 2 or not torch.allclose(periods, powers, rtol=0.01):  # files in half precision round them
        raise WeightsError("a DINOv3 model whose rotary periods are no powers of one base")
    return base, state["patch_embed.proj.weight"].shape[0] // (4 * count)


def write_dinov2(model: VisionTransformer) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict that Meta's DINOv2 opens, and notes. Raises WeightsError for what it has no place for."""
    config = model.config
    demand(config, "the dinov2 format", rope_base=0, pre_norm=False, norm_eps=1e-6, activation="gelu")
    state = with_layerscale(model.state_dict())
    heads, notes = config.size.num_heads, list[str]()
    if HEADS.get(config.size.embed_dim) != heads:
        notes.append(f"the file does not say that the network has {heads} heads, nor does its width")
    usual = (True, 0.0) if config.num_registers else (False, 0.1)
    if (config.pos_antialias, config.pos_offset) == usual:
        return state, notes
    arguments = f"interpolate_antialias={config.pos_antialias}, interpolate_offset={config.pos_offset:g}"
    notes.append(f"at other image sizes than {config.image_size} it is the same network only built with {arguments}")
    return state, notes
