"""How much arithmetic a forward pass of the backbone costs, from the formulas of its layers and by tracing it.

One multiplication with its addition counts as two operations. Only matrix products, convolutions and attention count:
what remains is bound by memory, and is not what a GPU's peak is quoted for.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dinoreg.models.vit import ModelConfig, VisionTransformer, build_vit


def embedding_flops(model: ModelConfig, patches: int) -> float:
    """The patch embedding of one image of so many patches."""
    return 2.0 * patches * model.patch_size**2 * model.in_channels * model.size.embed_dim


def blocks_flops(model: ModelConfig, patches: int) -> float:
    """All blocks, for one image of so many patches."""
    tokens, dim = 1 + model.num_registers + patches, model.size.embed_dim
    attention = 2.0 * tokens * 4 * dim * dim + 4.0 * tokens**2 * dim  # qkv and proj; q k^T and the average of v
    return model.size.depth * (attention + tokens * feed_forward_flops(model))


def feed_forward_flops(model: ModelConfig) -> float:
    """The feed-forward part of one block, for one token."""
    return 2.0 * (3 if model.ffn == "swiglu" else 2) * model.size.embed_dim * model.ffn_hidden


def traced_backbone_flops(model: ModelConfig, batches: Sequence[tuple[int, int]]) -> float:
    """The backbone on batches of (images, pixels of a side), counted by fvcore in a trace of the real modules.

    Blocks are alike, so a network of a single block is traced and its block counted `depth` times.
    """
    one = replace(model, depth=1, pos_offset=0.0)
    backbone = build_vit(one, attention="sdpa", drop_path=False).eval()
    images = tuple(torch.zeros(count, model.in_channels, side, side) for count, side in batches)
    analysis = analyse(_Packed(backbone), images)
    return 2.0 * (analysis.total() + (model.size.depth - 1) * analysis.by_module()["backbone.blocks.0"])


class _Packed(nn.Module):
    """The backbone with tensors for arguments, as tracing wants them."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        return tuple(features.patches for features in self.backbone(images))


def analyse(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """fvcore's count of the multiply-adds of a forward pass: its `total()` is half of the operations."""
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(module, inputs)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_products)
    for no_product in ("aten::layer_norm", "aten::upsample_bicubic2d"):
        analysis.set_op_handle(no_product, lambda inputs, outputs: 0)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analysis.total()
    return analysis


def _attention_products(inputs: list[Any], outputs: list[Any]) -> float:
    """Multiply-adds of softmax(q k^T) v for (..., tokens, head_dim) arguments, which fvcore does not know."""
    q, k, v = (value.type().sizes() for value in inputs[:3])
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
