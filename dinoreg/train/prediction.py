"""All that is predicted of one sharding mode on a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from dinoreg.train.cluster import ClusterConfig, Collective, StepTime, collectives, step_time
from dinoreg.train.layout import Layout, Saved, lay_out, lay_out_first
from dinoreg.train.plan import Memory, estimate_memory
from dinoreg.train.recipe import RunConfig

CONTEXT = 1.5 * 2**30  # bytes that CUDA itself takes


@dataclass(frozen=True)
class Prediction:
    """One sharding mode."""

    mode: str
    chosen: bool  # by the configuration
    layout: Layout
    saved: Saved
    memory: Memory
    moved: list[Collective]
    time: StepTime
    one_node: StepTime  # with as many images on each GPU

    @property
    def buffer(self) -> int:
        """Bytes of the largest collective: the gradients of a unit, padded, before they are reduced."""
        sizes = (unit.trained_shard for unit in self.layout.units)
        return 4 * max(sizes, default=0) * self.layout.shards if self.layout.shards > 1 else 0

    @property
    def needed(self) -> float:
        """Bytes on the GPU that has most."""
        memory = self.memory
        return self.layout.first.total + memory.gathered + self.buffer + memory.activations + memory.logits

    def fits(self, cluster: ClusterConfig) -> bool:
        return self.needed + CONTEXT < cluster.machine.memory


def predict(config: RunConfig, mode: str, cluster: ClusterConfig) -> Prediction:
    world, local_world = cluster.world_size, cluster.local_world
    layout, saved = lay_out(config, mode, world, local_world)
    images = config.train.batch_size / world
    node = layout if cluster.nodes == 1 else lay_out_first(config, mode, local_world, local_world)
    return Prediction(
        mode,
        mode == config.efficiency.shard,
        layout,
        saved,
        estimate_memory(config, world),
        collectives(config, layout, local_world),
        step_time(config, layout, cluster, images),
        step_time(config, node, cluster, images),
    )
