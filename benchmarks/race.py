"""Several ways to do one thing, run in turn in one process: their times, their memory, and whether they agree."""

from __future__ import annotations

import ctypes
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import MIB, describe_machine, resident
from dinoreg.parallel.mesh import Ranks


@dataclass(frozen=True)
class Lap:
    """Seconds (the median of the rounds) and the most memory, in bytes, that a call took beyond what was there."""

    seconds: float
    memory: float


def race(ways: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int = 7) -> dict[str, Lap]:
    """Each way once to warm up, then all in turn, so that a machine that slows down slows all of them."""
    memory = {name: _memory(work, device) for name, work in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            times[name].append(_seconds(work, device))
    return {name: Lap(statistics.median(times[name]), memory[name]) for name in ways}


def show(title: str, laps: Mapping[str, Lap], console: Console) -> None:
    """A table; the last of the ways is the one that the others are compared with."""
    *_, base = laps.values()
    table = Table(title=title, title_justify="left")
    for heading in ("way", "ms", "times as fast", "peak MiB", "of its memory"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for name, lap in laps.items():
        share = f"{lap.memory / base.memory:.0%}" if base.memory else "-"
        cells = (f"{1e3 * lap.seconds:.2f}", f"{base.seconds / lap.seconds:.2f} x", f"{lap.memory / MIB:.1f}", share)
        table.add_row(name, *cells)
    console.print(table)


def plain(laps: Mapping[str, Lap]) -> dict[str, dict[str, float]]:
    """For JSON."""
    return {name: {"seconds": lap.seconds, "memory": lap.memory} for name, lap in laps.items()}


def write(out: Path | None, results: Mapping[str, Any], device: torch.device) -> None:
    """With the machine, versions and the commit."""
    if out:
        out.write_text(json.dumps({"machine": describe_machine(Ranks.alone(device)), **results}, indent=1))


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _memory(work: Callable[[], Any], device: torch.device) -> float:
    """Bytes at the highest moment of a call, by the allocator on a GPU and as Linux counts it elsewhere."""
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work()
        return float(torch.cuda.max_memory_allocated() - held)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size counts from now on
    before = resident("VmRSS")
    work()
    return max(0.0, resident("VmHWM") - before)
