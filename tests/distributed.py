"""Run a function in several processes that know each other through gloo."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dinoreg.parallel.mesh import Ranks


def run_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """function(ranks, *args) in `world` new processes; what each returns, by rank. An error in one is raised here.

    `function` must be importable by name: a module's function, not a local one. Results go through torch.save.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_enter, (function, world, folder, args), nprocs=world, start_method="spawn")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _enter(rank: int, function: Callable[..., Any], world: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        result = function(Ranks(rank, world, rank, world, torch.device("cpu")), *args)
        torch.save(result, Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
