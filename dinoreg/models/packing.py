"""Sequences of several lengths laid end to end in one (T, D) tensor, and the rows that drop path keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Layout of a packed tensor: for each resolution, how many sequences of how many tokens, in this order.

    `boundaries` holds, on the device, the row where each sequence starts and, last, T (int32): what kernels for
    sequences of different lengths ask for. It is made once a forward, outside of what is compiled. `turns`, where
    positions are rotary, is the (T, 2, head_dim) that `dinoreg.models.rotary` turns queries and keys by.
    """

    groups: tuple[tuple[int, int], ...]
    boundaries: Tensor = field(compare=False, repr=False)
    turns: Tensor | None = field(default=None, compare=False, repr=False)

    @staticmethod
    def of(
        groups: Sequence[tuple[int, int]], device: torch.device | str = "cpu", turns: Tensor | None = None
    ) -> Packing:
        """The layout of `groups` = (sequences, tokens each) pairs."""
        starts = [torch.arange(count, dtype=torch.int32) * tokens for count, tokens in groups]
        offsets = [0]
        for count, tokens in groups:
            offsets.append(offsets[-1] + count * tokens)
        host = torch.cat([s + o for s, o in zip(starts, offsets, strict=False)] + [torch.tensor([offsets[-1]])])
        host = host.to(torch.int32)
        if torch.device(device).type == "cuda":
            host = host.pin_memory()  # an ordinary copy would make the host wait for the device
        return Packing(tuple(groups), host.to(device, non_blocking=True), turns)

    @property
    def sequences(self) -> int:
        return sum(count for count, _ in self.groups)

    @property
    def tokens(self) -> int:
        """T, the rows of the packed tensor."""
        return sum(count * tokens for count, tokens in self.groups)

    @property
    def longest(self) -> int:
        return max(tokens for _, tokens in self.groups)

    def split(self, packed: Tensor) -> list[Tensor]:
        """The packed (T, ...) tensor as one (sequences, tokens, ...) view for each group."""
        sizes = [count * tokens for count, tokens in self.groups]
        parts = packed.split(sizes)
        return [part.unflatten(0, group) for part, group in zip(parts, self.groups, strict=True)]


@dataclass(frozen=True)
class KeptRows:
    """What drop path keeps in one block: rows of the packed tensor for each of the two residual branches.

    attention, ffn: int64 (T',) rows, whole sequences, all distinct; packing: the layout of these rows;
    gain: (T', 1) sequences / kept sequences of the row's group, which keeps the residual's expectation.
    """

    attention: Tensor
    ffn: Tensor
    packing: Packing
    gain: Tensor


def draw_kept_rows(
    packing: Packing, rates: Sequence[float], generator: torch.Generator | None, dtype: torch.dtype
) -> list[KeptRows | None]:
    """Rows that drop path keeps in each block of a forward, None where a block's rate is 0.

    Instead of zeroing residuals, only max(1, floor(b * (1 - rate))) of a group's b sequences go through the branch
    (DINOv2, section 5, "efficient stochastic depth"); attention and feed-forward of a block keep different ones.
    Everything is drawn here, before the first block: blocks are then deterministic and may be recomputed, and the
    number of kept rows depends on shapes only, so the host never waits for the device.
    """
    if not any(rates):
        return [None] * len(rates)
    kept_counts = {rate: [max(1, int(b * (1 - rate) + 1e-6)) for b, _ in packing.groups] for rate in set(rates)}
    shared = {rate: _layout(packing, counts, dtype) for rate, counts in kept_counts.items() if rate}
    rows = _shuffled_rows(packing, len(rates), generator)
    drawn: list[KeptRows | None] = []
    for block, rate in enumerate(rates):
        if not rate:
            drawn.append(None)
            continue
        layout, gain = shared[rate]
        sizes = [count * tokens for count, tokens in layout.groups]
        both = torch.cat([group[block, :, :size] for group, size in zip(rows, sizes, strict=True)], dim=1)
        drawn.append(KeptRows(both[0], both[1], layout, gain))
    return drawn


def _layout(packing: Packing, counts: Sequence[int], dtype: torch.dtype) -> tuple[Packing, Tensor]:
    device = packing.boundaries.device
    groups = [(count, tokens) for count, (_, tokens) in zip(counts, packing.groups, strict=True)]
    gains = [
        torch.full((count * tokens, 1), b / count, device=device, dtype=dtype)
        for count, (b, tokens) in zip(counts, packing.groups, strict=True)
    ]
    turns = packing.turns
    if turns is not None:  # those of a group's sequences are all alike
        turns = torch.cat([t[:count].flatten(0, 1) for t, count in zip(packing.split(turns), counts, strict=True)])
    return Packing.of(groups, device, turns), torch.cat(gains)


def _shuffled_rows(packing: Packing, blocks: int, generator: torch.Generator | None) -> list[Tensor]:
    """For each group, (blocks, 2, b * tokens) rows of the packed tensor with the sequences in random order."""
    device = packing.boundaries.device
    source = device if generator is None else generator.device
    shuffled, start = [], 0
    for count, tokens in packing.groups:
        keys = torch.rand(blocks, 2, count, generator=generator, device=source)
        if source.type == "cpu" and device.type == "cuda":
            keys = keys.pin_memory()
        order = keys.to(device, non_blocking=True).argsort(dim=-1)
        rows = start + order[..., None] * tokens + torch.arange(tokens, device=device)
        shuffled.append(rows.flatten(2))
        start += count * tokens
    return shuffled
