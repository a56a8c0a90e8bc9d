"""What lies in a checkpoint before anybody knows whose it is: the tensors of its backbone, and what surrounds them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dinoreg.models.formats import WeightsError
from dinoreg.models.vit import ModelConfig


@dataclass
class Checkpoint:
    """The tensors of a backbone as the file names them.

    unused: keys that are no part of it; within: the entries that lay around it, outermost first, as in ("teacher",);
    pickled: whether torch.save wrote the file; config: what the folder's JSON files say.
    """

    state: dict[str, Tensor]
    unused: list[str] = field(default_factory=list)
    within: tuple[str, ...] = ()
    pickled: bool = True
    config: Mapping[str, Any] = field(default_factory=dict)


_WRAPPERS = re.compile(
    r"^(module\.|_orig_mod\.|_fsdp_wrapped_module\.|dinov2_with_registers\.|dinov2\.|dinov3_vit\.|vit\.|model\.)+"
)
_PARTS = ("backbone.", "vision_model.", "visual.trunk.", "visual.")  # where a whole model keeps its image network
_HEADS = re.compile(
    r"(dino_head|ibot_head|head|head_dist|classifier|fc_norm|attn_pool|pooler|decoder|pre_logits|local_cls_norm)\.|proj$"
)


def open_checkpoint(content: Mapping[str, Any], config: Mapping[str, Any] | None, pickled: bool) -> Checkpoint:
    """Find the backbone's tensors in what a file holds. Raises WeightsError where there are none."""
    raw, within = _state_dict(content, ())
    state = {_WRAPPERS.sub("", key): tensor for key, tensor in raw.items()}
    unused: list[str] = []
    part = next((part for part in _PARTS if any(key.startswith(part) for key in state)), "")
    if part:
        within += (part.rstrip("."),)
        unused = [key for key in state if not key.startswith(part)]
        state = {_WRAPPERS.sub("", key[len(part) :]): t for key, t in state.items() if key.startswith(part)}
    heads = [key for key in state if _HEADS.match(key)]
    if len(heads) == len(state):
        raise WeightsError("only heads in it, no backbone")
    state = {key: tensor for key, tensor in state.items() if key not in heads}
    return Checkpoint(state, unused + heads, within, pickled, config or {})


def _state_dict(content: Mapping[str, Any], within: tuple[str, ...]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The dictionary of tensors in a checkpoint; of several networks the teacher, which is the one to use."""
    for key in ("teacher", "student", "model", "state_dict", "model_state_dict"):
        if isinstance(inner := content.get(key), Mapping):
            return _state_dict(inner, (*within, key))
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    state = {key: tensor for key, tensor in tensors.items() if tensor.layout is torch.strided}  # not sparse
    if not state:
        raise WeightsError("no tensors in it")
    return state, within


def demand(config: ModelConfig, target: str, **held: Any) -> None:
    """Raises WeightsError unless a network has, option by option, the one value that `target` can hold."""
    for option, value in held.items():
        own = getattr(config, option)
        if own != value and not (option == "activation" and config.ffn == "swiglu"):
            raise WeightsError(f"{target} has no place for {option}={own}")


def with_layerscale(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With gains of 1 where a network has no LayerScale: for formats that always have one."""
    gains = {
        re.sub(r"norm([12])\.bias$", r"ls\1.gamma", name): torch.ones_like(tensor)
        for name, tensor in state.items()
        if re.fullmatch(r"blocks\.\d+\.norm[12]\.bias", name)
    }
    return {**gains, **state}


def split(state: dict[str, Tensor], whole: str, parts: Sequence[str]) -> None:
    """Cut a layer into those that another library keeps apart, in place: the reverse of `join`."""
    for key in [key for key in state if f".{whole}." in key]:
        for part, piece in zip(parts, state.pop(key).chunk(len(parts)), strict=True):
            state[key.replace(f".{whole}.", f".{part}.")] = piece


def rename(state: Mapping[str, Tensor], names: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """The tensors under other names: every (pattern, replacement) in turn."""
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        for pattern, name in names:
            key = re.sub(pattern, name, key)
        out[key] = tensor
    return out


def join(state: dict[str, Tensor], parts: Sequence[str], whole: str) -> None:
    """Put layers that a library keeps apart into one, in place: queries, keys and values, or gates and values.

    A part without a bias gets one of zeros where another part has one. Raises WeightsError where a part is missing.
    """
    for first in [key for key in state if key.endswith(f".{parts[0]}.weight")]:
        block = first.removesuffix(f"{parts[0]}.weight")
        if missing := [part for part in parts if f"{block}{part}.weight" not in state]:
            raise WeightsError(f"incomplete: without {block}{missing[0]}.weight")
        weights = [state.pop(f"{block}{part}.weight") for part in parts]
        biases = [state.pop(f"{block}{part}.bias", None) for part in parts]
        state[f"{block}{whole}.weight"] = torch.cat(weights)
        if any(bias is not None for bias in biases):
            filled = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
            state[f"{block}{whole}.bias"] = torch.cat(filled)
