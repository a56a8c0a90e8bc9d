"""How a run would lie on many ranks: the real networks on the meta device, wrapped by the real `parallelize`.

torch's fake process group lets one process be any rank of any world; its collectives do nothing.
"""

from __future__ import annotations

import heapq
import math
import pickle
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from dinoreg.objectives.self_distillation import SelfDistillation
from dinoreg.parallel.mesh import Ranks
from dinoreg.parallel.shard import parallelize
from dinoreg.train.optimizer import Optimizer
from dinoreg.train.recipe import RunConfig

MODES = ("full", "hybrid", "none")


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP gathers together, in elements."""

    network: str  # student or teacher
    name: str  # of the module: backbone, backbone.blocks.3, dino_head.mlp, ...
    whole: int
    shard: int  # what every rank gives to the gather: its part, padded to the size of the first
    trained_shard: int  # the same, of what has gradients


@dataclass(frozen=True)
class Share:
    """Bytes that a rank holds between steps; the gradients from the backward pass to the update."""

    weights: int
    gradients: int
    moments: int
    teacher: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.teacher


@dataclass(frozen=True)
class Saved:
    """A checkpoint by torch.distributed.checkpoint: a file a rank, and the table of all pieces."""

    total: int  # bytes of tensors
    least: int  # in the smallest file, of those looked at
    most: int
    files: int
    pieces: int  # entries of the table
    table: int  # its bytes


@dataclass(frozen=True)
class Layout:
    """One sharding mode. shards x replicas = ranks."""

    mode: str
    shards: int
    replicas: int
    units: list[Unit]
    first: Share
    last: Share

    @property
    def padding(self) -> float:
        """Share of what is gathered that is nobody's weight."""
        return 1 - sum(unit.whole for unit in self.units) / sum(unit.shard * self.shards for unit in self.units)


