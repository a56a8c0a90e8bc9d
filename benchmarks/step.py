"""Speed and memory of a training step on synthetic crops, beside a plain one, and where its time goes.

    python -m benchmarks.step [RECIPE] [key=value ...] [--steps 20] [--rounds 3] [--out FILE] [--trace FILE]
    torchrun --nproc-per-node 8 -m benchmarks.step vitl16_short_in1k train.batch_size=512

The step is the trainer's own, photometric augmentation included; only reading and decoding are left out (see
benchmarks.data). Beside it runs the same work written plainly (benchmarks/plain.py), each time in a new process, in
turn; under torchrun dinoreg runs alone. Throughput is measured without the profiler, phases and operations in a few
further steps with it. MFU is given twice: nominal counts every row, executed leaves out those that drop path skips or
that no loss looks at; neither counts recomputation.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import GIB, describe_machine, peak_memory
from benchmarks.plain import PlainStep
from dinoreg.allocator import keep_freed_memory
from dinoreg.config import ConfigError, load
from dinoreg.data.batch import Batch
from dinoreg.data.masks import MaskConfig, draw_masks
from dinoreg.data.photometric import develop, draw
from dinoreg.parallel.mesh import Ranks, setup_ranks
from dinoreg.parallel.precision import resolve_precision
from dinoreg.train.build import build_objective
from dinoreg.train.flops import peak_flops, step_flops
from dinoreg.train.guard import Guard
from dinoreg.train.optimizer import Optimizer
from dinoreg.train.recipe import RunConfig, check_world
from dinoreg.train.schedules import Schedules, StepValues
from dinoreg.train.trainer import train_step

PHASES = ("develop", "teacher", "targets", "student", "losses", "backward", "optimizer", "ema")
PROFILED_STEPS = 3
SIDES = ("dinoreg", "plain")
SHOWN_OPERATIONS = 12


class Bench:
    """The objective, its optimizer and a few synthetic batches; `step()` runs one update."""

    def __init__(self, cfg: RunConfig, ranks: Ranks) -> None:
        check_world(cfg, ranks.world)
        self.cfg, self.ranks = cfg, ranks
        if ranks.device.type == "cpu":
            keep_freed_memory()  # as the trainer
        self.objective = build_objective(cfg, ranks)
        self.guard = Guard(ranks)
        self.optimizer = Optimizer(self.objective.student, cfg.optim)
        self.values, self.batches = values_of(cfg), batches_of(cfg, ranks)
        self.steps = 0

    def step(self) -> dict[str, torch.Tensor]:
        """Its losses and the like."""
        self.steps += 1
        metrics, _ = train_step(
            self.objective, self.optimizer, self.guard, next(self.batches), self.values, self.cfg, row_seed=self.steps
        )
        return metrics


class PlainBench:
    """The same work, written plainly."""

    def __init__(self, cfg: RunConfig, ranks: Ranks) -> None:
        self.cfg, self.ranks = cfg, ranks
        self.plain = PlainStep.build(cfg, ranks.device)
        self.values, self.batches = values_of(cfg), batches_of(cfg, ranks)

    def step(self) -> dict[str, torch.Tensor]:
        return self.plain.step(develop(next(self.batches), self.cfg.photometric), self.values)


def values_of(cfg: RunConfig) -> StepValues:
    """Of a step early in a long run."""
    return Schedules(cfg, num_samples=1_000_000).at(1000)


def batches_of(cfg: RunConfig, ranks: Ranks) -> Iterator[Batch]:
    """A few synthetic batches, over and over."""
    return cycle([synthetic_batch(cfg, ranks, number) for number in range(3)])


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def synthetic_batch(cfg: RunConfig, ranks: Ranks, number: int) -> Batch:
    """A batch of noise with real masks and photometric parameters."""
    share, crops, channels = cfg.train.batch_size // ranks.world, cfg.crops, cfg.model.in_channels
    rng = np.random.default_rng(number)
    side = crops.global_size // cfg.model.patch_size
    masks = cfg.masks if cfg.objective.ibot.weight > 0 else MaskConfig(probability=0.0)
    start = number * cfg.train.batch_size
    batch = Batch(
        _noise(rng, share, 2, channels, crops.global_size),
        _noise(rng, share, crops.local_count, channels, crops.local_size),
        torch.from_numpy(np.stack([draw(cfg.photometric, rng, channels, crops.local_count) for _ in range(share)])),
        torch.from_numpy(draw_masks(masks, (side, side), cfg.train.batch_size, cfg.seed, start, share)),
        torch.arange(start, start + share),
    )
    return batch.to(ranks.device)


def _noise(rng: np.random.Generator, images: int, crops: int, channels: int, size: int) -> torch.Tensor:
    return torch.from_numpy(rng.integers(0, 256, (images, crops, channels, size, size), dtype=np.uint8))


def measure(bench: Bench | PlainBench, steps: int, warmup: int) -> dict[str, Any]:
    """Images a second, MFU and peak memory over `steps` steps after `warmup`."""
    device = bench.ranks.device
    for _ in range(warmup):
        bench.step()
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    bench.ranks.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        bench.step()
    wait(device)
    return figures(bench.cfg, bench.ranks, (time.perf_counter() - start) / steps, peak_memory(device))


def figures(cfg: RunConfig, ranks: Ranks, seconds: float, peak: float) -> dict[str, Any]:
    """What seconds a step and bytes mean."""
    rate = cfg.train.batch_size / seconds
    nominal, executed = step_flops(cfg)
    results: dict[str, Any] = {
        "images_per_second": rate,
        "seconds_per_step": seconds,
        "tflop_per_image": {"nominal": nominal / 1e12, "executed": executed / 1e12},
        "achieved_tflops": {"nominal": nominal * rate / 1e12, "executed": executed * rate / 1e12},
        "peak_memory_gib": peak / GIB,
    }
    most = peak_flops(ranks.device)
    if most:
        share = rate / (most * ranks.world)
        results["mfu"] = {"nominal": nominal * share, "executed": executed * share}
    return results


def profiled(bench: Bench, trace: Path | None) -> dict[str, Any]:
    """Shares of the phases and of the operations in a step; the last of a few steps is written as a trace, if asked."""
    cuda = bench.ranks.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities):  # what it does the first time is no part of a step
        bench.step()
    with profile(activities=activities) as prof:
        for _ in range(PROFILED_STEPS):
            bench.step()
        wait(bench.ranks.device)
    if trace is not None:
        with profile(activities=activities) as last:
            bench.step()
            wait(bench.ranks.device)
        last.export_chrome_trace(str(trace))
    return {"phases": phase_shares(prof, cuda), "operations": operation_shares(prof, cuda)}


def phase_shares(prof: profile, cuda: bool) -> dict[str, float]:
    """Share of each phase in the device's busy time (on a CPU: in the time that the phases took)."""
    events = list(prof.events() or [])
    regions = sorted((e.time_range.start, e.time_range.end, e.name) for e in events if e.name in PHASES)
    spent: dict[str, float] = defaultdict(float)
    if cuda:
        # A kernel belongs to the region that was open when it was launched, from whichever thread (the backward pass
        # launches from its own).
        starts = [start for start, _, _ in regions]
        for event in events:
            if event.kernels:
                index = bisect_right(starts, event.time_range.start) - 1
                inside = index >= 0 and event.time_range.start <= regions[index][1]
                spent[regions[index][2] if inside else "other"] += sum(kernel.duration for kernel in event.kernels)
    else:
        for start, end, name in regions:
            spent[name] += end - start
    total = sum(spent.values()) or 1.0
    return {name: spent[name] / total for name in (*PHASES, "other") if spent[name]}


