"""A copy of the training state in host memory, from which it is written while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor

from dinoreg.parallel.mesh import Ranks


class Staging:
    """Copies tensors to host memory that is kept for the next time; from a GPU it is pinned.

    The next `copy` overwrites what the last one of the same name returned.
    """

    def __init__(self, device: torch.device) -> None:
        self.memory: dict[str, Tensor] = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # A host thread that waits for it sleeps, and leaves its core to the others.
        self.done = torch.cuda.Event(blocking=True) if device.type == "cuda" else None

    def copy(self, state: Mapping[str, Tensor], beside: bool = False) -> dict[str, Tensor]:
        """Start to copy this rank's part of each tensor. On return nothing is copied yet, unless it was on the host.

        beside: while the device goes on with what it is given next, which must not change the tensors before
            `wait_on_device`. Else all that it is given next comes after the copy.
        """
        local = {name: _local(tensor) for name, tensor in state.items()}
        copies = {name: self._room(name, tensor) for name, tensor in local.items()}
        if self.stream is None or self.done is None:
            _fill(copies, local)
            return copies
        current = torch.cuda.current_stream()
        stream = self.stream if beside else current
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            _fill(copies, local)
            self.done.record()
        return copies

    def wait_on_device(self) -> None:
        """What the device is given next comes after the last `copy`. The host goes on."""
        if self.done is not None:
            torch.cuda.current_stream().wait_event(self.done)

    def wait_on_host(self) -> None:
        """Until the last `copy`, and those before it, are whole."""
        if self.done is not None:
            self.done.synchronize()

    def _room(self, name: str, tensor: Tensor) -> Tensor:
        room = self.memory.get(name)
        if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
            room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.stream is not None)
            self.memory[name] = room
        return room


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _fill(copies: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> None:
    for name, copy in copies.items():
        copy.copy_(originals[name], non_blocking=True)


def share_of(state: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The tensors that this rank has to write: of those that several ranks hold alike, each is for one of them.

    Ranks decide alike without asking each other: a tensor is for the replica that has the least to write so far.
    """
    loads: dict[int, list[int]] = {}  # bytes of each replica, by how many replicas there are
    mine = {}
    for name, tensor in state.items():
        replica, replicas = _replica(tensor, ranks)
        load = loads.setdefault(replicas, [0] * replicas)
        writer = load.index(min(load))
        load[writer] += tensor.numel() * tensor.element_size()
        if writer == replica:
            mine[name] = tensor
    return mine


def _replica(tensor: Tensor, ranks: Ranks) -> tuple[int, int]:
    """Which copy of it this rank holds, of how many."""
    if not isinstance(tensor, DTensor):
        return ranks.rank, ranks.world
    replica, replicas = 0, 1
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            replica = replica * tensor.device_mesh.size(dim) + tensor.device_mesh.get_local_rank(dim)
            replicas *= tensor.device_mesh.size(dim)
    return replica, replicas


class StagedPlanner(DefaultSavePlanner):
    """Saves copies in the place of tensors, which are only asked what they are: the copies know of no shards."""

    def __init__(self, state: Mapping[str, Tensor], copies: Mapping[str, Tensor], ranks: Ranks) -> None:
        super().__init__(flatten_state_dict=False)
        self.local_plan: SavePlan = create_default_local_save_plan(dict(state), ranks.is_main)
        self.copies = copies

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """All is known already."""

    def create_local_plan(self) -> SavePlan:
        return self.local_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.copies[write_item.index.fqn]
