"""Which image comes when and what of it is masked, in samples a second; and shards read in that order, in MB/s.

    python -m benchmarks.order [--megabytes 1024] [--rounds 5] [--folder DIR] [--out FILE.json]

A sample is one image's place in 10^9 of 100,000 shards, as the loader looks it up, and its two masks, on one thread, in
processor time; the best of the rounds counts, for others may use the machine. Then as many megabytes of photographs are
written as shards, and read with nothing of them in the page cache: from end to end, which is what the disk can do, and
in the order of a pass, as the loader reads them and each by itself. Nothing is decoded. The median counts there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.data import GRID, MASKS, find_images
from benchmarks.machine import describe_machine
from dinoreg.data.masks import draw_masks
from dinoreg.data.prepare import PrepareOptions, prepare
from dinoreg.data.sources import Collection, DataConfig, Reader, Sources, open_sources
from dinoreg.data.stored import Shards
from dinoreg.data.tables import Tables
from dinoreg.parallel.mesh import Ranks

SHARDS, IMAGES = 100_000, 10_000  # in each
WINDOW = DataConfig().shuffle_window
BATCHES = 16, 64, 256, 1024  # images of a rank in a step
SAMPLES = 8192  # in a round
SHARE = 64  # images of a batch where shards are read; those of the next are announced
DIFFERENT = 64  # photographs
READ = 2**20  # bytes at a time, from end to end


class Imagined(Shards):
    """Shards that are nowhere: enough of them to be counted and put in order."""

    def __init__(self, shards: int, images: int) -> None:
        places = as_strided(np.zeros(3, dtype=np.int64), (shards * images, 3), (0, 8))  # one row, as often as is needed
        self._tables = Tables({"rows": np.arange(1, shards + 1) * images, "places": places})


def imagined_reader() -> Reader:
    """Of 10^9 samples."""
    return Reader(Sources([Collection([Imagined(SHARDS, IMAGES)], WINDOW)], [1.0]), seed=0)


def measure_work(rounds: int) -> dict[str, dict[int, float]]:
    """Samples a second of each kind of work, by the size of the batch."""
    reader = imagined_reader()

    def index(start: int, size: int) -> None:
        for number in range(start, start + size):
            reader.entry(number)

    def masks(start: int, size: int) -> None:
        draw_masks(MASKS, GRID, size, 0, start, size)

    def both(start: int, size: int) -> None:
        index(start, size)
        masks(start, size)

    works: dict[str, Callable[[int, int], None]] = {"index": index, "masks": masks, "both": both}
    found: dict[str, dict[int, float]] = {name: dict.fromkeys(BATCHES, 0.0) for name in works}
    for turn in track(range(rounds), "index and masks"):
        for name, work in works.items():
            for size in BATCHES:
                rate = _samples_a_second(work, turn * SAMPLES, size)
                found[name][size] = max(found[name][size], rate)
    return found


def _samples_a_second(work: Callable[[int, int], None], first: int, size: int) -> float:
    start = time.process_time()
    for batch in range(first, first + SAMPLES, size):
        work(batch, size)
    return SAMPLES / (time.process_time() - start)


def measure_order() -> dict[str, float]:
    """What a pass over 10^9 samples costs: to begin it, to go on over more than a window, and in memory."""
    reader, total, later = imagined_reader(), SHARDS * IMAGES, 2 * WINDOW * IMAGES
    found: dict[str, float] = {}
    for number, name in ((0, "first sample of the run"), (total, "first sample of the next pass")):
        start = time.process_time()
        reader.entry(number)
        found[f"{name}, ms"] = 1e3 * (time.process_time() - start)
    start = time.process_time()
    for number in range(total + 1, total + later):
        reader.entry(number)
    found["each sample after it, us"] = 1e6 * (time.process_time() - start) / later
    tracemalloc.start()
    reader = imagined_reader()
    for number in (0, total - 1, total, total + later):
        reader.entry(number)
    found["memory, MiB"] = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return found


def write_shards(folder: Path, megabytes: int) -> list[Path]:
    """Shards of a sixteenth of the megabytes each, of photographs of about 50 kilobytes."""
    photos, shards = folder / "photos", folder / "shards"
    photos.mkdir()
    names, written = count(), 0
    originals = find_images(None, DIFFERENT)
    while written < megabytes * 2**20:
        for which, photo in enumerate(originals):
            original, name = photos / f"{which}.jpg", photos / f"{which}-{next(names)}.jpg"
            if not original.exists():
                original.write_bytes(photo)
            os.link(original, name)
            written += len(photo)
    prepare(photos, shards, PrepareOptions(shard_size_mb=megabytes / 16, verify=False), workers=1)
    return sorted(shards.glob("*.tar"))


def measure_reading(tars: list[Path], rounds: int) -> dict[str, list[float]]:
    """MB/s of each way to read all shards, in turn, each time from the disk."""
    ways: dict[str, Callable[[list[Path]], int]] = {
        "files from end to end": read_through,
        "a pass, as the loader reads it": lambda tars: read_pass(tars, announce=True),
        "a pass, each image by itself": lambda tars: read_pass(tars, announce=False),
        "streamed with pipe:cat": read_streamed,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in track(range(rounds), "reading shards"):
        for name, read in ways.items():
            forget(tars)
            start = time.perf_counter()
            size = read(tars)
            found[name].append(size / (time.perf_counter() - start) / 1e6)
    return found


def forget(files: list[Path]) -> None:
    """Takes files out of the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not yet written would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(tars: list[Path]) -> int:
    """Bytes read."""
    size = 0
    for path in tars:
        with path.open("rb", buffering=0) as file:
            while block := file.read(READ):
                size += len(block)
    return size


