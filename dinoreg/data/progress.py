"""How far streams have been read, in whole shards, over any number of readers and ranks.

A stream cannot be entered in its middle, so the unit in which it goes on is the shard: one whose images have all been
trained on is not read again in its pass; one that was being read, or whose images still lay in a reader's buffer, is.
Positions are plain dictionaries for JSON. That of a rank says how far each of its readers has come in the shards dealt
to it; that of a run (`merge_positions`) says for each part of the sources which shards of which passes are done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Runs = list[list[int]]  # [first, end) pairs


class ShardDone(NamedTuple):
    """The last image of a shard has been handed out: `turn` counts the reader's shards of the pass."""

    part: int
    consumer: int
    epoch: int
    turn: int


@dataclass
class Progress:
    """One reader's way through its shards: all passes before `epoch`, and these turns of it. Turns come in order."""

    epoch: int = 0
    done: set[int] = field(default_factory=set)

    def add(self, epoch: int, turn: int) -> None:
        """A reader empties its buffer between passes, so one of a later pass says that the earlier one is whole."""
        if epoch > self.epoch:
            self.epoch, self.done = epoch, set()
        self.done.add(turn)


@dataclass(frozen=True)
class Deal:
    """Which reader gets which shards of each pass, as places in the pass's order.

    Readers take turns by shard; where there are fewer shards than readers each reads all of them and they take turns
    by sample. epoch, done: where the run began or went on; passes before `epoch` are whole, and places in `done` (by
    pass) are not dealt again.
    """

    shards: int
    consumers: int
    epoch: int = 0
    done: dict[int, NDArray[np.int64]] = field(default_factory=dict)

    @property
    def by_shard(self) -> bool:
        return self.shards >= self.consumers

    @cached_property
    def _every(self) -> NDArray[np.int64]:
        return np.arange(self.shards)

    def left(self, epoch: int) -> NDArray[np.int64]:
        """The places of a pass that are dealt out."""
        done = self.done.get(epoch)
        return self._every if done is None else np.setdiff1d(self._every, done)

    def share(self, left: NDArray[np.int64], epoch: int, consumer: int) -> NDArray[np.int64]:
        """A reader's places among those of a pass, in the order in which it reads them.

        The dealing goes on from pass to pass, or the first readers would have more shards in each and fall behind.
        """
        if not self.by_shard:
            return left
        dealt = self.shards * (epoch - self.epoch) - sum(len(done) for e, done in self.done.items() if e < epoch)
        return left[(consumer - dealt) % self.consumers :: self.consumers]


def deal_from(position: Mapping[str, Any], part: int, shards: int, consumers: int) -> Deal:
    """The dealing of one part of the sources after `position`, which is what `merge_positions` gave, or empty.

    A position of another number of shards says nothing about these: their first pass begins.
    """
    found = position.get(str(part))
    if not found or found["shards"] != shards:
        return Deal(shards, consumers)
    done = {int(epoch): np.concatenate([np.arange(*run) for run in runs]) for epoch, runs in found["done"].items()}
    return Deal(shards, consumers, found["pass"], done)


def rank_position(deal: Deal, start: dict[str, Any] | None, readers: dict[int, Progress]) -> dict[str, Any]:
    """One part's position on one rank."""
    read = {str(c): {"pass": one.epoch, "done": _runs(sorted(one.done))} for c, one in sorted(readers.items())}
    return {"shards": deal.shards, "consumers": deal.consumers, "start": start, "read": read}


def merge_positions(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `build_loader(stream_position=...)` takes, of what `BatchLoader.position` gave on every rank.

    Raises ValueError when the ranks had different numbers of workers, for then they did not share the shards out.
    """
    return {part: _merge([rank[part] for rank in ranks], part) for part in ranks[0]}


def _merge(ranks: list[dict[str, Any]], part: str) -> dict[str, Any]:
    first = ranks[0]
    if any(rank[name] != first[name] for rank in ranks for name in ("shards", "consumers", "start")):
        raise ValueError("the ranks read streams with different numbers of workers: set data.workers")
    deal = deal_from({part: first["start"]} if first["start"] else {}, int(part), first["shards"], first["consumers"])
    read = {int(c): one for rank in ranks for c, one in rank["read"].items()}
    begun = {"pass": deal.epoch, "done": []}
    ways = [read.get(consumer, begun) for consumer in range(deal.consumers)]
    lowest = min(way["pass"] for way in ways)
    highest = max([way["pass"] for way in ways] + list(deal.done))
    done = {epoch: _places_done(deal, epoch, ways) for epoch in range(lowest, highest + 1)}
    while lowest in done and len(done[lowest]) == deal.shards:
        del done[lowest]
        lowest += 1
    kept = {str(epoch): _runs(places.tolist()) for epoch, places in done.items() if len(places)}
    return {"shards": deal.shards, "pass": lowest, "done": kept}


def _places_done(deal: Deal, epoch: int, ways: list[dict[str, Any]]) -> NDArray[np.int64]:
    """The places of a pass that every reader they were dealt to is done with."""
    left = deal.left(epoch)
    missing = np.zeros(deal.shards, dtype=np.int64)
    missing[left] = 1 if deal.by_shard else deal.consumers
    for consumer, way in enumerate(ways):
        share = deal.share(left, epoch, consumer)
        if way["pass"] > epoch:
            missing[share] -= 1
        elif way["pass"] == epoch:
            for first, end in way["done"]:
                missing[share[first:end]] -= 1
    return np.flatnonzero(missing == 0)


def _runs(numbers: Iterable[int]) -> Runs:
    """Rising numbers as [first, end) pairs: what is read in order takes few of them."""
    runs: Runs = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, number + 1])
    return runs


def describe(position: dict[str, Any]) -> str:
    """One line for the log of a run that goes on, or nothing where nothing is streamed."""
    parts = [f"pass {one['pass'] + 1}, {_count(one)} of its {one['shards']} shards done" for one in position.values()]
    if not parts:
        return ""
    return (
        f"streams go on by whole shards: {'; '.join(parts)}; "
        "those that were being read, or had images in a buffer, are read again"
    )


def _count(one: dict[str, Any]) -> int:
    return sum(end - first for first, end in one["done"].get(str(one["pass"]), []))
