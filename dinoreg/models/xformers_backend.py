"""xformers' memory-efficient attention under a block-diagonal mask, as an operator that torch.compile can look past.

xformers is imported at the first call only: on a machine without its kernels the import alone prints warnings.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dinoreg.models.packing import Packing


def xformers_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """q, k, v: (T, heads, head_dim) -> the same; see `dinoreg.models.attention.attend`."""
    if q.dtype == torch.float32:
        return _eager(q, k, v, packing.groups)
    return _attention(q, k, v, [number for group in packing.groups for number in group])[0]


@torch.compiler.disable(reason="the fp32 kernel's log-sum-exp has a shape that is known only afterwards")
def _eager(q: Tensor, k: Tensor, v: Tensor, groups: tuple[tuple[int, int], ...]) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=_mask(groups, q.device))[0]


@torch.library.custom_op(
    "dinoreg::block_diagonal_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, int[] groups) -> (Tensor, Tensor)",
)
def _attention(q: Tensor, k: Tensor, v: Tensor, groups: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Output (T, heads, head_dim), and log-sum-exp (1, heads, T) for the backward pass."""
    from xformers.ops.fmha import memory_efficient_attention_forward_requires_grad

    mask = _mask(_pairs(groups), q.device)
    out, lse = memory_efficient_attention_forward_requires_grad(q[None], k[None], v[None], attn_bias=mask)
    if lse.shape != (1, q.shape[1], q.shape[0]):
        raise NotImplementedError("no flash kernel among its operators")  # another kernel answered, in another layout
    return out[0].contiguous(), lse.contiguous()


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, groups: Sequence[int]) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((1, q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op(
    "dinoreg::block_diagonal_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, int[] groups)"
    " -> (Tensor, Tensor, Tensor)",
)
def _attention_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, groups: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    from xformers.ops.fmha import memory_efficient_attention_backward

    mask = _mask(_pairs(groups), q.device)
    grads = memory_efficient_attention_backward(
        grad.contiguous()[None], out[None], lse, q[None], k[None], v[None], attn_bias=mask
    )
    dq, dk, dv = (part[0].contiguous() for part in grads)
    return dq, dk, dv


@_attention_backward.register_fake
def _(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, groups: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.groups = inputs
    ctx.save_for_backward(*output, q, k, v)


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None]:
    return (*_attention_backward(grad, *ctx.saved_tensors, ctx.groups), None)


_attention.register_autograd(_differentiate, setup_context=_remember)


def _pairs(groups: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(groups[::2], groups[1::2], strict=True))


@lru_cache(maxsize=16)  # building one copies to the device; a run uses a handful of layouts, again and again
def _mask(groups: tuple[tuple[int, int], ...], device: torch.device) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    lengths = [tokens for count, tokens in groups for _ in range(count)]
    return BlockDiagonalMask.from_seqlens(lengths, device=device)
