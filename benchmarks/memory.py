"""Peak memory of a training step beside a plain one's, counted on tensors that have shapes and no memory.

    python -m benchmarks.memory [RECIPE] [key=value ...] [--out FILE.json]
    python -m benchmarks.memory vitl14_in22k train.batch_size=64

A step that needs a large GPU can so be counted on a laptop, every storage from its birth to its death, in bf16 on one
process, with flash attention's bookkeeping. Photometrics, an allocator's fragments, CUDA's own memory and what a kernel
takes for itself are not in it; benchmarks.step measures with all of these where it can.
"""

from __future__ import annotations

import argparse
import json
import weakref
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.fake import STEPS, fake_step, load_recipe
from benchmarks.machine import GIB, describe_machine
from benchmarks.step import describe_recipe
from dinoreg.config import ConfigError
from dinoreg.parallel.mesh import Ranks, setup_ranks
from dinoreg.train.recipe import RunConfig

SIDES = ("plain", "none", "selective", "full")  # the plain step, and dinoreg's by what is recomputed


class Living(TorchDispatchMode):
    """Bytes of all storages that operations have made and that live: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0

    def __enter__(self) -> Living:
        # FSDP frees what it gathered by making its storage small, which is no operation.
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            out = self._resize(storage, size)
            if storage._cdata in self.sizes:
                self._weigh(storage._cdata, size)
            return out

        torch.UntypedStorage.resize_ = resize  # type: ignore[assignment, method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if isinstance(tensor, FakeTensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    weakref.finalize(storage, self._weigh, storage._cdata, None)
                    self._weigh(storage._cdata, storage.nbytes())
        return out

    def _weigh(self, which: int, size: int | None) -> None:
        """None: the storage is dead."""
        self.now += (size or 0) - self.sizes.get(which, 0)
        self.most = max(self.most, self.now)
        if size is None:
            self.sizes.pop(which, None)
        else:
            self.sizes[which] = size


def count(cfg: RunConfig, side: str, ranks: Ranks) -> dict[str, float]:
    """Bytes: "held" between steps, and at the "peak"."""
    with Living() as living, fake_step(cfg, side, ranks) as step:
        for _ in range(STEPS):
            living.most = 0
            step()
        return {"held": float(living.now), "peak": float(living.most)}


def show(found: dict[str, dict[str, float]], console: Console) -> None:
    """Each beside the plain step."""
    table = Table(title="GiB", title_justify="left")
    table.add_column("", no_wrap=True)
    for heading in ("between steps", "peak", "of plain"):
        table.add_column(heading, justify="right")
    for side, bytes_ in found.items():
        name = side if side == "plain" else f"dinoreg, recomputing {'nothing' if side == 'none' else side}"
        share = bytes_["peak"] / found["plain"]["peak"]
        table.add_row(name, f"{bytes_['held'] / GIB:.2f}", f"{bytes_['peak'] / GIB:.2f}", f"{share:.0%}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.memory", description="Peak memory of a step, counted.")
    parser.add_argument("recipe", nargs="?", default="vits14_in1k")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_intermixed_args()
    try:
        cfg = load_recipe(args.recipe, args.overrides)
    except ConfigError as error:
        raise SystemExit(f"benchmarks.memory: {error}") from None
    ranks, console = setup_ranks(), Console()
    found = {side: count(cfg, side, ranks) for side in track(SIDES, "counting")}
    console.print(f"{args.recipe}: {cfg.model.arch}/{cfg.model.patch_size}, batch {cfg.train.batch_size}, bf16")
    show(found, console)
    if args.out:
        content = {"machine": describe_machine(ranks), "recipe": describe_recipe(args, cfg), "bytes": found}
        args.out.write_text(json.dumps(content, indent=1))
    ranks.close()


if __name__ == "__main__":
    main()
