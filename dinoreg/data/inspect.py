"""`dinoreg data check`: what is in a source, what cannot be read and why, and how its crops look."""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.data.batch import BadSample
from dinoreg.data.crops import CropConfig
from dinoreg.data.images import BadImage, open_picture
from dinoreg.data.loader import build_loader
from dinoreg.data.masks import MaskConfig
from dinoreg.data.photometric import PhotometricConfig, develop
from dinoreg.data.pool import run_jobs
from dinoreg.data.sources import Collection, DataConfig, Sources, StoredEntry, open_sources

CHUNK = 256  # samples a job
SHRINK = 4  # reads a whole JPEG, so that damage shows, but computes a sixteenth of its pixels
BLANK = 1.0  # standard deviation, of 255, under which an image is blank
MARGIN = 4  # pixels between the crops of a picture
EXAMPLES = 20  # unreadable files that are named


@dataclass
class Findings:
    """What was found in a number of samples."""

    formats: Counter[str] = field(default_factory=Counter)
    size: int = 0  # bytes
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    blank: int = 0
    digests: list[bytes] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)
    means: list[NDArray[np.float64]] = field(default_factory=list)  # of each image's channels, and of their squares
    squares: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Joins the findings of other samples."""
        self.formats += other.formats
        self.size += other.size
        self.blank += other.blank
        for name in ("widths", "heights", "digests", "bad", "means", "squares"):
            getattr(self, name).extend(getattr(other, name))

    @property
    def mean_and_std(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of each channel over all images, every image counting the same, in [0, 1]."""
        mean = np.mean(self.means, axis=0)
        return mean, np.sqrt(np.maximum(np.mean(self.squares, axis=0) - mean**2, 0))


@dataclass
class Inspector:
    """Looks at a range of the samples of a collection; lives in each worker process."""

    collection: Collection
    channels: int

    def __call__(self, job: range) -> Iterator[Findings | int]:
        """Yields 1 for each sample, and the findings at the end."""
        found = Findings()
        for number in job:
            entry = StoredEntry(*self.collection.pick(number))
            try:
                self._look(found, entry.read())
            except BadImage as error:
                found.bad.append(BadSample(error.reason, *entry.where()))
            yield 1
        yield found

    def _look(self, found: Findings, data: bytes) -> None:
        picture = open_picture(data, self.channels)
        pixels = picture.decode(SHRINK).to(torch.float64).flatten(1) / 255
        kind = picture.content.format if isinstance(picture.content, Image.Image) else "array"
        found.formats[kind or "unknown"] += 1
        found.size += len(data)
        found.widths.append(picture.width)
        found.heights.append(picture.height)
        found.blank += bool(pixels.std(dim=1, correction=0).max() * 255 < BLANK)
        found.digests.append(hashlib.blake2b(data, digest_size=16).digest())
        found.means.append(pixels.mean(1).numpy())
        found.squares.append(pixels.square().mean(1).numpy())


