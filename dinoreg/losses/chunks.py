"""Wide logits (n, K) are read in pieces, so that no fp32 copy of them is ever whole in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Entries of an fp32 temporary: 16 MiB, so that a few of them stay in a large GPU's cache, and yet enough work for a
# kernel to be worth its launch.
CHUNK_ENTRIES = 2**22


def row_chunks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """(start, stop) pairs that cover `rows` rows of `width` entries."""
    step = max(1, CHUNK_ENTRIES // max(1, width))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: fp32, or fp64 where that came in."""
    return torch.promote_types(dtype, torch.float32)


def scaled(logits: Tensor, temperature: float, offset: Tensor | None = None) -> Tensor:
    """logits (n, K) / temperature + offset (K,), always a new tensor, in at least fp32.

    Type promotion by the offset makes conversion and division one kernel.
    """
    if offset is None:
        offset = torch.zeros(logits.shape[-1], dtype=wide(logits.dtype), device=logits.device)
    return torch.add(offset, logits, alpha=1 / temperature)
