"""What is known of many tar shards: their names, how they were found, and where their images lie."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinoreg.data import tarindex
from dinoreg.data.pool import watch
from dinoreg.data.tables import Array, Tables, digest, load_tables, pack_names, save_tables

VERSION = "shards 1"  # of what is remembered, and of the scan that found it

logger = logging.getLogger("dinoreg")


def catalogue(tars: Sequence[str], cache: Path | None = None) -> Tables:
    """What a process needs to read the images of some tars.

    names, ends: the tars; stamps: int64 (S, 2), their sizes in bytes and times of change in ns; rows: int64 (S,),
    images up to the end of each; places: int64 (n, 3), as in TarIndex.

    cache: a folder in which all this is kept for the other processes, and for the next time: it is looked up instead of
    100,000 files as long as names, sizes and times are the same. Raises ValueError and OSError, in one line.
    """
    names, ends = pack_names(tars)
    stamps = np.concatenate(list(tarindex.in_threads(_stamps, tars)))
    known: dict[str, Array] = {"names": names, "ends": ends, "stamps": stamps}
    if cache is None:
        return _in_memory(known, tars)
    path = cache / f"shards-{digest(names, ends)[:16]}.tables"
    key = digest(VERSION.encode(), *known.values())
    if saved := load_tables(path, key, check=True):
        return saved
    try:
        counts: list[int] = []
        places = _counted(tarindex.find_places(tars), counts, len(tars))
        rows = (np.cumsum(counts, dtype=np.int64) for _ in range(1))  # asked for when all are counted
        save_tables(path, key, {**{name: [table] for name, table in known.items()}, "places": places, "rows": rows})
        return load_tables(path, key) or _in_memory(known, tars)
    except OSError as error:
        found = _in_memory(known, tars)
        logger.warning(f"what was found in the shards cannot be kept for the next start: {error}")
        return found


def _in_memory(known: dict[str, Array], tars: Sequence[str]) -> Tables:
    counts: list[int] = []
    places = np.concatenate(list(_counted(tarindex.find_places(tars), counts, len(tars))))
    return Tables({**known, "places": places, "rows": np.cumsum(counts, dtype=np.int64)})


def _counted(tables: Iterable[Array], counts: list[int], total: int) -> Iterator[Array]:
    for table in watch(tables, total, "looking into shards"):
        counts.append(len(table))
        yield table


def _stamps(tars: Sequence[str]) -> NDArray[np.int64]:
    return np.array([stamp(os.stat(tar), tar) for tar in tars], dtype=np.int64)  # noqa: PTH116


def stamp(status: os.stat_result, name: str = "") -> tuple[int, int]:
    """(size, time of change) by which a file is known again.

    No inode: they are not the same on all machines of a cluster. Raises ValueError for what is not a plain file.
    """
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{name} is no plain file")
    return status.st_size, status.st_mtime_ns
