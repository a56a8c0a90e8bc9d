"""The teacher's weights: a moving average of the student's, taken shard by shard."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@torch.no_grad()
def update_average(average: nn.Module, source: nn.Module, momentum: float, skip: Tensor | None = None) -> None:
    """average = momentum * average + (1 - momentum) * source, for all parameters; no data moves between ranks.

    skip: a device scalar; where it is 1 nothing changes, and nobody had to wait for it.

    Raises RuntimeError when the two are not wrapped alike, so that a rank would pair different shards.
    """
    release(average)
    mine, theirs = _local_parameters(average), _local_parameters(source)
    if [p.shape for p in mine] != [p.shape for p in theirs]:
        raise RuntimeError("teacher and student are sharded differently: wrap both in the same way")
    if skip is None:
        torch._foreach_lerp_(mine, theirs, 1 - momentum)
    else:
        torch._foreach_lerp_(mine, theirs, [(1 - momentum) * (1 - skip)] * len(mine))


def release(network: nn.Module) -> None:
    """Free weights that FSDP gathered for a forward and keeps for a backward that never comes.

    It gathers only what is not gathered: without this, a network that only runs forward would compute with the weights
    of its first step for ever, however its shards change. Plain modules: nothing.
    """
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _local_parameters(network: nn.Module) -> list[Tensor]:
    return [p.to_local() if isinstance(p, DTensor) else p for p in network.parameters()]
