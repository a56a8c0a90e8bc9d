"""Folders, tar shards and streams as one endless, shuffled, weighted sequence of encoded images."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from braceexpand import braceexpand

from dinoreg.config import ConfigError
from dinoreg.data.counter import Purpose, generator, make_key, permute
from dinoreg.data.order import LEAST_SHARE, EpochOrder, Mixture
from dinoreg.data.progress import Progress, ShardDone, deal_from
from dinoreg.data.stored import Source, open_stored
from dinoreg.data.streams import Stream, is_streamed
from dinoreg.data.tables import digest


@dataclass
class DataConfig:
    """Where images come from, and how the host reads them."""

    # Folders, tar shards (brace patterns), `pipe:` or http URLs; or {path: ..., weight: ...} to mix by weight.
    sources: list[Any] = field(default_factory=list)
    workers: int = -1  # processes a rank; -1 chooses from the cores at hand, 0 loads in the main process
    prefetch: int = 2  # batches each worker prepares ahead
    timeout: float = 900.0  # seconds that a batch may take to come from the workers before the run ends; 0 = no limit
    shuffle_window: int = 16  # shards whose samples are shuffled together, to keep reads local
    stream_buffer: int = 1000  # samples held for shuffling where shards can only be streamed
    max_bad_share: float = 0.05  # of the samples tried; beyond it the run stops

    def check(self) -> None:
        """Raises ConfigError."""
        for key, least in (
            ("workers", -1),
            ("prefetch", 1),
            ("timeout", 0),
            ("shuffle_window", 1),
            ("stream_buffer", 1),
        ):
            if getattr(self, key) < least:
                raise ConfigError(f"must be at least {least}", key=key)
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError("must be a share, between 0 and 1", key="max_bad_share")


class Collection:
    """Sources that are shuffled together: every sample once a pass."""

    def __init__(self, sources: Sequence[Source], window: int) -> None:
        self.sources = list(sources)
        self.window = window
        sizes = [source.chunk_sizes() for source in self.sources]
        self._chunk_sizes = np.concatenate(sizes)
        self._chunk_source = np.repeat(np.arange(len(sizes)), [len(part) for part in sizes])
        self._chunk_start = np.concatenate([np.cumsum(part) - part for part in sizes])

    def __len__(self) -> int:
        return int(self._chunk_sizes.sum())

    def order(self, key: int) -> EpochOrder:
        """The order of all passes."""
        return EpochOrder(self._chunk_sizes, self.window, key)

    def at(self, order: EpochOrder, number: int) -> tuple[Source, int]:
        """The number-th sample ever, as a source and an index in it."""
        epoch, chunk, place = order.locate(number)
        which = self._chunk_source.item(chunk)
        source = self.sources[which]
        index = self._chunk_start.item(chunk) + place
        if source.scattered:
            index = permute(index, len(source), make_key(order.key, epoch, which))
        return source, index

    def identity(self) -> str:
        """A digest of all that decides which image a place in the order means."""
        chunks = np.concatenate([source.chunk_sizes() for source in self.sources])
        names = [source.identity() for source in self.sources]
        return digest(repr((names, self.window)).encode(), chunks)

    def pick(self, place: int) -> tuple[Source, int]:
        """The place-th sample in storage order."""
        for source in self.sources:
            if place < len(source):
                return source, place
            place -= len(source)
        raise IndexError(place)


@dataclass(frozen=True)
class Streamed:
    """Shards without random access, and how many samples are held to shuffle them."""

    urls: list[str]
    buffer: int


class Sources:
    """All that `data.sources` names. num_samples: images in one pass, None where something can only be streamed."""

    def __init__(self, parts: Sequence[Collection | Streamed], weights: Sequence[float]) -> None:
        self.parts = list(parts)
        self.weights = list(weights)

    @property
    def num_samples(self) -> int | None:
        """Images in one pass over everything."""
        sizes = [len(part) for part in self.parts if isinstance(part, Collection)]
        return sum(sizes) if len(sizes) == len(self.parts) else None

    def fingerprint(self) -> str | None:
        """Sixteen digits that differ where a sample number may mean another image; None if all can only be streamed.

        Moving folders and shards, or copying them, changes nothing. Streams have no numbers and do not count.
        """
        parts = [part.identity() if isinstance(part, Collection) else "streamed" for part in self.parts]
        if all(part == "streamed" for part in parts):
            return None
        return digest(repr((parts, self.weights)).encode())[:16]

    def check_here(self) -> None:
        """Raises ConfigError where this machine sees other files than the process that opened these sources."""
        for part in self.parts:
            for source in part.sources if isinstance(part, Collection) else ():
                source.check_here()


class Entry(Protocol):
    """An encoded image that is about to be read. `where`: its shard or folder, and its key."""

    def read(self) -> bytes: ...
    def where(self) -> tuple[str, str]: ...


@dataclass(frozen=True)
class StoredEntry:
    """A sample of a source with random access."""

    source: Source
    index: int

    def read(self) -> bytes:
        """Raises BadImage."""
        return self.source.read(self.index)

    def where(self) -> tuple[str, str]:
        """(shard or folder, key)."""
        return self.source.locate(self.index)


class Reader:
    """Encoded images by global sample number, for one consumer (a worker of a rank) out of all.

    What is stored depends on (seed, number) alone. What is streamed depends on the consumer too, and goes on by whole
    shards: after `position` (of `merge_positions`), and after what this consumer has read since (`progress`, by part).
    """

    def __init__(
        self,
        sources: Sources,
        seed: int,
        consumer: int = 0,
        consumers: int = 1,
        position: Mapping[str, Any] | None = None,
        progress: Mapping[int, Progress] | None = None,
    ) -> None:
        self.parts, self.seed, self.consumer = sources.parts, seed, consumer
        self.mixture = Mixture(sources.weights, seed)
        self.orders: list[EpochOrder | Stream] = []
        for number, part in enumerate(self.parts):
            key = make_key(seed, number)
            if isinstance(part, Collection):
                self.orders.append(part.order(key))
            else:
                deal = deal_from(position or {}, number, len(part.urls), consumers)
                done = (progress or {}).get(number)
                self.orders.append(Stream(part.urls, part.buffer, key, consumer, consumers, deal, done))

    def take_done(self) -> list[ShardDone]:
        """The streamed shards whose last image was handed out since this was asked last."""
        streams = [(number, order) for number, order in enumerate(self.orders) if isinstance(order, Stream)]
        return [ShardDone(number, self.consumer, *each) for number, order in streams for each in order.take_done()]

    def entry(self, number: int, attempt: int = 0) -> Entry:
        """Sample `number`; from attempt 1 on, what stands in for it where it is bad: any other of the same part."""
        part, order, turn = self._turn(number)
        if isinstance(order, Stream):
            return order.next()
        assert isinstance(part, Collection)
        if attempt:
            place = generator(self.seed, Purpose.REPLACE, number, attempt).integers(len(part))
            return StoredEntry(*part.pick(int(place)))
        return StoredEntry(*part.at(order, turn))

    def announce(self, numbers: Iterable[int]) -> None:
        """Lets the disk fetch the samples with these numbers while others are decoded."""
        for number in numbers:
            part, order, turn = self._turn(number)
            if isinstance(part, Collection) and isinstance(order, EpochOrder):
                source, index = part.at(order, turn)
                source.announce(index)

    def _turn(self, number: int) -> tuple[Collection | Streamed, EpochOrder | Stream, int]:
        """The part that a sample is of, and how many samples of it came before."""
        which, turn = self.mixture.assign(number) if len(self.parts) > 1 else (0, number)
        return self.parts[which], self.orders[which], turn


def open_sources(cfg: DataConfig, cache: Path | None = None) -> Sources:
    """Lists folders and indexes shards. Raises ConfigError where there is nothing, or nothing usable, to read.

    cache: a folder of the run in which what was found is kept. The sources can then be sent to all other processes of
    the run, which map those files and look at no shard, and the next start with the same shards scans none.
    """
    entries = [cfg.sources] if isinstance(cfg.sources, str) else list(cfg.sources)
    if not entries:
        raise ConfigError(
            "names no images: give a folder, tar shards or URLs, as in data.sources=[photos]", "data.sources"
        )
    weighted = [entry for entry in entries if not isinstance(entry, str)]
    if not weighted:
        return Sources(_collect(entries, cfg, cache), [1.0])
    if len(weighted) < len(entries):
        raise ConfigError("either every source has a weight or none", "data.sources")
    paths, weights = zip(*(_weighted(entry) for entry in weighted), strict=True)
    if not min(weights) >= LEAST_SHARE * sum(weights):  # nor is NaN
        raise ConfigError(f"every weight must be at least {LEAST_SHARE} of their sum", "data.sources")
    return Sources([part for path in paths for part in _collect(path, cfg, cache)], weights)


def _weighted(entry: Any) -> tuple[list[str], float]:
    if not isinstance(entry, Mapping) or set(entry) != {"path", "weight"}:
        raise ConfigError(f"a source is a path or {{path: ..., weight: ...}}, not {entry!r}", "data.sources")
    try:
        weight = float(entry["weight"])
    except (TypeError, ValueError):
        raise ConfigError(
            f"the weight of {entry['path']} is not a number: {entry['weight']!r}", "data.sources"
        ) from None
    paths = entry["path"]
    return [paths] if isinstance(paths, str) else list(paths), weight


def _collect(paths: Sequence[str], cfg: DataConfig, cache: Path | None) -> list[Collection | Streamed]:
    """One part of all the paths."""
    expanded = [name for path in paths for name in expand(path)]
    urls = [name for name in expanded if is_streamed(name)]
    if urls and len(urls) < len(expanded):
        other = next(name for name in expanded if not is_streamed(name))
        raise ConfigError(f"give each source a weight: {urls[0]} is streamed and {other} is not", "data.sources")
    if urls:
        return [Streamed(urls, cfg.stream_buffer)]
    return [Collection(open_stored(expanded, cache), cfg.shuffle_window)]


def expand(path: str) -> list[str]:
    """Brace and wildcard patterns, and folders of shards, as single folders, tars and URLs."""
    if path.startswith("pipe:") or "://" in path:
        return list(braceexpand(path))
    found: list[str] = []
    for name in braceexpand(str(Path(path).expanduser())):
        if name.endswith(".tar") and not glob.has_magic(name):
            found.append(name)  # one of 100,000, perhaps: they are looked at together
            continue
        matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name]  # noqa: PTH207 (absolute patterns)
        if not matches or not Path(matches[0]).exists():
            raise ConfigError(f"no such file or folder: {name}", "data.sources")
        found += [shard for match in matches for shard in ([match] if match.endswith(".tar") else _shards_in(match))]
    return found


def _shards_in(name: str) -> list[str]:
    """The tars directly in a folder, or the name itself."""
    if not Path(name).is_dir():
        return [name]
    files = sorted(entry.path for entry in os.scandir(name) if not entry.name.startswith("."))
    return [file for file in files if file.endswith(".tar") or is_streamed(file)] or [name]
