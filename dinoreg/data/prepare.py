"""`dinoreg data prepare`: a folder, a class tree or tars to shuffled shards with an index and a manifest."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinoreg.config import ConfigError
from dinoreg.data import tarindex
from dinoreg.data.counter import Purpose, generator
from dinoreg.data.pool import run_jobs
from dinoreg.data.shardwriter import PrepareOptions, ShardJob, ShardReport, ShardWriter, sidecar, write_atomically
from dinoreg.data.sources import expand
from dinoreg.data.stored import Folder, Shards, Source, open_stored
from dinoreg.data.streams import is_streamed

MANIFEST = "manifest.json"
FORMAT = "dinoreg shards 1"
SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))


@dataclass
class Manifest:
    """What a folder of shards holds."""

    source: str
    options: PrepareOptions
    classes: list[str]
    shards: list[ShardReport]

    @property
    def samples(self) -> int:
        """Images in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def left_out(self) -> list[tuple[str, str, str]]:
        """(reason, source, key) of the images that could not be used."""
        return [entry for shard in self.shards for entry in shard.left_out]

    def write(self, folder: Path) -> None:
        """manifest.json, with classes.txt beside it where there are classes."""
        content = {
            "format": FORMAT,
            "source": self.source,
            "options": asdict(self.options),
            "samples": self.samples,
            "bytes": sum(shard.bytes for shard in self.shards),
            "classes": len(self.classes),
            "left_out": dict(Counter(reason for reason, _, _ in self.left_out)),
            "shards": [asdict(shard) for shard in self.shards],
        }
        if self.classes:
            (folder / "classes.txt").write_text("\n".join(self.classes) + "\n")
        write_atomically(folder / MANIFEST, json.dumps(content, indent=1))


def prepare(
    src: str | Path, dst: str | Path, options: PrepareOptions | None = None, workers: int = -1, quiet: bool = False
) -> Manifest:
    """Writes `src` (a folder, a pattern of tars, ImageNet's archive of archives) as shards into the folder `dst`.

    The content depends on the source and the options only, not on the workers. Started again after a stop, it keeps
    the shards whose checksums are right. Raises ConfigError when src has no images or dst holds something else.
    """
    options = options or PrepareOptions()
    names = expand(str(src))
    if any(is_streamed(name) for name in names):
        raise ConfigError(f"{src} can only be streamed: download and unpack it first", "SRC")
    sources = open_stored([str(Path(name).resolve()) for name in names])
    labels, classes = find_labels(sources)
    if not options.labels:
        labels, classes = np.full_like(labels, -1), []
    folder = Path(dst)
    jobs = plan_shards(sources, labels, options, folder)
    _claim(folder, jobs)
    writer = ShardWriter(sources, labels, options)
    shards = run_jobs(writer, jobs, total=len(labels), workers=workers, title="writing shards", quiet=quiet)
    manifest = Manifest(str(src), options, classes, shards)
    manifest.write(folder)
    for job in jobs:
        sidecar(job.path).unlink()
    return manifest


def plan_shards(
    sources: Sequence[Source], labels: NDArray[np.int64], options: PrepareOptions, folder: Path
) -> list[ShardJob]:
    """Shuffles all samples and cuts them into shards of about the wanted size."""
    sizes = np.concatenate([source.sizes() for source in sources])
    order = generator(options.seed, Purpose.ORDER, 0).permutation(len(sizes))
    limit = max(1, int(options.shard_size_mb * 2**20))
    shard_of = (np.cumsum(sizes[order]) - sizes[order]) // limit
    shared = json.dumps([FORMAT, [str(source) for source in sources], asdict(options)]).encode()
    jobs = []
    for number, members in enumerate(np.split(order, np.flatnonzero(np.diff(shard_of)) + 1)):
        digest = hashlib.sha256(shared)
        for column in (members, sizes[members], labels[members]):
            digest.update(np.ascontiguousarray(column).tobytes())
        jobs.append(ShardJob(folder / f"shard-{number:06d}.tar", members, digest.hexdigest()))
    return jobs