def operation_shares(prof: profile, cuda: bool) -> dict[str, float]:
    """Share of each of torch's operations by itself, the largest first."""
    averages = [row for row in prof.key_averages() if row.key not in PHASES]
    spent = {row.key: row.self_device_time_total if cuda else row.self_cpu_time_total for row in averages}
    total = sum(spent.values()) or 1.0
    largest = sorted(spent.items(), key=lambda pair: -pair[1])[:SHOWN_OPERATIONS]
    return {name.removeprefix("aten::"): value / total for name, value in largest}


def describe_recipe(args: argparse.Namespace, cfg: RunConfig) -> dict[str, Any]:
    """Of what the figures are."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "name": args.recipe,
        "arch": cfg.model.arch,
        "patch_size": cfg.model.patch_size,
        "batch_size": cfg.train.batch_size,
        "precision": resolve_precision(cfg.train.precision, device),
        "every": cfg.checkpoint.every,
        "overrides": args.overrides,
    }


def report(results: dict[str, Any], out: Path | str | None, show: Callable[[dict[str, Any]], None]) -> None:
    """Show the figures, and write them to `--out`."""
    show(results)
    if out:
        Path(out).write_text(json.dumps(results, indent=1))


def finish(
    results: dict[str, Any],
    args: argparse.Namespace,
    cfg: RunConfig,
    ranks: Ranks,
    show: Callable[[dict[str, Any]], None],
) -> None:
    """Add where and of what the figures are, and report them from the main process."""
    results |= {"machine": describe_machine(ranks), "recipe": describe_recipe(args, cfg)}
    if ranks.is_main:
        report(results, args.out, show)
    ranks.close()


def show(results: dict[str, Any]) -> None:
    """The figures, for a person."""
    machine, recipe, console = results["machine"], results["recipe"], Console()
    arch = f"{recipe['arch']}/{recipe['patch_size']}"
    console.print(f"{recipe['name']}: {arch}, batch {recipe['batch_size']}, {recipe['precision']}", highlight=False)
    console.print(f"{machine['device']} x {machine['processes']}, torch {machine['torch']}, commit {machine['commit']}")
    sides = [side for side in SIDES if side in results]
    table = Table(show_edge=False)
    table.add_column("")
    for side in sides:
        table.add_column(side, justify="right")
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "images/s": lambda r: f"{r['images_per_second']:.1f}",
        "ms a step": lambda r: f"{1e3 * r['seconds_per_step']:.0f}",
        "TFLOP/s nominal": lambda r: f"{r['achieved_tflops']['nominal']:.2f}",
        "TFLOP/s executed": lambda r: f"{r['achieved_tflops']['executed']:.2f}",
        "peak memory, GiB": lambda r: f"{r['peak_memory_gib']:.2f}",
    }
    if all("mfu" in results[side] for side in sides):  # the peak of this device is known
        rows["MFU nominal"] = lambda r: f"{r['mfu']['nominal']:.1%}"
        rows["MFU executed"] = lambda r: f"{r['mfu']['executed']:.1%}"
    for name, cell in rows.items():
        table.add_row(name, *(cell(results[side]) for side in sides))
    console.print(table)
    if "ratios" in results:
        faster, memory = results["ratios"]["times_faster"], results["ratios"]["of_its_memory"]
        console.print(f"dinoreg is {faster:.2f} times as fast as the plain step, in {memory:.0%} of its memory")
    for title in ("phases", "operations"):
        console.print(f"\nshare of {title}")
        for name, share in results[title].items():
            console.print(f"  {name[:32]:32} {share:6.1%}  {'#' * round(50 * share)}", highlight=False, markup=False)


def one_side(cfg: RunConfig, ranks: Ranks, args: argparse.Namespace) -> dict[str, Any]:
    """Measured in this process."""
    if args.side == "plain":
        return measure(PlainBench(cfg, ranks), args.steps, args.warmup)
    bench = Bench(cfg, ranks)
    return measure(bench, args.steps, args.warmup) | (profiled(bench, args.trace) if args.profile else {})


def side_by_side(args: argparse.Namespace) -> dict[str, Any]:
    """Both, each in processes of its own, in turn, so that a machine that slows down slows both; medians."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    words = [args.recipe, *args.overrides, "--steps", str(args.steps), "--warmup", str(args.warmup)]
    for number, side in track([(n, side) for n in range(args.rounds) for side in SIDES], "measuring"):
        last = side == "dinoreg" and number == args.rounds - 1
        extra = (["--profile"] if last else []) + (["--trace", str(args.trace)] if last and args.trace else [])
        runs[side].append(_apart([*words, "--side", side, *extra]))
    results: dict[str, Any] = {side: _median(found) for side, found in runs.items()}
    ours, plain = results["dinoreg"], results["plain"]
    results["ratios"] = {
        "times_faster": plain["seconds_per_step"] / ours["seconds_per_step"],
        "of_its_memory": ours["peak_memory_gib"] / plain["peak_memory_gib"],
    }
    last_run = runs["dinoreg"][-1]
    return results | {key: last_run[key] for key in ("phases", "operations", "machine")}