def read_pass(tars: list[Path], announce: bool) -> int:
    """Bytes of all images, in the order of the first pass."""
    sources = open_sources(DataConfig(sources=[str(tars[0].parent)]))
    reader, size = Reader(sources, seed=0), 0
    numbers = range(sources.num_samples or 0)
    for start in numbers[::SHARE]:
        if announce:
            reader.announce(numbers[start + SHARE : start + 2 * SHARE])
        size += sum(len(reader.entry(number).read()) for number in numbers[start : start + SHARE])
    return size


def read_streamed(tars: list[Path]) -> int:
    """Bytes of as many images as the shards hold, from streams that begin anew."""
    total = open_sources(DataConfig(sources=[str(tars[0].parent)])).num_samples or 0
    reader = Reader(open_sources(DataConfig(sources=[f"pipe:cat {path}" for path in tars])), seed=0)
    return sum(len(reader.entry(number).read()) for number in range(total))


def show(results: dict[str, Any], console: Console) -> None:
    """The figures, for a person."""
    table = Table(
        "samples/s on one thread, batch of", *map(str, BATCHES), title="index and masks", title_justify="left"
    )
    for name, rates in results["samples_per_second"].items():
        table.add_row(name, *(f"{rate:,.0f}" for rate in rates.values()))
    console.print(table)
    table = Table("10^9 samples in 100,000 shards", "", title="order", title_justify="left")
    for name, value in results["order"].items():
        table.add_row(name, f"{value:.2f}")
    console.print(table)
    table = Table("", "MB/s", "of the disk's", title="shards, not in the page cache", title_justify="left")
    rates = {name: statistics.median(each) for name, each in results["megabytes_per_second"].items()}
    disk = next(iter(rates.values()))
    for name, rate in rates.items():
        table.add_row(name, f"{rate:,.0f}", f"{rate / disk:.0%}")
    console.print(table)


def main() -> None:
    """Measures, and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1024, help="of shards to be read")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="on the disk to be measured (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    results = {"machine": describe_machine(Ranks.alone()), "samples_per_second": measure_work(args.rounds)}
    results["order"] = measure_order()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results["megabytes_per_second"] = measure_reading(write_shards(Path(folder), args.megabytes), args.rounds)
    show(results, Console())
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
