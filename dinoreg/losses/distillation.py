"""Cross-entropy between a teacher's assignments and a student's logits, over many prototypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinoreg.chunks import compiled, row_chunks, scaled, scaling, wide

# Target distributions of rows start .. stop - 1: (stop - start, K), each summing to 1, in at least fp32.
Rows = Callable[[int, int], Tensor]


def softmax_rows(logits: Tensor, offset: Tensor, temperature: float, compile: bool = False) -> Rows:
    """softmax(logits / temperature + offset) of logits (n, K), made as it is asked for and never kept."""
    assign, scale = compiled(_assign, compile), scaling(logits, temperature, offset)
    return lambda start, stop: assign(logits[start:stop], *scale)


def _assign(logits: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return scaled(logits, scale, offset).softmax(dim=-1)


def table_rows(table: Tensor, repeats: int = 1) -> Rows:
    """The rows of a table (n, K), each `repeats` times in a row."""
    if repeats == 1:
        return lambda start, stop: table[start:stop]
    return lambda start, stop: table[torch.arange(start, stop, device=table.device) // repeats]


def cross_entropy(
    logits: Tensor, targets: Sequence[tuple[int, Rows]], temperature: float, compile: bool = False
) -> Tensor:
    """H(target, softmax(logits / temperature)) of each row, in nats, computed in at least fp32.

    Only `logits` is differentiated, and where it is, its memory is used up: the gradient is made together with the
    value, from the same exponentials, and takes the place of the logits, the widest tensor of a step. Whoever wants to
    read them afterwards clones them before. Targets that sum to 1 make it logsumexp(z) - <target, z>, so that a student
    crop compared with several teacher crops costs one inner product with the mean of their targets.

    Args:
        logits: (n, K) of the student, any float dtype; its gradient comes in the same.
        targets: (number of rows, their targets) for consecutive stretches that make up all n rows.
        compile: by torch.compile; the same but for rounding.

    Returns:
        (n,)
    """
    covered = sum(count for count, _ in targets)
    if covered != len(logits):
        raise ValueError(f"targets for {covered} rows, but logits for {len(logits)}")
    return _CrossEntropy.apply(logits, targets, temperature, compile)


class _CrossEntropy(torch.autograd.Function):
    """Wide numbers exist piece by piece; what is kept for the backward pass is the gradient itself."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Sequence[tuple[int, Rows]], temperature: float, compile: bool
    ) -> Tensor:
        loss = torch.empty(len(logits), dtype=wide(logits.dtype), device=logits.device)
        compare, scale = compiled(_compare_, compile), scaling(logits, temperature)
        for start, stop, target in _pieces(targets, logits):
            loss[start:stop] = compare(logits[start:stop], target, *scale, ctx.needs_input_grad[0])
        ctx.save_for_backward(logits)
        ctx.temperature = temperature
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (excess,) = ctx.saved_tensors  # softmax - target
        scale = (grad / ctx.temperature)[:, None]
        for start, stop in row_chunks(excess):
            excess[start:stop].mul_(scale[start:stop])  # in fp32, which a bf16 factor of a whole row would not be
        return excess, None, None, None


def _compare_(logits: Tensor, target: Tensor, scale: Tensor, offset: Tensor, learn: bool) -> Tensor:
    """The cross-entropies (n,) of a piece; to learn by them, softmax - target takes the place of the logits."""
    z = scaled(logits, scale, offset)
    agreement = torch.linalg.vecdot(z, target)
    top = z.amax(-1, keepdim=True)
    total = z.sub_(top).exp_().sum(-1, keepdim=True)
    if learn:
        logits.copy_(z.div_(total).sub_(target))
    return (top + total.log())[:, 0] - agreement


def _pieces(targets: Sequence[tuple[int, Rows]], logits: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, end, targets of these rows) over all stretches."""
    offset = 0
    for count, rows in targets:
        for start, stop in row_chunks(logits[offset : offset + count]):
            yield offset + start, offset + stop, rows(start, stop)
        offset += count


def pair_weights(local_count: int) -> tuple[float, float]:
    """Shares of the global and the local mean cross-entropy in the DINO loss.

    Every pair of a student crop and a teacher crop of the same image, but for a crop with itself, weighs the same
    (DINO, eq. 3, with 2 global crops): 2 pairs of global crops and 2 for each local crop; 1/18 each with 8 local crops.
    """
    pairs = 2 + 2 * local_count
    return 2 / pairs, 2 * local_count / pairs


def masked_token_weights(masks: Tensor, masked_index: Tensor) -> Tensor:
    """1 / (masked patches of its crop) for each masked token, (m,) in fp32 (iBOT, eq. 2).

    masks: bool (b, 2, N); masked_index: int64 (m,), flat positions in them. The weights of a masked crop sum to 1.
    """
    counts = masks.sum(-1).flatten()
    return counts.index_select(0, masked_index // masks.shape[-1]).reciprocal()