def _apart(words: list[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "benchmarks.step", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _median(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The run whose speed is in the middle."""
    return sorted(found, key=lambda run: run["seconds_per_step"])[(len(found) - 1) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.step", description="Speed and memory of a training step.")
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=20, help="timed in each start (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="starts of each side, in turn (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--trace", type=Path, help="write torch's trace of a step here (.json.gz, for ui.perfetto.dev)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if "=" in args.recipe:  # no recipe, but an option
        args.recipe, args.overrides = "demo", [args.recipe, *args.overrides]
    try:
        cfg = load(RunConfig, args.recipe, ["data.sources=[synthetic]", *args.overrides])
    except ConfigError as error:
        raise SystemExit(f"benchmarks.step: {error}") from None
    if args.side is None and os.environ.get("WORLD_SIZE", "1") == "1":
        results = side_by_side(args)
        report(results | {"recipe": describe_recipe(args, cfg)}, args.out, show)
        return
    ranks = setup_ranks()
    if args.side is None:
        args.profile = True
        found = one_side(cfg, ranks, args)
        results = {"dinoreg": found} | {key: found.pop(key) for key in ("phases", "operations")}
        finish(results, args, cfg, ranks, show)
        return
    found = one_side(cfg, ranks, args) | {"machine": describe_machine(ranks)}
    ranks.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
