"""Wide logits (n, K) are read in pieces, so that no fp32 copy of them is ever whole in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Entries of an fp32 temporary. A few of them stay in a processor's cache (4 MiB each). On a GPU a kernel takes some 30
# microseconds for 64 MiB, several times what its launch costs the host, which smaller pieces would keep it waiting for.
CHUNK_ENTRIES = {"cuda": 2**24, "cpu": 2**20}


def row_chunks(table: Tensor) -> Iterator[tuple[int, int]]:
    """(start, stop) pairs that cover the rows of `table` (n, K)."""
    rows, width = table.shape
    step = max(1, CHUNK_ENTRIES.get(table.device.type, 2**24) // max(1, width))
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
