"""OpenCLIP's image towers, and OpenAI's CLIP in the same names."""

from __future__ import annotations

import torch

from dinoreg.models.foreign.checkpoint import Checkpoint, rename
from dinoreg.models.formats import Weights, WeightsError

NORMALISATION = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])  # OpenAI's, and all heirs'

NAMES = [
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.ls_([12])\.", r".ls\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]


def owns(found: Checkpoint) -> bool:
    """Whether there is a `visual` tower in it that is not one of timm's, or such a tower alone."""
    return "visual" in found.within or "transformer.resblocks.0.ln_1.weight" in found.state


def read(found: Checkpoint) -> Weights:
    """The image tower without its projection into the space of texts. Raises WeightsError."""
    if "layer1.0.conv1.weight" in found.state:
        raise WeightsError("a CLIP model whose image tower is a ResNet, no vision transformer")
    settings = found.config.get("model_cfg") or {}
    vision = settings.get("vision_cfg") or {}
    if vision.get("attentional_pool") or vision.get("final_ln_after_pool"):
        raise WeightsError("an OpenCLIP tower whose last norm follows its pooling: its tokens have none")
    state = rename(found.state, NAMES)
    width = len(state["patch_embed.proj.weight"])
    if len(state["norm.weight"]) != width:
        raise WeightsError("an OpenCLIP tower whose last norm follows its pooling: its tokens have none")
    state["cls_token"], state["pos_embed"] = state["cls_token"].view(1, 1, -1), state["pos_embed"][None]
    state.setdefault("patch_embed.proj.bias", torch.zeros(width))
    weights = Weights(state, "OpenCLIP", heads=vision.get("head_width") and width // vision["head_width"])
    weights.norm_eps, weights.normalisation = 1e-5, _normalisation(found)
    # OpenAI's own files, where it all began, carry sizes of the text tower beside the tensors.
    openai = any(key in ("input_resolution", "context_length", "vocab_size") for key in found.unused)
    weights.activation = "quick_gelu" if settings.get("quick_gelu", openai) else "gelu"
    if not settings and not openai:
        weights.notes.append("gelu assumed: no open_clip_config.json beside it")
    return weights


def _normalisation(found: Checkpoint) -> tuple[list[float], list[float]]:
    said = found.config.get("preprocess_cfg") or {}
    return (list(said["mean"]), list(said["std"])) if said.get("mean") and said.get("std") else NORMALISATION
