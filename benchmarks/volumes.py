"""What processes really send in a step, counted call by call, beside what the model of dinoreg.train.cluster says."""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step import Bench
from dinoreg.config import load
from dinoreg.parallel.mesh import Ranks
from dinoreg.train.cluster import collectives
from dinoreg.train.layout import MODES, lay_out_first
from dinoreg.train.recipe import RunConfig

SCALAR = 8  # bytes; norms and flags are not modelled
KINDS = {"gather": "all-gather", "_reduce_scatter": "reduce-scatter", "allreduce": "all-reduce"}


class Sent(TorchDispatchMode):
    """Calls and bytes of whole buffers by kind of collective, scalars left out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # so that the collectives it is made of come by
        name = str(func)
        kind = next((kind for word, kind in KINDS.items() if word in name), None) if name.startswith("c10d.") else None
        if kind:
            size = sum(t.nbytes for t in _tensors_in(args[1] if kind == "reduce-scatter" else args[0]))
            if size > SCALAR:
                self.calls[kind] += 1
                self.bytes[kind] += size
        return func(*args, **(kwargs or {}))


def check_volumes(console: Console) -> list[dict[str, Any]]:
    """A real step of the demo recipe on 2 and 4 processes of this machine, in each mode, beside the model."""
    rows = []
    table = Table(title="demo on gloo, bytes a process and step: counted / predicted", title_justify="left")
    for heading in ("processes", "mode", *KINDS.values()):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for world in (2, 4):
        for mode in MODES if world > 2 else ("full", "none"):  # two are one node: hybrid is full
            counted, predicted = _counted(world, mode), _predicted(world, mode)
            rows.append({"processes": world, "mode": mode, "counted": counted, "predicted": predicted})
            cells = (f"{counted.get(kind, 0):,} / {predicted.get(kind, 0):,}" for kind in KINDS.values())
            table.add_row(str(world), mode, *cells)
    console.print(table)
    return rows


def _config(world: int, mode: str) -> RunConfig:
    words = [
        "data.sources=[synthetic]",
        f"train.batch_size={4 * world}",
        "train.precision=bf16",
        f"efficiency.shard={mode}",
    ]
    return load(RunConfig, "demo", words)


def _predicted(world: int, mode: str) -> dict[str, int]:
    """Nodes of two GPUs, so that hybrid sharding differs from the others."""
    config = _config(world, mode)
    found: Counter[str] = Counter()
    for each in collectives(config, lay_out_first(config, mode, world, 2), 2):
        found[each.kind] += each.count * each.size
    return dict(found)


def _counted(world: int, mode: str) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_step, (world, mode, folder), nprocs=world, start_method="spawn")
        each: list[dict[str, int]] = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]
    if any(found != each[0] for found in each):
        raise RuntimeError(f"the processes sent different volumes: {each}")
    return each[0]


def _step(rank: int, world: int, mode: str, folder: str) -> None:
    """The second step of a process: the first finds everything as initialisation left it."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        bench = Bench(_config(world, mode), Ranks(rank, world, rank % 2, 2, torch.device("cpu")))
        bench.step()
        with Sent() as sent:
            bench.step()
        torch.save(dict(sent.bytes), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for each in value:
            yield from _tensors_in(each)
