"""Large tables that the processes of a run share: in one file that each maps, or in memory that torch hands on."""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import zlib
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

MAGIC = b"dinoreg tables 1"
HEAD = 4096  # bytes before the first table: the magic, then JSON
ALIGNED = 64
CHECKED = 2**24  # bytes that are summed at a time

logger = logging.getLogger("dinoreg")


class Tables:
    """Read-only arrays by name.

    From a file (`load_tables`) they travel to another process as its path, and all processes of a machine see the same
    memory. Made here, they travel as tensors: torch shares those with its workers; other processes get a copy.
    """

    def __init__(self, arrays: Mapping[str, Array], path: Path | None = None, key: str = "") -> None:
        self.path, self.key = path, key
        self._arrays: dict[str, Array | Tensor]
        # Tensors give out their array anew each time: when a worker is sent one, torch moves its memory.
        self._arrays = dict(arrays) if path else {name: torch.from_numpy(table) for name, table in arrays.items()}

    def __getitem__(self, name: str) -> Array:
        table = self._arrays[name]
        return table.numpy() if isinstance(table, Tensor) else table

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "key": self.key, "_arrays": {} if self.path else self._arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.path is not None:
            mapped = load_tables(self.path, self.key)
            if mapped is None:
                raise OSError(f"{self.path} has gone or was written anew while the run was using it")
            self._arrays = mapped._arrays


def save_tables(path: Path, key: str, parts: Mapping[str, Iterable[Array]]) -> None:
    """Writes tables to a file, each from one or more parts, which are taken one after the other and not kept.

    key: what the tables are valid for. The file appears under its name when it is complete. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(bytes(HEAD))
            described: dict[str, Any] = {}
            check, end = 0, HEAD
            for name, arrays in parts.items():
                start, rows, kind = end, 0, ""
                for part in arrays:
                    content = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
                    check = zlib.crc32(content, check)
                    end += file.write(content)
                    rows, kind = rows + len(part), kind or f"{part.dtype.str}{list(part.shape[1:])}"
                described[name] = [start, rows, kind]
                padding = bytes(-end % ALIGNED)
                check = zlib.crc32(padding, check)
                end += file.write(padding)
            file.seek(0)
            file.write(MAGIC + json.dumps({"key": key, "bytes": end, "check": check, "tables": described}).encode())
            file.flush()
            os.fsync(file.fileno())  # or a crash of the machine leaves a complete name before complete content
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_tables(path: Path, key: str, check: bool = False) -> Tables | None:
    """The tables of a file, mapped; None where there is none, or it is not whole, or it is valid for something else.

    check: reads everything once, to notice bytes that are not what was written.
    """
    try:
        with path.open("rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if content[: len(MAGIC)] != MAGIC:
            return None
        head = json.loads(bytes(content[len(MAGIC) : HEAD]).rstrip(b"\0"))
        if head["key"] != key or head["bytes"] != len(content) or (check and head["check"] != _sum(content)):
            return None
        arrays = {name: _table(content, *place) for name, place in head["tables"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Tables(arrays, path, key)


def keep(tables: Mapping[str, Array], path: Path | None) -> Tables:
    """The tables, mapped from the file at `path` where it can be written, or holds them already."""
    if path is None:
        return Tables(tables)
    key = digest(*tables.values())
    if saved := load_tables(path, key, check=True):
        return saved
    try:
        save_tables(path, key, {name: [table] for name, table in tables.items()})
    except OSError as error:
        logger.warning(f"what was found cannot be kept for other processes: {error}")
    return load_tables(path, key) or Tables(tables)


def digest(*parts: Array | bytes) -> str:
    """Of tables (shapes and kinds count) and bytes, in hexadecimal."""
    found = hashlib.blake2b(digest_size=32)
    for part in parts:
        if isinstance(part, bytes):
            found.update(part)
        else:
            found.update(f"{part.dtype}{part.shape}".encode())
            found.update(np.ascontiguousarray(part).reshape(-1).data)
    return found.hexdigest()


def _sum(content: memoryview) -> int:
    check = 0
    for start in range(HEAD, len(content), CHECKED):
        check = zlib.crc32(content[start : start + CHECKED], check)
    return check


def _table(content: memoryview, start: int, rows: int, kind: str) -> Array:
    dtype, _, columns = kind.partition("[")
    shape = [rows, *json.loads("[" + columns)]
    return np.frombuffer(content, dtype, int(np.prod(shape)), start).reshape(shape)


def pack_names(names: Iterable[str]) -> tuple[Array, Array]:
    """Texts in one block of bytes, and where each ends: a tenth of the memory of a list."""
    block, ends = bytearray(), array("q")
    for name in names:
        block += os.fsencode(name)
        ends.append(len(block))
    return np.frombuffer(block or bytearray(1), np.uint8), np.array(ends, dtype=np.int64)


def unpack_name(tables: Tables, index: int) -> str:
    """The index-th text of the tables `names` and `ends`."""
    ends = tables["ends"]
    start = int(ends[index - 1]) if index else 0
    return os.fsdecode(tables["names"][start : int(ends[index])].tobytes())