def inspect(sources: Sources, channels: int = 3, limit: int | None = None, workers: int = -1) -> Findings:
    """Reads every sample (or the first `limit`, spread evenly) of the sources. Raises ConfigError for streams."""
    found = Findings()
    for part in sources.parts:
        if not isinstance(part, Collection):
            raise ConfigError(f"{part.urls[0]} can only be streamed: check a downloaded copy", "SRC")
        step = 1 if limit is None else max(1, len(part) // limit)
        jobs = [range(start, min(start + CHUNK * step, len(part)), step) for start in range(0, len(part), CHUNK * step)]
        total = sum(len(job) for job in jobs)
        for findings in run_jobs(Inspector(part, channels), jobs, total=total, workers=workers, title="reading"):
            found.add(findings)
    return found


def describe(found: Findings, console: Console) -> None:
    """Prints the findings as a table, then the unreadable files."""
    table = Table(show_header=False, box=None)
    table.add_row("readable images", f"{len(found.widths)}, {found.size / 2**20:.1f} MiB")
    if found.widths:
        table.add_row("formats", ", ".join(f"{kind} {count}" for kind, count in found.formats.most_common()))
        for name, sizes in (("width", found.widths), ("height", found.heights)):
            low, middle, high = np.percentile(sizes, [0, 50, 100]).astype(int)
            table.add_row(name, f"{low} to {high} pixels, median {middle}")
        mean, std = found.mean_and_std
        table.add_row("photometric.mean", str([round(float(value), 3) for value in mean]))
        table.add_row("photometric.std", str([round(float(value), 3) for value in std]))
        table.add_row("blank", str(found.blank))
        table.add_row("exact duplicates", str(len(found.digests) - len(set(found.digests))))
    table.add_row("unreadable", str(len(found.bad)))
    console.print(table)
    for reason, count in Counter(sample.reason for sample in found.bad).most_common():
        console.print(f"{count} {reason}:")
        for sample in [sample for sample in found.bad if sample.reason == reason][:EXAMPLES]:
            console.print(f"  {sample.key} in {sample.source}", soft_wrap=True, markup=False, highlight=False)


def contact_sheet(
    sources: Sources, crops: CropConfig, photometric: PhotometricConfig, channels: int = 3, rows: int = 8, seed: int = 0
) -> Image.Image:
    """The first `rows` samples as training would see them: a row each, global crops first, then the local ones."""
    options = DataConfig(workers=0, max_bad_share=1.0)
    masks = MaskConfig(probability=0.0)
    loader = build_loader(
        sources,
        options,
        crops,
        photometric,
        masks,
        grid=(1, 1),
        channels=channels,
        batch_size=rows,
        seed=seed,
        rank=0,
        world=1,
        start_step=0,
        steps=1,
    )
    developed = develop(next(iter(loader)), photometric)
    globals_, locals_ = (_pictures(group, photometric) for group in (developed.global_crops, developed.local_crops))
    return Image.fromarray(np.concatenate([_row(*pair) for pair in zip(globals_, locals_, strict=True)]))


def _pictures(crops: Tensor, photometric: PhotometricConfig) -> NDArray[np.uint8]:
    """Crops (b, n, C, h, w) as they were before normalisation, (b, n, h, w, 3); the first channels of many."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (photometric.mean, photometric.std))
    pixels = crops.mul(std).add(mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    shown = pixels[:, :, :3] if pixels.shape[2] >= 3 else pixels[:, :, :1].expand(-1, -1, 3, -1, -1)
    return shown.permute(0, 1, 3, 4, 2).numpy()


def _row(large: NDArray[np.uint8], small: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The global crops (2, H, W, 3) side by side, then the local ones (L, h, w, 3) in as many lines as fit."""
    side = large.shape[1]
    step = small.shape[1] + MARGIN
    lines = max(1, (side + MARGIN) // step)
    columns = -(-len(small) // lines)
    row = np.full((max(side, step) + MARGIN, 2 * (side + MARGIN) + columns * step, 3), 128, dtype=np.uint8)
    for i, crop in enumerate(large):
        row[:side, i * (side + MARGIN) :][:, :side] = crop
    for i, crop in enumerate(small):
        top, left = (i // columns) * step, 2 * (side + MARGIN) + (i % columns) * step
        row[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
    return row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dinoreg data check`."""
    parser.add_argument("src", nargs="+", help="folders or tars, as in data.sources")
    parser.add_argument("--channels", type=int, default=3, help="channels of the images")
    parser.add_argument("--limit", type=int, help="look at about so many samples only")
    parser.add_argument("--workers", type=int, default=-1, help="processes; -1 takes every core")
    parser.add_argument("--picture", default="crops.png", help="where to write a picture of augmented crops")


def main(args: argparse.Namespace) -> int:
    """`dinoreg data check SRC`: 1 when something is unreadable, else 0."""
    console = Console()
    sources = open_sources(DataConfig(sources=args.src))
    found = inspect(sources, args.channels, args.limit, args.workers)
    describe(found, console)
    if found.widths:
        mean, std = ([float(value) for value in values] for values in found.mean_and_std)
        own = PhotometricConfig() if args.channels == 3 else PhotometricConfig(mean=mean, std=std)
        contact_sheet(sources, CropConfig(), own, args.channels).save(args.picture)
        console.print(f"augmented crops: {Path(args.picture).resolve()}", soft_wrap=True)
    return 1 if found.bad else 0