def lay_out(config: RunConfig, mode: str, world: int, local_world: int) -> tuple[Layout, Saved]:
    """As the first and the last rank have it: where parts are uneven, they hold the most and the least."""
    looks = []
    for rank in [0, world - 1] if _shards(mode, world, local_world) > 1 else [0]:
        with pretended(rank, world, local_world) as ranks:
            objective = build(config, mode, ranks)
            looks.append((_units(objective), _share(objective), save_plan(objective, config, rank)))
    (units, first, plan), (_, last, other) = looks[0], looks[-1]
    shards = _shards(mode, world, local_world)
    layout = Layout(mode, shards, world // shards, units, first, last)
    return layout, _saved((plan, other), shards, layout.replicas)


def lay_out_first(config: RunConfig, mode: str, world: int, local_world: int) -> Layout:
    """As the first rank has it, who stands for the last too: faster."""
    with pretended(0, world, local_world) as ranks:
        objective = build(config, mode, ranks)
        shards, share = _shards(mode, world, local_world), _share(objective)
        return Layout(mode, shards, world // shards, _units(objective), share, share)


def _shards(mode: str, world: int, local_world: int) -> int:
    return {"full": world, "hybrid": local_world, "none": 1}[mode]


@contextmanager
def pretended(rank: int, world: int, local_world: int) -> Iterator[Ranks]:
    """Be one of `world` ranks while the context lasts. No other process group may exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    excepthook = sys.excepthook  # which torch replaces by one that names the rank
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield Ranks(rank, world, rank % local_world, local_world, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
        sys.excepthook = excepthook
        # DTensor remembers results by meshes that compare equal, whichever rank they were made on.
        _clear_sharding_prop_cache()


def build(config: RunConfig, mode: str, ranks: Ranks) -> SelfDistillation:
    """Student and teacher of this rank, without memory."""
    with torch.device("meta"):
        objective = SelfDistillation(config.objective, config.model, ranks, attention="sdpa")
    if ranks.world == 1 and config.train.precision == "fp32":
        ranks = replace(ranks, device=torch.device("meta"))  # plain tensors, which would be moved to the device
    efficiency = replace(config.efficiency, shard=mode, compile=False)  # type: ignore[arg-type]
    precision: Literal["bf16", "fp32"] = "fp32" if config.train.precision == "fp32" else "bf16"  # as GPUs will have it
    parallelize(objective.student, objective.teacher, efficiency, precision, ranks)
    return objective


def _units(objective: SelfDistillation) -> list[Unit]:
    return [*units_of("student", objective.student), *units_of("teacher", objective.teacher)]


def units_of(network_name: str, network: nn.Module) -> list[Unit]:
    """FSDP's units: a parameter belongs to the nearest wrapped module above it."""
    wrapped = [name for name, module in network.named_modules() if isinstance(module, FSDPModule)]
    members: dict[str, list[nn.Parameter]] = {name: [] for name in wrapped}
    for name, parameter in network.named_parameters():
        above = [unit for unit in wrapped if name.startswith(unit + ".")]
        if above:
            members[max(above, key=len)].append(parameter)
    return [
        Unit(
            network_name,
            name,
            whole=sum(parameter.numel() for parameter in parameters),
            shard=sum(_padded_shard(parameter) for parameter in parameters),
            trained_shard=sum(_padded_shard(parameter) for parameter in parameters if parameter.requires_grad),
        )
        for name, parameters in members.items()
    ]


def _padded_shard(parameter: Tensor) -> int:
    """Elements that a rank gives to a gather: FSDP2 cuts the first dimension, and pads the parts to the first one's."""
    assert isinstance(parameter, DTensor)
    rows, rest = parameter.shape[0], math.prod(parameter.shape[1:])
    return math.ceil(rows / parameter.device_mesh.size(-1)) * rest


def _share(objective: SelfDistillation) -> Share:
    student = list(objective.student.parameters())
    gradients = _local_bytes(parameter for parameter in student if parameter.requires_grad)
    return Share(_local_bytes(student), gradients, 2 * gradients, _local_bytes(objective.teacher.parameters()))


def _local_bytes(tensors: Iterable[Tensor]) -> int:
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


# -- checkpoint ------------------------------------------------------------------------------------------------------


def save_plan(objective: SelfDistillation, config: RunConfig, rank: int) -> SavePlan:
    """What this rank would offer to write, by DCP's own planner."""
    adamw = Optimizer(objective.student, config.optim).adamw
    for group in adamw.param_groups:
        for parameter in group["params"]:  # what a first step would leave, which no kernel can do without memory
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adamw.state[parameter] = {"step": torch.zeros(()), **moments}
    state: dict[str, Any] = {
        "objective": objective.state_dict(),
        "optimizer": get_optimizer_state_dict(objective.student, adamw),
    }
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=rank == 0)
    return planner.create_local_plan()


def _saved(plans: tuple[SavePlan, SavePlan], shards: int, replicas: int) -> Saved:
    """plans: of the first and of the last shard. What is not sharded counts for the first."""
    dealt = [deal_pieces(plan.items, replicas) for plan in plans]
    sizes = [sum(_bytes(item) for item in mine) for group in dealt for mine in group]
    items = plans[0].items
    pieces = sum(_pieces(item, shards) for item in items)
    table = len(pickle.dumps([(item.index, item.tensor_data, "__1000_0.distcp", 0, 0) for item in items]))
    return Saved(
        total=sum(_whole_bytes(item) for item in items),
        least=min(sizes),
        most=max(sizes),
        files=shards * sum(bool(mine) for mine in dealt[0]),
        pieces=pieces,
        table=table * pieces // len(items),
    )


def deal_pieces(items: Sequence[WriteItem], replicas: int) -> list[list[WriteItem]]:
    """Which of the ranks that hold the same writes what, as DCP deals: each piece to the one that has least so far.

    DCP counts the whole tensor for each of its pieces.
    """
    dealt: list[list[WriteItem]] = [[] for _ in range(replicas)]
    loads = [(0, rank) for rank in range(replicas)]
    for item in items:
        load, rank = loads[0]
        dealt[rank].append(item)
        heapq.heapreplace(loads, (load + (item.tensor_storage_size() or 1), rank))
    return dealt


def _pieces(item: WriteItem, shards: int) -> int:
    """Into how many the tensor of the first rank's piece is cut; ranks that got nothing of it share one empty piece."""
    data = item.tensor_data
    if data is None or item.type is not WriteItemType.SHARD:
        return 1
    filled = math.ceil(data.size[0] / data.chunk.sizes[0])
    return filled + (filled < shards)


def _bytes(item: WriteItem) -> int:
    """Of this piece. DCP's own `tensor_storage_size` is that of the whole tensor."""
    data = item.tensor_data
    return data.chunk.sizes.numel() * data.properties.dtype.itemsize if data is not None else 0


def _whole_bytes(item: WriteItem) -> int:
    data = item.tensor_data
    return data.size.numel() * data.properties.dtype.itemsize if data is not None else 0
