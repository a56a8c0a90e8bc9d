"""A cluster that is not there: what a step would send over it, and how long that and the arithmetic would take.

Everything here is a model. It has not been compared with a cluster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dinoreg.config import ConfigError
from dinoreg.losses.koleo import groups_straddle
from dinoreg.parallel.shard import reshards
from dinoreg.train.flops import peak_of, step_flops, teacher_flops
from dinoreg.train.layout import Layout, Unit
from dinoreg.train.recipe import RunConfig


@dataclass(frozen=True)
class Gpu:
    """name: for `peak_of`; memory in bytes; bandwidths in bytes a second, of links in one direction."""

    name: str
    memory: float
    memory_bandwidth: float
    nvlink: float
    network: float  # one adapter a GPU


# Vendors' data sheets. Memory and its bandwidth: those of the GPUs (SXM; DGX B200's for B200). NVLink: half of the
# bidirectional 600, 900 and 1,800 GB/s of generations 3, 4 and 5. Network: DGX A100 has eight ConnectX-6 of 200 Gb/s
# for its eight GPUs, DGX H100, H200 and B200 have eight ConnectX-7 of 400 Gb/s.
GPUS = {
    "A100": Gpu("A100", 80e9, 2.04e12, 300e9, 25e9),
    "H100": Gpu("H100 SXM", 80e9, 3.35e12, 450e9, 50e9),
    "H200": Gpu("H200", 141e9, 4.8e12, 450e9, 50e9),
    "B200": Gpu("B200", 180e9, 8e12, 900e9, 50e9),
}


@dataclass
class ClusterConfig:
    """What `--dry-run` takes beside the options of a run."""

    world_size: int = 1  # ranks, one a GPU
    gpus_a_node: int = 8
    gpu: Literal["A100", "H100", "H200", "B200"] = "H100"
    utilisation: float = 0.35  # of the peak, by the arithmetic alone
    network: float = 0.0  # GB/s that a GPU gets between nodes; 0 is what the GPU's usual machine has
    disk: float = 10.0  # GB/s that all nodes together write

    def check(self) -> None:
        """Raises ConfigError."""
        for key in ("world_size", "gpus_a_node"):
            if getattr(self, key) < 1:
                raise ConfigError(f"must be at least 1, not {getattr(self, key)}", key=key)
        if self.world_size > self.gpus_a_node and self.world_size % self.gpus_a_node:
            below = self.world_size // self.gpus_a_node * self.gpus_a_node
            raise ConfigError(
                f"{self.world_size} are not whole nodes of gpus_a_node={self.gpus_a_node}; "
                f"the nearest are {below} and {below + self.gpus_a_node}",
                key="world_size",
            )
        if not 0 < self.utilisation <= 1:
            raise ConfigError(f"must be a share of the peak, more than 0, not {self.utilisation}", key="utilisation")
        if self.network < 0:
            raise ConfigError(f"must be at least 0, not {self.network}", key="network")
        if self.disk <= 0:
            raise ConfigError(f"must be more than 0, not {self.disk}", key="disk")

    @property
    def local_world(self) -> int:
        return min(self.world_size, self.gpus_a_node)

    @property
    def nodes(self) -> int:
        return self.world_size // self.local_world

    @property
    def machine(self) -> Gpu:
        return GPUS[self.gpu]

    @property
    def network_bandwidth(self) -> float:
        """Bytes a second."""
        return self.network * 1e9 or self.machine.network

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.utilisation * (peak_of(self.machine.name) or math.nan)


# -- what is sent ----------------------------------------------------------------------------------------------------

Kind = Literal["all-gather", "reduce-scatter", "all-reduce"]
Phase = Literal["teacher", "targets", "forward", "losses", "backward", "optimizer"]
OVERLAPPED: tuple[Phase, ...] = ("teacher", "forward", "backward")  # behind computation; the rest is waited for


@dataclass(frozen=True)
class Collective:
    """count alike calls in a step. size: bytes of the whole buffer, on each rank; ranks in a group."""

    kind: Kind
    phase: Phase
    count: int
    size: int
    ranks: int
    local: int  # members of a group in one node
    what: str

    @property
    def nodes(self) -> int:
        return self.ranks // self.local

    @property
    def across(self) -> float:
        """Bytes that a GPU's network adapter takes in, all calls together. An all-reduce sends everything twice."""
        once = self.count * self.size * (self.nodes - 1) / self.nodes / self.local
        return 2 * once if self.kind == "all-reduce" else once


