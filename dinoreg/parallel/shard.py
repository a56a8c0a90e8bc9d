"""Where the model meets the machine: activation checkpointing, then compile, then FSDP2, in this order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dinoreg.config import ConfigError
from dinoreg.parallel.mesh import Ranks

RESHARD_ABOVE = 5e8  # parameters; together they are 1 GiB in bf16, a hundredth of a large GPU's memory


@dataclass
class EfficiencyConfig:
    """Options that change speed and memory, never results (beyond rounding)."""

    shard: Literal["full", "hybrid", "none"] = "full"  # hybrid: shard within a node, replicate across nodes
    # Free gathered weights between forward and backward: less memory, one more gather. null: of large networks only.
    reshard: bool | None = None
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False  # torch.compile each block, and what the losses do to logits
    # Multiply in float8 in the blocks: coarser rounding, faster where wide (g/14 and larger) and compiled, else slower.
    fp8: bool = False
    attention: Literal["auto", "xformers", "varlen", "sdpa", "matmul"] = "auto"


def parallelize(
    student: nn.ModuleDict,
    teacher: nn.ModuleDict,
    cfg: EfficiencyConfig,
    precision: Literal["bf16", "fp32"],
    ranks: Ranks,
) -> None:
    """Prepare both networks in place: parameter names stay as they are, parameters become sharded DTensors.

    The teacher is wrapped exactly like the student, so that its moving average pairs local shards and moves no data.
    One process in fp32 has nothing to shard and keeps plain tensors. One process in bf16 is wrapped all the same: FSDP2
    then is what keeps fp32 master weights beside bf16 compute, in the same way on a laptop and on a cluster.
    """
    backbone: nn.Module = student["backbone"]
    checkpoint_blocks(backbone, cfg.activation_checkpointing)
    if cfg.compile:
        for network in (student, teacher):
            for block in _blocks(network):
                block.compile(dynamic=False)
    if ranks.world == 1 and precision == "fp32":
        for network in (student, teacher):
            network.to(ranks.device)
        return
    mesh = data_mesh(cfg.shard, ranks)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for network in (student, teacher):
        _shard(network, mesh, policy, reshards(cfg, sum(p.numel() for p in network.parameters())))


def reshards(cfg: EfficiencyConfig, parameters: int) -> bool:
    """Whether gathered weights of a network of so many parameters, backbone and heads, are freed after the forward."""
    return parameters > RESHARD_ABOVE if cfg.reshard is None else cfg.reshard


def data_mesh(shard: str, ranks: Ranks) -> DeviceMesh:
    """The mesh for a sharding mode: one dimension shards; with two, the first replicates."""
    kind = ranks.device.type
    if shard == "full":
        return init_device_mesh(kind, (ranks.world,), mesh_dim_names=("shard",))
    inner = ranks.local_world if shard == "hybrid" else 1
    if ranks.world % inner:
        raise ConfigError(
            f"hybrid sharding wants the same number of processes on each node: {ranks.world} in all, {inner} here",
            key="efficiency.shard",
        )
    return init_device_mesh(kind, (ranks.world // inner, inner), mesh_dim_names=("replicate", "shard"))


def checkpoint_blocks(backbone: nn.Module, mode: str) -> None:
    """Recompute activations in the backward pass: all of a block (full), or what costs little for its size (selective).

    The block's `forward` is replaced on the instance rather than wrapped in a module: names of parameters stay, and the
    hooks of FSDP, which run around `forward`, are not part of what is recomputed (mixing the two is pytorch #153354).
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # blocks draw no random numbers
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _save_narrow)
    for block in backbone.blocks:  # type: ignore[union-attr]
        block.forward = _recomputed(block.forward, options)


def _recomputed(forward: Callable[..., Tensor], options: dict[str, Any]) -> Callable[..., Tensor]:
    """A function and not a partial: torch.compile leaves `checkpoint` and all below alone unless a frame calls it."""

    def run(*args: Any) -> Tensor:
        return checkpoint(forward, *args, **options)

    return run


_PRODUCTS = {  # and which of their arguments is the right-hand matrix
    torch.ops.aten.mm.default: 1,
    torch.ops.aten.addmm.default: 2,
    torch.ops.aten.bmm.default: 1,
    torch.ops.aten._scaled_mm.default: 1,
}


def _save_narrow(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what is dear to compute for its size: attention, and products that are no wider than what went in.

    Queries, keys, values and the hidden layer of the feed-forward part are three quarters of what a block keeps, and
    making them again costs 58 % of its matrix products and no attention.
    """
    keep = "attention" in str(op)
    if op in _PRODUCTS:
        inner, outer = args[_PRODUCTS[op]].shape[-2:]
        keep = outer <= inner
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _blocks(network: nn.ModuleDict) -> list[nn.Module]:
    return list(network["backbone"].blocks)  # type: ignore[arg-type]


def _shard(network: nn.ModuleDict, mesh: DeviceMesh, policy: MixedPrecisionPolicy, reshard: bool) -> None:
    """One FSDP unit a block, one for the rest of the backbone, and one each for a head's MLP and its prototypes."""
    blocks = _blocks(network)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(network["backbone"], mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(network["backbone"], "forward_tokens")
    for current, following in pairwise(blocks):
        current.set_modules_to_forward_prefetch([following])  # type: ignore[operator]
        following.set_modules_to_backward_prefetch([current])  # type: ignore[operator]
    for name, head in network.items():
        if name != "backbone":
            for part in (head.get_submodule("mlp"), head.get_submodule("last_layer")):
                fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)


def set_gradient_sync(modules: nn.Module, enabled: bool) -> None:
    """Reduce gradients over ranks in the next backward, or only accumulate them locally. Plain modules: nothing."""
    for module in modules.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(enabled, recurse=False)
            module.set_is_last_backward(enabled)
