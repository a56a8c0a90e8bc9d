"""What is added up over the images, and brought together from all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dinoreg.parallel.mesh import Ranks

GROUPS = 50  # into which images are dealt; what is kept by group is drawn anew by whole groups, for intervals


@dataclass
class Tally:
    """sums: by name, added up. rows: by name, a row an image (B, ...), "place" among them."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)


def add_up(tallies: Iterable[Tally], ranks: Ranks) -> Tally:
    """Of all batches and all ranks, everywhere and on the host; rows in the order of their places."""
    sums: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = {}
    for tally in tallies:
        for name, value in tally.sums.items():
            sums[name] = sums[name] + value if name in sums else value
        for name, value in tally.rows.items():
            rows.setdefault(name, []).append(value.cpu())
    mine = Tally(
        {name: value.cpu() for name, value in sums.items()}, {name: torch.cat(each) for name, each in rows.items()}
    )
    return _together(ranks.gather_objects(mine))


def _together(parts: list[Tally]) -> Tally:
    """A rank without images has nothing to add, not even names."""
    parts = [part for part in parts if part.sums or part.rows]
    if not parts:
        return Tally()
    sums = {name: torch.stack([part.sums[name] for part in parts]).sum(0) for name in parts[0].sums}
    rows = {name: torch.cat([part.rows[name] for part in parts]) for name in parts[0].rows}
    if "place" in rows:
        order = rows["place"].argsort(stable=True)
        rows = {name: value[order] for name, value in rows.items()}
    return Tally(sums, rows)


def by_group(values: Tensor, places: Tensor) -> Tensor:
    """Rows (B, ...) summed by the group of their image: (GROUPS, ...). places: int64 (B,)."""
    summed = values.new_zeros((GROUPS, *values.shape[1:]))
    return summed.index_add_(0, (places % GROUPS).to(values.device), values)
