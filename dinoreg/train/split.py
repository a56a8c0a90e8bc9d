"""Who reads what: how the samples of a pass fall to the ranks of a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinoreg.data.order import EpochOrder
from dinoreg.data.sources import Collection, Reader, Sources
from dinoreg.train.recipe import RunConfig

LOOK = 100_000  # samples of the order that are drawn, a few seconds' worth


@dataclass(frozen=True)
class Split:
    """Of one pass over the sources. Of the order only the first `drawn` samples of the passes are looked at."""

    samples: int
    shards: int  # tars, 0 for folders alone
    open_at_once: int  # of these, by all ranks together
    drawn: int
    once: bool  # none of them came twice
    images: tuple[int, int]  # of a pass, of the rank with fewest and with most
    read: tuple[int, int] | None  # bytes in the steps drawn; None where files would have to be asked one by one


def split(sources: Sources, config: RunConfig, world: int) -> Split | None:
    """None for streams, which are dealt by whole shards and have no order to look at.

    Sources with weights have passes of their own, each looked at by itself.
    """
    total = sources.num_samples
    if total is None:
        return None
    parts = [part for part in sources.parts if isinstance(part, Collection)]
    tars = [len(source.chunk_sizes()) for part in parts for source in part.sources if not source.scattered]
    orders = Reader(sources, config.seed).orders  # those of training
    places = [_draw(part, order, LOOK // len(parts)) for part, order in zip(parts, orders, strict=True)]
    return Split(
        samples=total,
        shards=sum(tars),
        open_at_once=min(sum(tars), config.data.shuffle_window * len(parts)),
        drawn=sum(map(len, places)),
        once=all(len(np.unique(drawn, axis=0)) == len(drawn) for drawn in places),
        images=_images(total, config.train.batch_size, world),
        read=_bytes(parts[0], places[0], config.train.batch_size, world) if len(parts) == 1 else None,
    )


def _draw(part: Collection, order: object, most: int) -> NDArray[np.int64]:
    """(n, 2): which of the part's sources, and the index in it, for the beginning of its first pass."""
    assert isinstance(order, EpochOrder)
    which = {id(source): place for place, source in enumerate(part.sources)}
    found = (part.at(order, turn) for turn in range(min(len(part), most)))
    return np.array([(which[id(source)], index) for source, index in found], dtype=np.int64)


def _images(total: int, batch: int, world: int) -> tuple[int, int]:
    """Fewest and most images of a pass on a rank: a step's samples are dealt in equal runs; the last may be partial."""
    steps, rest = divmod(total, batch)
    share = batch // world
    shares = [steps * share + min(max(rest - rank * share, 0), share) for rank in (world - 1, 0)]
    return shares[0], shares[1]


def _bytes(part: Collection, places: NDArray[np.int64], batch: int, world: int) -> tuple[int, int] | None:
    steps = len(places) // batch
    if any(source.scattered for source in part.sources) or not steps:
        return None
    read = np.empty(len(places), dtype=np.int64)
    for which, source in enumerate(part.sources):
        mine = places[:, 0] == which
        read[mine] = source.sizes()[places[mine, 1]]
    by_rank = read[: steps * batch].reshape(steps, world, -1).sum((0, 2))
    return int(by_rank.min()), int(by_rank.max())
