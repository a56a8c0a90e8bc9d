"""How the time and the memory of a step grow with batch, crops, registers, resolution and depth.

    python -m benchmarks.growth [RECIPE] [key=value ...] [--steps 5] [--out FILE.json]

Each axis is varied alone. Beside the measured times stands what the operations of the step (dinoreg.train.flops) would
make of the first row of the axis: where both grow alike, growth is explained by arithmetic. On a GPU memory is the
allocator's peak; elsewhere it is what the process holds at most, each row in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.machine import GIB, describe_machine
from benchmarks.step import Bench, measure
from dinoreg.config import load
from dinoreg.parallel.mesh import Ranks, setup_ranks
from dinoreg.train.flops import step_flops
from dinoreg.train.recipe import RunConfig

AXES: dict[str, tuple[str, tuple[int, ...]]] = {
    "batch": ("train.batch_size", (4, 8, 16, 32)),
    "local crops": ("crops.local_count", (0, 4, 8, 16)),
    "registers": ("model.num_registers", (0, 4, 8, 16)),
    "global crop, patches a side": ("crops.global_size", (8, 12, 16, 24)),
    "depth": ("model.depth", (3, 6, 12, 24)),
}


def words_of(key: str, value: int, config: RunConfig) -> list[str]:
    """Options that set one axis."""
    if key == "crops.global_size":
        side = value * config.model.patch_size
        return [f"{key}={side}", f"model.image_size={side}"]
    return [f"{key}={value}"]


def one(words: list[str], steps: int) -> dict[str, Any]:
    """Measured in this process."""
    ranks = setup_ranks()
    config = load(RunConfig, words[0], words[1:])
    found = measure(Bench(config, ranks), steps, warmup=2)
    ranks.close()
    return {
        "seconds": found["seconds_per_step"],
        "peak": found["peak_memory_gib"] * GIB,
        "flops": step_flops(config)[1] * config.train.batch_size,
    }


def apart(words: list[str], steps: int) -> dict[str, Any]:
    """Measured in a process of its own, which starts with nothing in memory."""
    command = [sys.executable, "-m", "benchmarks.growth", "--one", json.dumps(words), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def show(axis: str, rows: list[dict[str, Any]], console: Console) -> None:
    """Each row beside the first one of its axis."""
    first = rows[0]
    table = Table(title=axis, title_justify="left")
    for heading in (axis, "ms a step", "growth", "of operations", "peak GiB", "growth"):
        table.add_column(heading, justify="right")
    for row in rows:
        growth = {key: f"{row[key] / first[key]:.2f} x" for key in ("seconds", "flops", "peak")}
        time, peak = f"{1e3 * row['seconds']:.0f}", f"{row['peak'] / GIB:.2f}"
        table.add_row(str(row["value"]), time, growth["seconds"], growth["flops"], peak, growth["peak"])
    console.print(table)


def plot(axes: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Time and memory against each axis, measured and by operations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(axes), 5.4), layout="constrained")
    grid = figure.subplots(2, len(axes), squeeze=False)
    for (axis, rows), above, below in zip(axes.items(), grid[0], grid[1], strict=True):
        values = [row["value"] for row in rows]
        above.plot(values, [1e3 * row["seconds"] for row in rows], marker="o", label="measured")
        scale = 1e3 * rows[0]["seconds"] / rows[0]["flops"]
        above.plot(values, [scale * row["flops"] for row in rows], "--", color="grey", label="as operations grow")
        below.plot(values, [row["peak"] / GIB for row in rows], marker="o", color="C1")
        below.set_xlabel(axis)
        for axes_ in (above, below):
            axes_.set_ylim(bottom=0)
            axes_.grid(alpha=0.3)
    grid[0][0].set_ylabel("ms a step")
    grid[1][0].set_ylabel("peak memory, GiB")
    grid[0][0].legend()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.growth", description="How the cost of a step grows.")
    parser.add_argument("recipe", nargs="?", default="vits14_in1k")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--axes", nargs="+", choices=[key.split(",")[0] for key in AXES], help="some of them")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON, and a plot beside it as PNG")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.one:
        print(json.dumps(one(json.loads(args.one), args.steps)))
        return
    console = Console()
    base = ["data.sources=[synthetic]", "train.batch_size=8", "objective.koleo.group=0", *args.overrides]
    config = load(RunConfig, args.recipe, base)
    chosen = {axis: each for axis, each in AXES.items() if not args.axes or axis.split(",")[0] in args.axes}
    found: dict[str, list[dict[str, Any]]] = {axis: [] for axis in chosen}
    for axis, key, value in track([(axis, key, value) for axis, (key, values) in chosen.items() for value in values]):
        row = apart([args.recipe, *base, *words_of(key, value, config)], args.steps)
        found[axis].append({"value": value, **row})
    for axis, rows in found.items():
        show(axis, rows, console)
    if args.out:
        machine = describe_machine(Ranks.alone())
        content = {"machine": machine, "recipe": args.recipe, "overrides": args.overrides, "axes": found}
        args.out.write_text(json.dumps(content, indent=1))
        plot(found, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
