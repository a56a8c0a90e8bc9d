"""A network block by block, each taken apart into what its two branches add to the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dinoreg.models.layers import Block
from dinoreg.models.packing import Packing
from dinoreg.models.vit import VisionTransformer


@dataclass
class Step:
    """One block. All tokens are (B, 1 + R + N, D), in the order [CLS, registers, patches], before any final norm.

    entering: what it is given; attended: that plus what attention adds; leaving: that plus what the feed-forward adds.
    """

    index: int
    block: Block
    entering: Tensor
    attended: Tensor
    leaving: Tensor
    packing: Packing

    def query_key_value(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of the block, each (B, heads, 1 + R + N, head_dim): biases in, turned where rotary, unscaled."""
        parts = self.block.attn.query_key_value(self.block.norm1(self.entering.flatten(0, 1)), self.packing)
        q, k, v = (self.packing.split(part)[0].transpose(1, 2) for part in parts)
        return q, k, v

    def attention(self, rows: slice = slice(None)) -> Tensor:
        """Attention (B, heads, rows, 1 + R + N), at least fp32, of the queries at these places; rows sum to 1."""
        q, k, _ = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in self.query_key_value())
        with torch.autocast(q.device.type, enabled=False):  # or it would round what the softmax magnifies
            return (q[:, :, rows] @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)


@torch.no_grad()
def walk(model: VisionTransformer, images: Tensor) -> Iterator[Step]:
    """The blocks in order; each is computed when it is asked for. images: (B, C, H, W), normalised."""
    x, packing, _ = model.embed([images])
    backend = model.backend(x)
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        attended = x + block.attention_branch(x, packing, backend)
        leaving = attended + block.ffn_branch(attended)
        entering, after, end = (packing.split(each)[0] for each in (x, attended, leaving))
        yield Step(index, block, entering, after, end, packing)
        x = leaving
