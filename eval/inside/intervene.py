"""A network run with changes made inside: to the residual stream, to what attention reads, to hidden activations.

Without changes it computes what the network computes, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoreg.models.attention import attend
from dinoreg.models.layers import Block, Mlp, SwiGLU
from dinoreg.models.packing import Packing
from dinoreg.models.vit import VisionTransformer

Edit = Callable[[Tensor], Tensor]  # (B, T, C) -> (B, T, C); may not write into what it is given


@dataclass(frozen=True)
class Groups:
    """Where the kinds of tokens lie in the sequence [CLS, registers, patches]."""

    cls: slice
    registers: slice
    patches: slice

    @staticmethod
    def of(num_registers: int) -> Groups:
        first = 1 + num_registers
        return Groups(slice(0, 1), slice(1, first), slice(first, None))


@dataclass(frozen=True)
class Reading:
    """What the tokens `readers` are given to read of the tokens `read` in one block's attention.

    All other tokens see everything as it is. instead: (B, K, D) or (K, D), what stands in the residual stream in place
    of the K tokens that are read, or None: the edges are cut, as if their scores were -inf before the softmax, so that
    the weights that are left still sum to 1.
    """

    readers: slice
    read: slice
    instead: Tensor | None = None


@dataclass(frozen=True)
class Edits:
    """All changes of one pass, by block.

    stream: of what enters a block; `depth` stands for what leaves the last one. readings: in its attention. hidden: of
    what the last matrix of its feed-forward layer reads, (B, T, H): see `hidden_activations`.
    """

    stream: Mapping[int, Edit] = field(default_factory=dict)
    readings: Mapping[int, Sequence[Reading]] = field(default_factory=dict)
    hidden: Mapping[int, Edit] = field(default_factory=dict)


UNCHANGED = Edits()


def run(model: VisionTransformer, images: Tensor, edits: Edits = UNCHANGED) -> Tensor:
    """The residual stream (B, T, D) that leaves the last block. images: (B, C, H, W), normalised."""
    x, packing, _ = model.embed([images])
    return finish(model, x, packing, edits)


def finish(
    model: VisionTransformer, x: Tensor, packing: Packing, edits: Edits = UNCHANGED, first: int = 0
) -> Tensor:  # fmt: skip
    """The same from x (T, D), packed, on, which enters the block `first`."""
    for x, _ in onward(model, x, packing, edits, first):  # noqa: B020, B007
        pass
    return packing.split(x)[0]


@torch.no_grad()
def onward(
    model: VisionTransformer, x: Tensor, packing: Packing, edits: Edits = UNCHANGED, first: int = 0
) -> Iterator[tuple[Tensor, Packing]]:
    """Packed tokens as they enter each block from `first` on and, last, leave the final one, edited."""
    backend = model.backend(x)
    x = _edited(x, packing, edits.stream.get(first))
    yield x, packing
    for index in range(first, model.depth):
        block = model.blocks[index]
        assert isinstance(block, Block)
        x = _through(block, x, packing, backend, edits.readings.get(index, ()), edits.hidden.get(index))
        x = _edited(x, packing, edits.stream.get(index + 1))
        yield x, packing


def hidden_activations(ffn: Mlp | SwiGLU, x: Tensor) -> Tensor:
    """(..., D) -> (..., H), what the last matrix of a feed-forward layer reads; one neuron is one of its columns.

    In an MLP this is the GELU's output; in SwiGLU the product silu(gate) * value, which takes either sign.
    """
    if isinstance(ffn, SwiGLU):
        gate, value = ffn.w12(x).chunk(2, dim=-1)
        return F.silu(gate) * value
    return ffn.activation(ffn.fc1(x))


def hidden_width(ffn: Mlp | SwiGLU) -> int:
    return _last(ffn).in_features


class EditedBlock(Block):
    """A block whose hidden activations are edited, whoever runs it. It shares the weights of the one it is of."""

    def __init__(self, block: Block, edit: Edit) -> None:
        nn.Module.__init__(self)
        for name, part in block.named_children():
            self.add_module(name, part)
        self.edit = edit
        self._packing: Packing | None = None

    def attention_branch(self, x: Tensor, packing: Packing, backend: str) -> Tensor:
        """Takes note of the layout, which the feed-forward branch is not told."""
        self._packing = packing
        return super().attention_branch(x, packing, backend)

    def ffn_branch(self, x: Tensor) -> Tensor:
        assert self._packing is not None
        return edited_ffn(self, x, self._packing, (self.edit,))


def edited_ffn(block: Block, x: Tensor, packing: Packing, edits: Sequence[Edit]) -> Tensor:
    """What the feed-forward branch adds to x (T, D), its hidden activations edited one after the other."""
    ffn = block.mlp
    hidden = hidden_activations(ffn, block.norm2(x))
    for edit in edits:
        hidden = _edited(hidden, packing, edit)
    return block.ls2(_last(ffn)(hidden))


def _last(ffn: Mlp | SwiGLU) -> nn.Linear:
    return ffn.w3 if isinstance(ffn, SwiGLU) else ffn.fc2


def _through(
    block: Block, x: Tensor, packing: Packing, backend: str, readings: Sequence[Reading], hidden: Edit | None
) -> Tensor:  # fmt: skip
    if readings:
        x = x + _attention(block, x, packing, backend, readings)
    else:
        x = x + block.attention_branch(x, packing, backend)
    own = (block.edit,) if isinstance(block, EditedBlock) else ()
    if edits := (*own, *([hidden] if hidden else [])):
        return x + edited_ffn(block, x, packing, edits)
    return x + block.ffn_branch(x)


def _attention(block: Block, x: Tensor, packing: Packing, backend: str, readings: Sequence[Reading]) -> Tensor:
    """The attention branch (T, D): all tokens as ever, then those anew that read something else."""
    q, k, v = block.attn.query_key_value(block.norm1(x), packing)
    mixed = packing.split(attend(q, k, v, packing, backend))[0].clone()  # (B, T, heads, head_dim)
    for each in readings:
        keys, values = _read(block, x, packing, each) if each.instead is not None else (k, v)
        query, key, value = (packing.split(part)[0].transpose(1, 2) for part in (q, keys, values))
        if each.instead is None:
            left = _others(each.read, key.shape[2], x.device)
            key, value = key[:, :, left], value[:, :, left]
        mixed[:, each.readers] = F.scaled_dot_product_attention(query[:, :, each.readers], key, value).transpose(1, 2)
    return block.ls1(block.attn.proj(mixed.flatten(0, 1).flatten(1)))


def _read(block: Block, x: Tensor, packing: Packing, reading: Reading) -> tuple[Tensor, Tensor]:
    """Keys and values, were the tokens that are read others."""
    assert reading.instead is not None
    tokens = packing.split(x)[0].clone()
    tokens[:, reading.read] = reading.instead.to(x.dtype)
    _, k, v = block.attn.query_key_value(block.norm1(tokens.flatten(0, 1)), packing)
    return k, v


def _others(read: slice, tokens: int, device: torch.device) -> Tensor:
    left = torch.ones(tokens, dtype=torch.bool, device=device)
    left[read] = False
    if not left.any():
        raise ValueError("a token must be left something to read")
    return left.nonzero()[:, 0]


def _edited(x: Tensor, packing: Packing, edit: Edit | None) -> Tensor:
    return x if edit is None else edit(packing.split(x)[0]).flatten(0, 1)