def collectives(config: RunConfig, layout: Layout, local_world: int) -> list[Collective]:
    """All that moves between GPUs in one step. Left out: a few scalars, and what hosts agree on."""
    found = [*_weights(config, layout, local_world), *_gradients(layout, local_world)]
    world = layout.shards * layout.replicas
    if world > 1:
        found += [*_targets(config, world, local_world), *_koleo(config, world, local_world)]
    return [each for each in found if each.count and each.ranks > 1]


def _weights(config: RunConfig, layout: Layout, local_world: int) -> Iterator[Collective]:
    width = 4 if config.train.precision == "fp32" else 2
    group = layout.shards, min(layout.shards, local_world)
    again = reshards(config.efficiency, sum(unit.whole for unit in layout.units if unit.network == "student"))
    for unit in layout.units:
        for phase, count in _gathers(config, unit, layout.shards * layout.replicas, again).items():
            yield Collective("all-gather", phase, count, width * unit.shard * layout.shards, *group, "weights")


def _gathers(config: RunConfig, unit: Unit, world: int, again: bool) -> dict[Phase, int]:
    """How often a step gathers a unit. The rest of a backbone, once gathered, stays for all of a pass.

    again: what was gathered for the forward is freed, and gathered again for the backward.

    With several parts, teachers' logits are made anew whenever they are read, and KoLeo may want a forward of its own.
    """
    parts, again = config.train.accumulate, again and unit.name != "backbone"
    if unit.network == "teacher":
        if parts > 1 and unit.name.endswith("last_layer"):
            return {"targets": parts * _reads(config) * _terms(config, unit) if again else 1}
        return {"teacher": parts if again else 1}
    before = parts if again and unit.name.startswith("backbone") and _koleo_before(config, world) else 0
    return {"forward": parts + before, "backward": parts if again else 0}


def _reads(config: RunConfig) -> int:
    """How often the logits of a part are read: to balance the prototypes, and to assign."""
    targets = config.objective.targets
    return 1 + (targets.sinkhorn_iterations if targets.centering == "sinkhorn" else 1)


def _terms(config: RunConfig, unit: Unit) -> int:
    """Terms of the objective that share the head of this unit."""
    objective = config.objective
    both = objective.dino.weight > 0 and objective.ibot.weight > 0
    return 2 if both and not objective.ibot.separate_head else 1


