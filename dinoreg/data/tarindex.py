"""Where the members of a tar file lie, found from its headers alone, so that samples can be read in any order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinoreg.data.images import EXTENSIONS

BLOCK = 512
INDEX_VERSION = 1
SCAN_THREADS = 16  # headers are waited for, not computed, on the file systems where this takes long


@dataclass
class TarIndex:
    """The image members of one tar. places: int64 (n, 3) of offset and size of the image, offset of its label or -1."""

    places: NDArray[np.int64]
    names: list[str]


def scan(path: Path) -> TarIndex:
    """Finds the images in a tar, one for each key, and the `cls` member that labels each.

    A key is a member's path up to the first dot of its last part (webdataset's convention). Where images share a key
    with a plainly named one (`a.jpg`, `a.seg.png`, `a.png`) only the first plain one counts; without one (photos named
    `trip.1.jpg`, `trip.2.jpg`) each counts. Tars inside the tar are entered, as ImageNet's archive of archives needs.
    Raises ValueError when the file is not a complete, uncompressed tar.
    """
    places: list[tuple[int, int, int]] = []
    names: list[str] = []
    plain: dict[str, bool] = {}
    labels: dict[str, int] = {}
    members = []
    for name, offset, size in _walk(path):
        key, _, extension = _split_name(name)
        if extension == "cls":
            labels[key] = offset
        elif extension.rpartition(".")[2].lower() in EXTENSIONS:
            members.append((name, key, extension, offset, size))
            plain.setdefault(key, False)
            plain[key] |= "." not in extension
    seen: set[str] = set()
    for name, key, extension, offset, size in members:
        if plain[key] and ("." in extension or key in seen):
            continue
        seen.add(key)
        places.append((offset, size, labels.get(key, -1)))
        names.append(name)
    return TarIndex(np.array(places, dtype=np.int64).reshape(-1, 3), names)


def _split_name(name: str) -> tuple[str, str, str]:
    folder, slash, base = name.rpartition("/")
    if base.startswith("."):  # such as the ._photo.jpg that macOS adds
        return name, "", ""
    stem, dot, extension = base.partition(".")
    return folder + slash + stem, dot, extension


def _walk(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each regular member."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield from _walk_range(descriptor, path, 0, os.fstat(descriptor).st_size, "")
    finally:
        os.close(descriptor)


def _walk_range(descriptor: int, path: Path, position: int, end: int, folder: str) -> Iterator[tuple[str, int, int]]:
    overrides: dict[str, str] = {}
    while position + BLOCK <= end:
        header = os.pread(descriptor, BLOCK, position)
        if header.count(0) == BLOCK:  # the end mark
            return
        kind, name, size = _parse_header(header, path, position)
        size = int(overrides.get("size", size))
        body = position + BLOCK
        position = body + -(-size // BLOCK) * BLOCK
        if body + size > end:
            raise ValueError(f"{path} is cut off: a member at byte {body} should have {size} bytes")
        if kind == b"L":
            overrides["path"] = os.pread(descriptor, size, body).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif kind == b"x":
            overrides.update(_parse_pax(os.pread(descriptor, size, body)))
        elif kind in (b"0", b"\0", b"7"):
            full = folder + overrides.get("path", name)
            if full.endswith(".tar"):
                yield from _walk_range(descriptor, path, body, body + size, full.removesuffix(".tar") + "/")
            else:
                yield full, body, size
            overrides = {}
        elif kind not in b"gK":
            overrides = {}


def _parse_header(header: bytes, path: Path, position: int) -> tuple[bytes, str, int]:
    """(type, name, size) of a POSIX or GNU header (POSIX.1-2001, pax, "ustar Interchange Format")."""
    try:
        stored = int(header[148:156].strip(b"\0 ") or b"0", 8)
        if stored != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise ValueError("its checksum is wrong")
        field = header[124:136]
        size = int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.strip(b"\0 ") or b"0", 8)
    except ValueError as error:
        raise ValueError(f"{path} is not an uncompressed tar file: no valid header at byte {position}") from error
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return header[156:157], name.decode("utf-8", "surrogateescape").removeprefix("./"), size


def _parse_pax(records: bytes) -> dict[str, str]:
    """The `length key=value` records of an extended header."""
    found = {}
    while records:
        length = int(records.split(b" ", 1)[0])
        key, _, value = records[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
        found[key.decode()] = value.decode("utf-8", "surrogateescape")
        records = records[length:]
    return found


def member_name(descriptor: int, offset: int) -> str:
    """The name in the header before a member's bytes; what a long name was cut to, where it is one."""
    header = os.pread(descriptor, BLOCK, offset - BLOCK)
    return header[:100].split(b"\0", 1)[0].decode("utf-8", "replace").removeprefix("./")


def index_path(tar: Path) -> Path:
    """The file beside a shard that holds its index."""
    return tar.with_suffix(".index.npy")


def save_index(tar: Path, places: NDArray[np.int64]) -> None:
    """Writes the index beside its shard; the first row says for which file it is valid."""
    head = np.array([[INDEX_VERSION, tar.stat().st_size, len(places)]], dtype=np.int64)
    partial = index_path(tar).with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, np.concatenate([head, places]))
    partial.replace(index_path(tar))


def load_index(tar: Path) -> NDArray[np.int64] | None:
    """The places of a shard from the index beside it, or None where there is none that fits the file."""
    try:
        table = np.load(index_path(tar), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if table.ndim != 2 or table.shape[1] != 3 or len(table) == 0:
        return None
    if table[0].tolist() != [INDEX_VERSION, tar.stat().st_size, len(table) - 1]:
        return None
    places: NDArray[np.int64] = table[1:]
    return places if _still_there(tar, places) else None


def _still_there(tar: Path, places: NDArray[np.int64]) -> bool:
    """Whether the last member's header says what the index says: a shard written anew may keep its size."""
    if len(places) == 0:
        return True
    offset, size, _ = places[-1].tolist()
    with tar.open("rb") as file:
        header = os.pread(file.fileno(), BLOCK, offset - BLOCK)
    try:
        return _parse_header(header, tar, offset - BLOCK)[2] == size
    except ValueError:
        return False


def places_of(tars: list[Path]) -> list[NDArray[np.int64]]:
    """The places of many shards: from the indices beside them, by scanning otherwise; several at a time."""

    def one(tar: Path) -> NDArray[np.int64]:
        saved = load_index(tar)
        return scan(tar).places if saved is None else saved

    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        return list(pool.map(one, tars))
