"""Cross-entropy between a teacher's assignments and a student's logits, over many prototypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dinoreg.losses.chunks import row_chunks, scaled, wide

# Target distributions of rows start .. stop - 1: (stop - start, K), each summing to 1, in at least fp32.
Rows = Callable[[int, int], Tensor]


def softmax_rows(logits: Tensor, offset: Tensor, temperature: float) -> Rows:
    """softmax(logits / temperature + offset) of logits (n, K), made as it is asked for and never kept."""
    return lambda start, stop: scaled(logits[start:stop], temperature, offset).softmax(dim=-1)


def table_rows(table: Tensor, repeats: int = 1) -> Rows:
    """The rows of a table (n, K), each `repeats` times in a row."""
    if repeats == 1:
        return lambda start, stop: table[start:stop]
    return lambda start, stop: table[torch.arange(start, stop, device=table.device) // repeats]


def cross_entropy(logits: Tensor, targets: Sequence[tuple[int, Rows]], temperature: float) -> Tensor:
    """H(target, softmax(logits / temperature)) of each row, in nats, computed in at least fp32.

    Only `logits` is differentiated. Targets that sum to 1 make it logsumexp(z) - <target, z>, so that a student crop
    compared with several teacher crops costs one inner product with the mean of their targets.

    Args:
        logits: (n, K) of the student, any float dtype; its gradient comes in the same.
        targets: (number of rows, their targets) for consecutive stretches that make up all n rows.

    Returns:
        (n,)
    """
    covered = sum(count for count, _ in targets)
    if covered != len(logits):
        raise ValueError(f"targets for {covered} rows, but logits for {len(logits)}")
    return _CrossEntropy.apply(logits, targets, temperature)


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits as they came and one number a row; everything wide is recomputed, piece by piece."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Sequence[tuple[int, Rows]], temperature: float) -> Tensor:
        normaliser = torch.empty(len(logits), dtype=wide(logits.dtype), device=logits.device)
        loss = torch.empty_like(normaliser)
        for start, stop, target in _pieces(targets, logits.shape[-1]):
            z = scaled(logits[start:stop], temperature)
            normaliser[start:stop] = z.logsumexp(-1)
            loss[start:stop] = normaliser[start:stop] - z.mul_(target).sum(-1)
        ctx.save_for_backward(logits, normaliser)
        ctx.targets, ctx.temperature = targets, temperature
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, normaliser = ctx.saved_tensors
        out = torch.empty_like(logits)
        scale = grad / ctx.temperature
        for start, stop, target in _pieces(ctx.targets, logits.shape[-1]):
            z = scaled(logits[start:stop], ctx.temperature)
            excess = z.sub_(normaliser[start:stop, None]).exp_().sub_(target)
            out[start:stop] = excess.mul_(scale[start:stop, None])
        return out, None, None


def _pieces(targets: Sequence[tuple[int, Rows]], width: int) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, end, targets of these rows) over all stretches."""
    offset = 0
    for count, rows in targets:
        for start, stop in row_chunks(count, width):
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
