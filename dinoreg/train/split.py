"""Who reads what: how the samples of a pass fall to the ranks of a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinoreg.data.sources import Collection, Reader, Sources, StoredEntry
from dinoreg.data.stored import Folder, Source
from dinoreg.train.recipe import RunConfig

LOOK = 100_000  # samples of the order that are drawn, a few seconds' worth


@dataclass(frozen=True)
class Split:
    """Of one pass over the sources. The order is drawn for the first `looked_at` samples only."""

    samples: int
    shards: int  # tars, 0 for folders alone
    open_at_once: int  # of these, by all ranks together
    looked_at: int
    once: bool  # no sample came again before every other one had come
    images: tuple[int, int]  # of a pass, of the rank with fewest and with most
    read: tuple[int, int] | None  # bytes in the steps looked at; None where files would have to be asked one by one


def split(sources: Sources, config: RunConfig, world: int) -> Split | None:
    """None for streams, which are dealt by whole shards and have no order to look at."""
    total = sources.num_samples
    if total is None:
        return None
    parts = [part for part in sources.parts if isinstance(part, Collection)]
    stored = [source for part in parts for source in part.sources]
    tars = sum(len(source.chunk_sizes()) for source in stored if not isinstance(source, Folder))
    numbers = min(total, LOOK)
    places = _draw(sources, stored, config.seed, numbers)
    return Split(
        samples=total,
        shards=tars,
        open_at_once=min(tars, config.data.shuffle_window * len(parts)),
        looked_at=numbers,
        once=all(_came_once(part, stored, places) for part in parts),
        images=_images(total, config.train.batch_size, world),
        read=_bytes(stored, places, config.train.batch_size, world),
    )


def _draw(sources: Sources, stored: list[Source], seed: int, numbers: int) -> NDArray[np.int64]:
    """(numbers, 2): which of the stored sources, and the index in it, by the reader that training uses."""
    reader, which = Reader(sources, seed), {id(source): place for place, source in enumerate(stored)}
    places = np.empty((numbers, 2), dtype=np.int64)
    for number in range(numbers):
        entry = reader.entry(number)
        assert isinstance(entry, StoredEntry)
        places[number] = which[id(entry.source)], entry.index
    return places


def _came_once(part: Collection, stored: list[Source], places: NDArray[np.int64]) -> bool:
    """Whether no sample of a part came twice while another had yet to come once, in all its passes."""
    counts = [
        np.bincount(places[places[:, 0] == which, 1], minlength=len(source))
        for which, source in enumerate(stored)
        if any(source is own for own in part.sources)
    ]
    each = np.concatenate(counts)
    return int(each.max() - each.min()) <= 1


def _images(total: int, batch: int, world: int) -> tuple[int, int]:
    """Fewest and most images of a pass on a rank: a step's samples are dealt in equal runs; the last may be partial."""
    steps, rest = divmod(total, batch)
    share = batch // world
    shares = [steps * share + min(max(rest - rank * share, 0), share) for rank in (world - 1, 0)]
    return shares[0], shares[1]


def _bytes(stored: list[Source], places: NDArray[np.int64], batch: int, world: int) -> tuple[int, int] | None:
    steps = len(places) // batch
    if any(isinstance(source, Folder) for source in stored) or not steps:
        return None
    read = np.empty(len(places), dtype=np.int64)
    for which, source in enumerate(stored):
        mine = places[:, 0] == which
        read[mine] = source.sizes()[places[mine, 1]]
    by_rank = read[: steps * batch].reshape(steps, world, -1).sum((0, 2))
    return int(by_rank.min()), int(by_rank.max())
