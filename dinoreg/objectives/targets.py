"""From the teacher's logits to the distributions that the student has to match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dinoreg.losses.centering import centering_offset, update_center_
from dinoreg.losses.distillation import Rows, softmax_rows, table_rows
from dinoreg.losses.sinkhorn import Tile, read_tile, sinkhorn_offset
from dinoreg.parallel.mesh import Ranks


@dataclass
class TargetConfig:
    """How teacher outputs become targets."""

    centering: Literal["sinkhorn", "centering"] = "sinkhorn"
    sinkhorn_iterations: int = 3
    center_momentum: float = 0.9
    student_temperature: float = 0.1
    temperature: float = 0.07
    temperature_start: float = 0.04
    temperature_warmup: int | float | str = 0.3  # linear from temperature_start


class Targets(nn.Module):
    """Balances the use of prototypes over the whole effective batch, for each term of the objective by itself.

    Centers are buffers, so that checkpoints hold them.
    """

    def __init__(self, cfg: TargetConfig, prototypes: Mapping[str, int], ranks: Ranks, compile: bool = False) -> None:
        super().__init__()
        self.cfg, self.ranks, self.prototypes, self.compiled = cfg, ranks, dict(prototypes), compile
        self._before: dict[str, Tensor] = {}  # centers as they were before the step
        if cfg.centering == "centering":
            for term, count in prototypes.items():
                self.register_buffer(f"{term}_center", torch.empty(count))

    def init_weights(self) -> None:
        for center in self.buffers():
            center.zero_()

    def forward(self, tiles: Mapping[str, Sequence[Tile]], temperature: float) -> BalancedTargets:
        """Targets from the teacher's logits: for each term ("dino", "ibot") one tile a part. Moves the centers on."""
        offsets = {term: self._offset(term, tiles[term], temperature) for term in tiles}
        return BalancedTargets(tiles, offsets, temperature, self.compiled)

    @torch.no_grad()
    def take_back(self, skip: Tensor) -> None:
        """Centers as they were before the last call, where the device scalar `skip` is 1."""
        for name, before in self._before.items():
            center = self.get_buffer(name)
            center.copy_(torch.where(skip > 0, before, center))

    def _offset(self, term: str, tiles: Sequence[Tile], temperature: float) -> Tensor:
        if self.cfg.centering == "sinkhorn":
            return sinkhorn_offset(tiles, temperature, self.cfg.sinkhorn_iterations, self.ranks, self.compiled)
        center = self.get_buffer(f"{term}_center")
        self._before[f"{term}_center"] = center.clone()
        offset = centering_offset(center, temperature)
        update_center_(center, tiles, self.cfg.center_momentum, self.ranks)
        return offset


# For each loss, in the order of the student's rows: how many rows, and their target distributions.
Assignments = dict[str, tuple[int, Rows]]


@dataclass
class BalancedTargets:
    """softmax(logits / temperature + offset), with one offset (K,) for all samples of a term."""

    tiles: Mapping[str, Sequence[Tile]]
    offsets: Mapping[str, Tensor]
    temperature: float
    compiled: bool

    @torch.no_grad()
    def assign(self, part: int, local_count: int) -> dict[str, Assignments]:
        """What the student has to match in one part, by term.

        A masked patch is compared with what the teacher, which sees it, says of the same patch.
        """
        rows = {term: self._rows(term, part) for term in self.tiles}
        assigned = {}
        if "dino" in rows:
            count, of = rows["dino"]
            assigned["dino"] = class_token_assignments(of(0, count), local_count)
        if "ibot" in rows:
            assigned["ibot"] = {"ibot": rows["ibot"]}
        return assigned

    def _rows(self, term: str, part: int) -> tuple[int, Rows]:
        logits = read_tile(self.tiles[term][part])
        return len(logits), softmax_rows(logits, self.offsets[term], self.temperature, self.compiled)


def class_token_assignments(targets: Tensor, local_count: int) -> Assignments:
    """Targets of class tokens: first of all global crops, then of all local crops, image by image.

    A global crop is compared with the teacher's view of the other one; a local crop with both, that is, with the mean
    of their targets, since cross-entropy is linear in the target. targets: (2 b, K) of the teacher, image by image.
    """
    crops = targets.unflatten(0, (-1, 2))
    assigned = {"dino_global": (len(targets), table_rows(crops.flip(1).flatten(0, 1)))}
    if local_count:
        assigned["dino_local"] = (len(crops) * local_count, table_rows(crops.mean(1), local_count))
    return assigned
