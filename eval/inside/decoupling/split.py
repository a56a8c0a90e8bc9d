"""What the attention of one block adds to CLS, taken apart by whom it was read from.

Attention is linear in the values, so what CLS gets is a sum over tokens, and tokens may be put into groups (Lappe and
Giese 2025, section 3, equations 3 and 6).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.models.layers import Block
from eval.inside.walk import Step

GROUPS = ("patches", "registers", "cls")
POINTS = ("branch", "residual", "output")
KINDS = ("whole", *GROUPS)


@dataclass(frozen=True)
class Choices:
    """What the paper leaves open.

    renormalise: weights of a group that is kept alone are scaled so that they sum to 1 in each head. own, bias: at the
    attention branch, the whole has in it what CLS reads from itself, and all outputs have the output bias.
    """

    renormalise: bool = False
    own: bool = True
    bias: bool = False


@dataclass(frozen=True)
class Split:
    """Of one block, for B images; parts in the order of GROUPS.

    weights: (B, heads, T), attention of CLS. shares: (B, heads, 3), what of it goes to each group.
    parts: (B, 3, D), through the output matrix and LayerScale; with `bias` (D,) they sum to the attention branch.
    alone: the same, had all other weights been 0 and these been scaled to a sum of 1. entering: (B, D), CLS before.
    Without registers their parts are 0.
    """

    weights: Tensor
    shares: Tensor
    parts: Tensor
    alone: Tensor
    bias: Tensor
    entering: Tensor

    @property
    def branch(self) -> Tensor:
        """(B, D): what the block's attention adds to CLS."""
        return self.parts.sum(1) + self.bias


def split_cls(step: Step, registers: int) -> Split:
    """Split what CLS gets from the attention of a block, at least in fp32. registers: their number."""
    q, k, v = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in step.query_key_value())
    first = 1 + registers
    groups = (slice(first, None), slice(1, first), slice(0, 1))
    with torch.autocast(q.device.type, enabled=False):
        weights = (q[:, :, :1] @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)[:, :, 0]
        shares = torch.stack([weights[..., group].sum(-1) for group in groups], dim=-1)
        read = torch.stack([(weights[:, :, None, group] @ v[:, :, group])[:, :, 0] for group in groups], dim=1)
        scaled = read / shares.movedim(-1, 1)[..., None].clamp_min(torch.finfo(read.dtype).tiny)
        parts, alone = (_through_output(step.block, each.flatten(2)) for each in (read, scaled))
        bias = step.block.ls1(step.block.attn.proj.bias.to(parts.dtype))
    return Split(weights, shares, parts, alone, bias, step.entering[:, 0].to(parts.dtype))


def _through_output(block: Block, read: Tensor) -> Tensor:
    """What was read by all heads (..., D), through the output matrix without its bias, and LayerScale."""
    return block.ls1(F.linear(read, block.attn.proj.weight.to(read.dtype)))


def outputs(split: Split, block: Block, norm: torch.nn.Module, choices: Choices) -> Tensor:
    """CLS where only one group is read, at three points: (B, 3, 4, D), in the order of POINTS and KINDS.

    At the attention branch; with the residual stream, which is what attention adds to; and after the feed-forward and
    the final norm. `whole` is as the network has it; at the branch, as `choices` say.
    """
    kept = split.alone if choices.renormalise else split.parts
    kinds = torch.cat([split.branch[:, None], kept + split.bias], dim=1)
    residual = split.entering[:, None] + kinds
    after = (residual + block.ffn_branch(residual.flatten(0, 1)).unflatten(0, residual.shape[:2])).to(residual.dtype)
    return torch.stack([branch_outputs(split, choices), residual, norm(after).to(residual.dtype)], dim=1)


def branch_outputs(split: Split, choices: Choices) -> Tensor:
    """What attention adds to CLS where all, or only one group, is read: (B, 4, D), in the order of KINDS."""
    kept = split.alone if choices.renormalise else split.parts
    whole = split.parts.sum(1) if choices.own else split.parts[:, :2].sum(1)
    found = torch.cat([whole[:, None], kept], dim=1)
    return found + split.bias if choices.bias else found
