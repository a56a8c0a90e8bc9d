"""Sinkhorn-Knopp on logits that may lie in several pieces, on several ranks, or in no memory at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dinoreg.chunks import compiled, row_chunks, scaled, scaling
from dinoreg.parallel.mesh import Ranks

# Logits (n, K) of a part of the effective batch, or a function that computes them anew each time it is called.
Tile = Tensor | Callable[[], Tensor]


def read_tile(tile: Tile) -> Tensor:
    """The logits (n, K) of a tile."""
    return tile if isinstance(tile, Tensor) else tile()


@torch.no_grad()
def sinkhorn_offset(
    tiles: Sequence[Tile], temperature: float, iterations: int, ranks: Ranks, compile: bool = False
) -> Tensor:
    """The offset (K,) in fp32 for which softmax(logits / temperature + offset) are Sinkhorn-Knopp's assignments.

    Sinkhorn-Knopp (Cuturi 2013; SwAV, section 3.1) scales the rows and columns of Q = exp(logits / T) transposed,
    K prototypes x B samples, in turn: each iteration makes all rows sum to 1/K, then all columns to 1/B. The result is
    diag(u) Q diag(v), so the vector u is enough: its columns, times B, are softmax(logits / T + log u), and factors
    common to all prototypes cancel, so B need not even be known. Neither Q nor v is stored; an iteration reads each
    tile once:

        log u_k = -log sum_b exp(logits_bk / T)           first iteration
        log u_k -= log sum_b softmax_k(logits_b / T + log u)    the others

    The first sum is a logsumexp, so no size of logits overflows. In the later ones every row has an entry of at least
    1 / (K B), hence a sum that fp32 can hold.

    Args:
        tiles: this rank's samples, B_i x K each, of any float dtype, possibly of no rows.
        iterations: at least 1; DINOv2 makes 3.
        ranks: all of them must call, with the same number of tiles.
        compile: by torch.compile; the same but for rounding.
    """
    use = compiled(_use, compile)
    offset = -_log_row_sums(tiles, temperature, ranks, compile)
    for _ in range(iterations - 1):
        sums = torch.zeros_like(offset, dtype=torch.float64)
        for chunk in _chunks(tiles):
            sums += use(chunk, *scaling(chunk, temperature, offset))
        offset = offset - ranks.sum_(sums).log().to(offset.dtype)
    # Without a single sample anywhere there is nothing to balance; an infinite offset would become NaN downstream.
    return offset.masked_fill(offset.isposinf(), 0)


def _log_row_sums(tiles: Sequence[Tile], temperature: float, ranks: Ranks, compile: bool) -> Tensor:
    """log sum_b exp(logits_bk / T) over the samples of all ranks, (K,)."""
    log_sums = compiled(_log_sums, compile)
    total: Tensor | None = None
    for chunk in _chunks(tiles):
        part = log_sums(chunk, *scaling(chunk, temperature))
        total = part if total is None else torch.logaddexp(total, part)
    assert total is not None, "no tiles"
    top = ranks.max_(total.clone()).clamp_min(torch.finfo(total.dtype).min)
    return ranks.sum_((total - top).exp()).log() + top


def _log_sums(logits: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return scaled(logits, scale, offset).logsumexp(0)


def _use(logits: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """How much of a piece's samples is assigned to each prototype."""
    return scaled(logits, scale, offset).softmax(dim=-1).sum(0)


def _chunks(tiles: Sequence[Tile]) -> Iterator[Tensor]:
    """Pieces of the logits; a tile without rows gives one piece without rows."""
    for tile in tiles:
        logits = read_tile(tile)
        if not len(logits):
            yield logits
        for start, stop in row_chunks(logits):
            yield logits[start:stop]
