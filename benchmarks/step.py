"""Speed and memory of a training step on synthetic crops, with the share of each phase.

    python -m benchmarks.step [RECIPE] [key=value ...] [--steps 20] [--out FILE.json]
    torchrun --nproc-per-node 8 -m benchmarks.step vitl16_short_in1k train.batch_size=512

The step is the trainer's own, photometric augmentation included; only reading and decoding are left out (see
benchmarks.data). Throughput is measured without the profiler, the shares in a few further steps with it. MFU is given
twice: nominal counts every row, executed leaves out the rows that drop path skips; neither counts recomputation.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from dinoreg.config import load
from dinoreg.data.batch import Batch
from dinoreg.data.masks import MaskConfig, draw_masks
from dinoreg.data.photometric import draw
from dinoreg.parallel.mesh import Ranks, setup_ranks
from dinoreg.train.build import build_objective
from dinoreg.train.flops import peak_flops, step_flops
from dinoreg.train.guard import Guard
from dinoreg.train.optimizer import Optimizer
from dinoreg.train.recipe import RunConfig, check_world
from dinoreg.train.schedules import Schedules
from dinoreg.train.trainer import train_step

PHASES = ("develop", "teacher", "targets", "student", "losses", "backward", "optimizer", "ema")
PROFILED_STEPS = 3


class Bench:
    """The objective, its optimizer and a few synthetic batches; `step()` runs one update."""

    def __init__(self, cfg: RunConfig, ranks: Ranks) -> None:
        check_world(cfg, ranks.world)
        self.cfg, self.ranks = cfg, ranks
        self.objective = build_objective(cfg, ranks)
        self.guard = Guard(ranks)
        self.optimizer = Optimizer(self.objective.student, cfg.optim)
        self.values = Schedules(cfg, num_samples=1_000_000).at(1000)
        self.batches = cycle([synthetic_batch(cfg, ranks, number) for number in range(3)])
        self.steps = 0

    def step(self) -> dict[str, torch.Tensor]:
        """Its losses and the like."""
        self.steps += 1
        metrics, _ = train_step(
            self.objective, self.optimizer, self.guard, next(self.batches), self.values, self.cfg, row_seed=self.steps
        )
        return metrics

    def wait(self) -> None:
        if self.ranks.device.type == "cuda":
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


def measure(bench: Bench, steps: int, warmup: int) -> dict[str, Any]:
    """Images a second, MFU and peak memory over `steps` steps after `warmup`."""
    for _ in range(warmup):
        bench.step()
    bench.wait()
    if bench.ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    bench.ranks.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        bench.step()
    bench.wait()
    seconds = (time.perf_counter() - start) / steps
    rate = bench.cfg.train.batch_size / seconds
    nominal, executed = step_flops(bench.cfg)
    results: dict[str, Any] = {
        "images_per_second": rate,
        "seconds_per_step": seconds,
        "tflop_per_image": {"nominal": nominal / 1e12, "executed": executed / 1e12},
        "achieved_tflops": {"nominal": nominal * rate / 1e12, "executed": executed * rate / 1e12},
    }
    peak = peak_flops(bench.ranks.device)
    if peak:
        share = rate / (peak * bench.ranks.world)
        results["mfu"] = {"nominal": nominal * share, "executed": executed * share}
    if bench.ranks.device.type == "cuda":
        results["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return results


def phase_shares(bench: Bench) -> dict[str, float]:
    """Share of each phase in the device's busy time (on a CPU: in the time that the phases took)."""
    cuda = bench.ranks.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as prof:
        for _ in range(PROFILED_STEPS):
            bench.step()
        bench.wait()
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


def describe_machine(ranks: Ranks) -> dict[str, Any]:
    """Hardware, versions and commit: without these a figure means nothing."""
    cuda = ranks.device.type == "cuda"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "processes": ranks.world,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


def finish(
    results: dict[str, Any],
    args: argparse.Namespace,
    cfg: RunConfig,
    ranks: Ranks,
    show: Callable[[dict[str, Any]], None],
) -> None:
    """Add where and of what the figures are, show them, and write them to `--out`."""
    results["machine"] = describe_machine(ranks)
    results["recipe"] = {
        "name": args.recipe,
        "arch": cfg.model.arch,
        "patch_size": cfg.model.patch_size,
        "batch_size": cfg.train.batch_size,
        "precision": cfg.train.precision,
        "every": cfg.checkpoint.every,
        "overrides": args.overrides,
    }
    if ranks.is_main:
        show(results)
        if args.out:
            Path(args.out).write_text(json.dumps(results, indent=1))
    ranks.close()


def show(results: dict[str, Any]) -> None:
    """The figures, for a person."""
    machine, recipe = results["machine"], results["recipe"]
    arch = f"{recipe['arch']}/{recipe['patch_size']}"
    print(f"{recipe['name']}: {arch}, batch {recipe['batch_size']}, {recipe['precision']}")
    print(f"{machine['device']} x {machine['processes']}, torch {machine['torch']}, commit {machine['commit']}\n")
    print(f"images/s          {results['images_per_second']:10.1f}")
    for kind in ("nominal", "executed"):
        mfu = f"   MFU {results['mfu'][kind]:6.1%}" if "mfu" in results else "   (peak of this device unknown: no MFU)"
        print(f"TFLOP/s {kind:9} {results['achieved_tflops'][kind]:10.2f}{mfu}")
    if "peak_memory_gib" in results:
        print(f"peak memory       {results['peak_memory_gib']:10.2f} GiB")
    print("\nshare of each phase")
    for name, share in results["phases"].items():
        print(f"  {name:10} {share:6.1%}  {'#' * round(50 * share)}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.step", description="Speed and memory of a training step.")
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--out", help="write the figures here as JSON")
    args = parser.parse_intermixed_args()
    cfg = load(RunConfig, args.recipe, ["data.sources=[synthetic]", *args.overrides])
    ranks = setup_ranks()
    bench = Bench(cfg, ranks)
    results = measure(bench, args.steps, args.warmup) | {"phases": phase_shares(bench)}
    finish(results, args, cfg, ranks, show)


if __name__ == "__main__":
    main()