def find_labels(sources: Sequence[Source]) -> tuple[NDArray[np.int64], list[str]]:
    """A class number for each sample, -1 where it has none, and the classes' names where there are any.

    Shards keep their `cls` members (and the classes.txt beside them); otherwise the first folder on each path, in a
    folder or inside a tar, is the class: if all images lie in one, there are several, and they are not called train
    and val.
    """
    if all(isinstance(source, Shards) and len(source) and source.label(0) is not None for source in sources):
        shards = [source for source in sources if isinstance(source, Shards)]
        numbers = [source.label(i) for source in shards for i in range(len(source))]
        listed = Path(shards[0].tars[0]).parent / "classes.txt"
        names = listed.read_text().splitlines() if listed.exists() else []
        return np.array([-1 if number is None else number for number in numbers], dtype=np.int64), names
    owners = [name.partition("/")[0] for source in sources for name in _paths(source)]
    classes = sorted(set(owners))
    if "" in classes or len(classes) < 2 or SPLITS.issuperset(classes):
        return np.full(len(owners), -1, dtype=np.int64), []
    return np.searchsorted(np.array(classes), np.array(owners)).astype(np.int64), classes


def _paths(source: Source) -> Iterator[str]:
    """The path of each sample inside its source, starting with a slash where it lies in no folder."""
    if isinstance(source, Folder):
        names: Iterator[str] = (source.name(i) for i in range(len(source)))
    else:
        assert isinstance(source, Shards)
        names = (name for tar in source.tars for name in tarindex.scan(Path(tar)).names)
    for name in names:
        yield name if "/" in name else f"/{name}"


def _claim(folder: Path, jobs: Sequence[ShardJob]) -> None:
    """Makes sure that nothing but this very preparation is in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {job.path.name for job in jobs}
    found = {path.name for path in folder.glob("*.tar")}
    manifest = folder / MANIFEST
    same = {job.fingerprint for job in jobs}
    if manifest.exists():
        shards = json.loads(manifest.read_text())["shards"]
        done = {shard["fingerprint"] for shard in shards}
        if done != same:
            raise ConfigError(f"{folder} holds other shards, or of other options: choose another folder", "DST")
        for job, shard in zip(jobs, shards, strict=True):
            write_atomically(sidecar(job.path), json.dumps(shard))
    elif found - wanted:
        raise ConfigError(f"{folder} holds other shards, such as {min(found - wanted)}: choose another folder", "DST")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dinoreg data prepare`."""
    parser.add_argument("src", help="a folder of images, a class tree, or tars (brace patterns allowed)")
    parser.add_argument("dst", help="the folder for the shards")
    parser.add_argument("--shard-size-mb", type=float, default=256, help="megabytes of source images a shard")
    parser.add_argument("--resize", type=int, help="make larger images smaller, to this short side in pixels")
    parser.add_argument("--workers", type=int, default=-1, help="processes; -1 takes every core")
    parser.add_argument("--channels", type=int, default=3, help="channels of the images")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffling")
    parser.add_argument("--no-verify", action="store_true", help="look at the headers only, not at the pixels")
    parser.add_argument("--no-labels", action="store_true", help="keep no labels and make none from folders")


def main(args: argparse.Namespace) -> int:
    """`dinoreg data prepare SRC DST`."""
    options = PrepareOptions(
        args.shard_size_mb, args.resize, not args.no_verify, not args.no_labels, args.channels, args.seed
    )
    manifest = prepare(args.src, args.dst, options, args.workers)
    labelled = f", {len(manifest.classes)} classes" if manifest.classes else ""
    print(f"{manifest.samples} images in {len(manifest.shards)} shards{labelled}: data.sources=[{args.dst}]")
    if manifest.left_out:
        print(f"{len(manifest.left_out)} files left out, listed in {Path(args.dst) / MANIFEST}:")
        for reason, count in Counter(reason for reason, _, _ in manifest.left_out).most_common():
            example = next(f"{key} in {source}" for why, source, key in manifest.left_out if why == reason)
            print(f"  {count:6d}  {reason}, for example {example}")
    return 0
