"""How long a run with very many shards takes to begin, in seconds and memory (their order: see benchmarks.order).

    python -m benchmarks.shards [--count 100000] [--folder DIR]

Writes that many tars of one small image each (eight files under as many names, so that it takes seconds), once without
and once with an index beside each, and opens them in processes of their own: for the first time, and again with what
the first start has kept.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dinoreg.data import tarindex
from dinoreg.data.sources import DataConfig, open_sources

DIFFERENT = 8  # files; each has as many names as are needed, which ext4 limits to 65,000


@dataclass(frozen=True)
class Start:
    """Opening all shards in a process of its own. peak: MiB of memory more than before."""

    seconds: float
    peak: float
    images: int


def write_tars(folder: Path, count: int, indexed: bool) -> None:
    """`count` tars of one image of about a kilobyte each, a thousand to a folder."""
    originals = [_write_tar(folder / f"original-{number}.bin", number) for number in range(DIFFERENT)]
    for number in range(count):
        inside = folder / f"{number // 1000:04d}"
        inside.mkdir(exist_ok=True)
        original, tar = originals[number % DIFFERENT], inside / f"s-{number:06d}.tar"
        os.link(original, tar)
        if indexed:
            os.link(tarindex.index_path(original), tarindex.index_path(tar))


def _write_tar(path: Path, number: int) -> Path:
    image = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image, "JPEG")
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo(f"{number}.jpg")
        member.size = len(image.getvalue())
        tar.addfile(member, io.BytesIO(image.getvalue()))
    tarindex.save_index(path, tarindex.scan(path).places)
    return path


def measure_start(folder: Path, cache: Path | None) -> Start:
    """Opens the tars in the folders below `folder`, in a fresh process."""
    words = [sys.executable, "-m", "benchmarks.shards", "--open", str(folder), *([str(cache)] if cache else [])]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    seconds, peak, images = done.stdout.split()
    return Start(float(seconds), float(peak), int(images))


def _open(folder: str, cache: str | None = None) -> None:
    before, start = _peak(), time.perf_counter()
    sources = open_sources(DataConfig(sources=[f"{folder}/*/*.tar"]), Path(cache) if cache else None)
    print(time.perf_counter() - start, _peak() - before, sources.num_samples)


def _peak() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main() -> None:
    """Prints a table, or opens the shards of one line of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="shards")
    parser.add_argument("--folder", help="where to write them (default: a temporary folder)")
    parser.add_argument("--open", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        _open(*args.open)
    else:
        _compare(args.count, args.folder)


def _compare(count: int, where: str | None) -> None:
    print(f"{'shards':34s}{'seconds':>9s}{'MiB':>9s}")
    with tempfile.TemporaryDirectory(dir=where) as temporary:
        for name, indexed in (("without an index", False), ("with an index", True)):
            folder, cache = Path(temporary, name), Path(temporary, f"{name}, kept")
            folder.mkdir()
            write_tars(folder, count, indexed)
            for label, kept in (("nothing kept", None), ("first start", cache), ("second start", cache)):
                start = measure_start(folder, kept)
                print(f"{name + ', ' + label:34s}{start.seconds:9.2f}{start.peak:9.0f}")
                assert start.images == count


if __name__ == "__main__":
    main()
