"""Whose weights these are, told by their names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinoreg.models.foreign import dino, huggingface, openclip, timm
from dinoreg.models.foreign.checkpoint import open_checkpoint
from dinoreg.models.formats import Weights, WeightsError, registers_of

LIBRARIES = (openclip, huggingface, dino, timm)  # the first whose names these are reads them


def convert(checkpoint: Mapping[str, Any], config: Mapping[str, Any] | None = None, pickled: bool = True) -> Weights:
    """A checkpoint of any known kind, in this project's names.

    config: the contents of the JSON files beside it, see `dinoreg.models.weights`; pickled: whether torch.save wrote
    it. Raises WeightsError.
    """
    huggingface.demand_known_kind(config or {})
    found = open_checkpoint(checkpoint, config, pickled)
    library = next((each for each in LIBRARIES if each.owns(found)), None)
    if library is None:
        shown = ", ".join([*found.state, *found.unused][:3])
        count = len(found.state) + len(found.unused)
        raise WeightsError(f"no vision transformer in it: no patch_embed.proj.weight among {count} keys ({shown}, …)")
    weights = library.read(found)
    weights.unused = [*found.unused, *weights.unused]
    if filled := _fill_absent_biases(weights.state):
        weights.notes.append(f"no bias in {' and '.join(filled)}")
    needed = ["cls_token", "patch_embed.proj.weight"] + ([] if weights.rope_base else ["pos_embed"])
    if registers_of(weights.state) == 0:
        weights.state.pop("register_tokens", None)  # Hugging Face writes an empty tensor
    if "mask_token" in weights.state:
        weights.state["mask_token"] = weights.state["mask_token"].view(1, -1)
    if missing := [key for key in needed if key not in weights.state]:
        raise WeightsError(f"a {weights.kind} model without {missing[0]} has no counterpart in this architecture")
    return weights


def _fill_absent_biases(state: dict[str, Tensor]) -> list[str]:
    """Zeros where no block has a bias, which is the same function, and these layers' names.

    Where only some blocks lack it, it is missing.
    """
    filled = []
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "mlp.w12", "mlp.w3"):
        weights = [key for key in state if re.fullmatch(rf"blocks\.\d+\.{layer}\.weight", key)]
        biases = [key.removesuffix("weight") + "bias" for key in weights]
        if weights and not any(bias in state for bias in biases):
            filled.append(layer)
            for key, bias in zip(weights, biases, strict=True):
                state[bias] = torch.zeros(len(state[key]))
    return filled
