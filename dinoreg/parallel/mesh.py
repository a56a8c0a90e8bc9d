"""Who am I, and how do ranks talk: the only file that knows about launchers and process groups."""

from __future__ import annotations

import os
import re
import resource
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

CONTROL_PATIENCE = timedelta(days=1)  # the main process may index shards for hours; who hangs, parallel/watch.py finds


class PortTaken(RuntimeError):
    """Another program listens where the ranks were to meet. A job that starts again meets elsewhere."""


@dataclass(frozen=True)
class Ranks:
    """One process among `world`. Every collective of the project goes through here and costs nothing alone."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # gloo, for what hosts agree on while devices compute; None: the default
    store: dist.Store | None = None  # where the processes of this launch found each other; None without peers

    @staticmethod
    def alone(device: str | torch.device = "cpu") -> Ranks:
        """A process without peers and without a process group."""
        return Ranks(0, 1, 0, 1, torch.device(device))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Maximum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate equal-shaped (n, ...) tensors of all ranks to (world * n, ...), differentiably."""
        return _Gather.apply(tensor, self) if self.world > 1 else tensor

    def broadcast_object(self, value: T) -> T:
        """The main process's picklable value, everywhere."""
        if self.world == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def agree(self, wish: int) -> int:
        """The largest of the numbers that the ranks bring, on the host: no device is waited for."""
        if self.world == 1:
            return wish
        box = torch.tensor(wish)
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.control)
        return int(box)

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` gives on the main process, everywhere. Where it raises, the others leave in silence."""
        value, trouble = None, None
        if self.is_main:
            try:
                value = make()
            except Exception as error:
                trouble = error
        if self.agree(int(trouble is not None)):
            leaving: BaseException = trouble or SystemExit(2)
            leaving.together = True  # type: ignore[attr-defined]  # nobody is to blame: parallel/watch.py
            raise leaving
        return self.broadcast_object(value)  # type: ignore[return-value]

    def gather_objects(self, value: T) -> list[T]:
        """The picklable values of all ranks in their order, everywhere; on the host, as `agree`."""
        if self.world == 1:
            return [value]
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value, group=self.control)
        return box

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    """all_gather whose backward sums what every rank's loss says about this rank's rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.rows = ranks, len(tensor)
        out = tensor.new_empty((ranks.world * len(tensor), *tensor.shape[1:]))
        dist.all_gather(list(out.chunk(ranks.world)), tensor.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = ctx.ranks.sum_(grad.contiguous().clone())
        start = ctx.ranks.rank * ctx.rows
        return total[start : start + ctx.rows], None


def setup_ranks(timeout_minutes: float = 30) -> Ranks:
    """Join the other processes of this launch: torchrun's, srun's, or nobody.

    torchrun is asked first, because inside a Slurm allocation both sets of variables exist and the inner launcher is
    the one that started this process. A single process gets a group of its own too, since FSDP2 wants a mesh.
    Raises PortTaken on the first process, ValueError where there are fewer GPUs than processes.
    """
    rank, world, local_rank, local_world = _from_environment()
    device = _device(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _raise_file_limit()
    # Which process is at fault is for parallel/watch.py to say; NCCL's own guard would end this one first, unnamed.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    timeout = timedelta(minutes=timeout_minutes)
    store: dist.Store = dist.HashStore() if world == 1 else _meet(rank, world)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("ranks", store), rank=rank, world_size=world, timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )  # fmt: skip
    control = dist.new_group(backend="gloo", timeout=CONTROL_PATIENCE) if world > 1 else None
    return Ranks(rank, world, local_rank, local_world, device, control, store if world > 1 else None)


def _meet(rank: int, world: int) -> dist.Store:
    try:
        return next(dist.rendezvous("env://", rank, world))[0]
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port, host = os.environ["MASTER_PORT"], socket.gethostname()
        raise PortTaken(f"port {port} of {host}, where the processes were to meet, is taken; try again") from None


def _raise_file_limit() -> None:
    """As many open files as the machine allows: 1,000 ranks connect to the store of the first, twice each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 1 and "SLURM_PROCID" in os.environ:
        return torch.device("cuda", 0)  # srun --gpus-per-task=1 shows each task its own GPU alone
    if local_rank >= visible:
        raise ValueError(
            f"process {local_rank} on {socket.gethostname()} has no GPU: {visible} are visible; start one process a GPU"
        )
    return torch.device("cuda", local_rank)


def _from_environment() -> tuple[int, int, int, int]:
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env or {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} <= env.keys():
        world = int(env["WORLD_SIZE"])
        return int(env["RANK"]), world, int(env["LOCAL_RANK"]), int(env.get("LOCAL_WORLD_SIZE", world))
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        world = int(env["SLURM_NTASKS"])
        if "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = _first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "localhost")))
        # The same for every process of a step, different for two steps that share a node and for the next start of a
        # job that found its port taken; below what Linux gives to anybody who asks for none (32768 and above).
        step, restart = int(re.sub(r"\D", "", env["SLURM_STEP_ID"]) or 0), int(env.get("SLURM_RESTART_COUNT", "0"))
        key = int(env["SLURM_JOB_ID"]) * 31 + step + restart * 7919
        env.setdefault("MASTER_PORT", str(20000 + key % 12000))
        per_node = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", str(world)))
        local_world = int(re.split(r"\D", per_node)[0])  # `8(x4)`: eight on each of four nodes
        return int(env["SLURM_PROCID"]), world, int(env["SLURM_LOCALID"]), local_world
    return 0, 1, 0, 1


def _first_host(nodelist: str) -> str:
    """`node[03-07,9]` -> `node03`, by Slurm's own tool where it exists."""
    try:
        shown = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True)
        return shown.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        head = re.match(r"([^\[,]+)(?:\[(\d+))?", nodelist)
        return head.group(1) + (head.group(2) or "") if head else "localhost"