def _gradients(layout: Layout, local_world: int) -> Iterator[Collective]:
    """fp32, once a step; hybrid sums its shards across the nodes after."""
    inside = min(layout.shards, local_world)
    for unit in layout.units:
        if unit.network == "student":
            whole = 4 * unit.trained_shard * layout.shards
            yield Collective("reduce-scatter", "backward", 1, whole, layout.shards, inside, "gradients")
            across = layout.replicas, max(1, local_world // layout.shards)
            yield Collective("all-reduce", "backward", 1, 4 * unit.trained_shard, *across, "gradients")


def _targets(config: RunConfig, world: int, local_world: int) -> Iterator[Collective]:
    """Sinkhorn's first iteration takes a maximum and a sum in fp32, the others a sum in fp64; centering one of each."""
    objective = config.objective
    shared = not objective.ibot.separate_head
    heads = [objective.dino.head] if objective.dino.weight else []
    heads += [objective.dino.head if shared else objective.ibot.head] if objective.ibot.weight else []
    for head in heads:
        if objective.targets.centering == "sinkhorn":
            sizes = [(2, 4 * head.prototypes), (objective.targets.sinkhorn_iterations - 1, 8 * head.prototypes)]
        else:
            sizes = [(1, 8 * (head.prototypes + 1))]
        for count, size in sizes:
            yield Collective("all-reduce", "targets", count, size, world, local_world, "targets")


def _koleo(config: RunConfig, world: int, local_world: int) -> Iterator[Collective]:
    """Class tokens of first and of second crops, and the gradients that other ranks' images have for them."""
    images = config.train.batch_size // world
    if not config.objective.koleo.weight or not groups_straddle(images, config.objective.koleo.group, world):
        return
    size = 4 * config.train.batch_size * config.model.size.embed_dim
    yield Collective("all-gather", "losses", 2, size, world, local_world, "KoLeo")
    yield Collective("all-reduce", "losses", 2, size, world, local_world, "KoLeo")


def _koleo_before(config: RunConfig, world: int) -> bool:
    """Whether groups cross parts, so that class tokens are wanted before the first part's losses."""
    parts, koleo = config.train.accumulate, config.objective.koleo
    share = config.train.batch_size // world // parts
    return koleo.weight > 0 and parts > 1 and groups_straddle(share, koleo.group, parts * world)


# -- how long it takes -----------------------------------------------------------------------------------------------

LINK_SHARE = 0.8  # of a link's bandwidth that collectives reach
START = 20e-6  # seconds to start a collective
HOP_INSIDE, HOP_ACROSS = 1e-6, 5e-6  # seconds from GPU to GPU, within a node and between nodes


def seconds(each: Collective, cluster: ClusterConfig) -> float:
    """All its calls, one after the other.

    Rings for gathers and reduce-scatters, trees for all-reduces (which send everything twice). A buffer goes over
    NVLink and over the adapters of all members of a node at the same time.
    """
    nodes, twice = each.nodes, 2 if each.kind == "all-reduce" else 1
    inside = twice * each.size * (each.ranks - 1) / each.ranks / cluster.machine.nvlink if each.local > 1 else 0.0
    across = each.across / each.count / cluster.network_bandwidth
    if each.kind == "all-reduce":
        hops = 2 * (math.log2(each.local) * HOP_INSIDE + math.log2(nodes) * HOP_ACROSS)
    else:
        hops = (each.ranks - nodes) * HOP_INSIDE + (nodes - 1) * HOP_ACROSS
    return each.count * (START + hops + max(inside, across) / LINK_SHARE)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. A part of the sending is hidden behind the computing."""

    computing: float
    sending: float
    total: float

    @property
    def waiting(self) -> float:
        return self.total - self.computing


def step_time(config: RunConfig, layout: Layout, cluster: ClusterConfig, images: float) -> StepTime:
    """With this many images on each rank.

    A pass takes as long as the longer of its arithmetic and its communication; balancing, KoLeo and the update are
    waited for.
    """
    computing = _computing(config, layout, cluster, images)
    moved = collectives(config, layout, cluster.local_world)
    sending = {phase: sum(seconds(m, cluster) for m in moved if m.phase == phase) for phase in _phases(moved)}
    total = 0.0
    for phase in computing.keys() | sending.keys():
        work, wire = computing.get(phase, 0.0), sending.get(phase, 0.0)
        total += max(work, wire) if phase in OVERLAPPED else work + wire
    return StepTime(sum(computing.values()), sum(sending.values()), total)


def _phases(moved: Sequence[Collective]) -> set[Phase]:
    return {each.phase for each in moved}


def _computing(config: RunConfig, layout: Layout, cluster: ClusterConfig, images: float) -> dict[Phase, float]:
    """Seconds of arithmetic by phase; the update is bound by memory."""
    teacher, executed = teacher_flops(config), step_flops(config)[1]
    forward = (executed - teacher) / 3
    again = forward if config.efficiency.activation_checkpointing == "full" else 0.0
    by_flops: Callable[[float], float] = lambda flops: images * flops / cluster.rate  # noqa: E731
    # AdamW reads weight, gradient and two moments and writes three of them; the average reads two and writes one.
    update = layout.first.weights * (7 + 3) / cluster.machine.memory_bandwidth
    return {
        "teacher": by_flops(teacher),
        "forward": by_flops(forward),
        "backward": by_flops(2 * forward + again),
        "optimizer": update,
    }
