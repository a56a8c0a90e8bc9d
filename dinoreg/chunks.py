"""Wide logits (n, K) are read in pieces, so that no fp32 copy of them is ever whole in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import TypeVar

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


def scaling(logits: Tensor, temperature: float, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """1 / temperature () and the offset (K,), or zeros, for `scaled`; in at least fp32.

    Tensors, for the compiler would write new code for each new number.
    """
    scale = torch.full((), 1 / temperature, dtype=wide(logits.dtype), device=logits.device)
    return scale, scale.new_zeros(logits.shape[-1]) if offset is None else offset


def scaled(logits: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """logits (n, K) * scale () + offset (K,), always a new tensor, in at least fp32.

    Type promotion by the offset makes conversion and product one kernel.
    """
    return torch.addcmul(offset, logits, scale)


Work = TypeVar("Work", bound=Callable[..., object])


def compiled(work: Work, wanted: bool) -> Work:
    """`work` on a piece of any number of rows, made one kernel or two by torch.compile where that is `wanted`."""
    return _compiled(work) if wanted else work  # type: ignore[return-value]


@cache
def _compiled(work: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(work, dynamic=True)
