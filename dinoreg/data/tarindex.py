"""Where the members of a tar file lie, found from its headers alone, so that samples can be read in any order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dinoreg.data.images import EXTENSIONS

T = TypeVar("T")

BLOCK = 512
REGULAR = (b"0", b"\0", b"7")  # kinds of members that are plain files
INDEX_VERSION = 1
INDEX_HEAD = 128  # bytes of an index before its rows, beginning so
INDEX_START = b"\x93NUMPY\x01\0\x76\0{'descr': '<i8', 'fortran_order': False, 'shape': ("
MAX_DEPTH = 8  # of tars inside tars
MAX_RECORDS = 2**20  # bytes of a long name or of pax records; a damaged header may ask for any number
LARGEST_OCTAL = 8**11  # sizes from here on do not fit a header
MEND = "write it anew (dinoreg data prepare), copy it again, or remove it"
SCAN_THREADS = 16  # headers are waited for, not computed, on the file systems where this takes long
AT_A_TIME = 64  # files that a thread is given


@dataclass
class TarIndex:
    """The image members of one tar. places: int64 (n, 3) of offset and size of the image, offset of its label or -1."""

    places: NDArray[np.int64]
    names: list[str]


def scan(path: str | Path) -> TarIndex:
    """Finds the images in a tar, one for each key, and the `cls` member that labels each.

    A key is a member's path up to the first dot of its last part (webdataset's convention). Where images share a key
    with a plainly named one (`a.jpg`, `a.seg.png`, `a.png`) only the first plain one counts; without one (photos named
    `trip.1.jpg`, `trip.2.jpg`) each counts. Tars inside the tar are entered, as ImageNet's archive of archives needs.
    Raises ValueError, in one line that names the place, when the file is not a complete, uncompressed tar, when
    members have absolute paths or such with `..`, and when headers are absurd.
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


def _walk(path: str | Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each regular member."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if size == 0:
            raise ValueError(f"{path} is empty: {MEND}")
        yield from _walk_range(descriptor, path, 0, size, "", 1)
    finally:
        os.close(descriptor)


def _walk_range(
    descriptor: int, path: str | Path, position: int, end: int, folder: str, depth: int
) -> Iterator[tuple[str, int, int]]:
    if depth > MAX_DEPTH:
        raise ValueError(f"{path} holds tars inside tars, more than {MAX_DEPTH} deep, at byte {position}")
    overrides: dict[str, str] = {}
    while position < end:
        header = os.pread(descriptor, min(BLOCK, end - position), position)
        if header.count(0) == len(header):  # the end mark
            return
        if len(header) < BLOCK:
            raise ValueError(f"{path} is cut off at byte {position + len(header)}, inside a header: {MEND}")
        kind, name, size = _parse_header(header, path, position)
        full, body = folder + _check_name(overrides.get("path", name), path), position + BLOCK
        size = _whole_size(size, overrides, path, position)
        if body + size > end:
            raise ValueError(f"{path} is cut off: a member at byte {body} should have {size} bytes: {MEND}")
        position = body + -(-size // BLOCK) * BLOCK
        if kind in (b"L", b"x"):
            overrides |= _read_overrides(descriptor, path, kind, body, size)
            continue
        if kind not in (b"g", b"K"):
            overrides = {}
        if kind in REGULAR:
            if full.endswith(".tar"):
                yield from _walk_range(descriptor, path, body, body + size, full.removesuffix(".tar") + "/", depth + 1)
            else:
                yield full, body, size


def _parse_header(header: bytes, path: str | Path, position: int) -> tuple[bytes, str, int]:
    """(type, name, size) of a POSIX or GNU header (POSIX.1-2001, pax, "ustar Interchange Format")."""
    try:
        if _octal(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise ValueError("its checksum is wrong")
        field = header[124:136]
        size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field)
    except ValueError as error:
        raise ValueError(f"{path} is not an uncompressed tar file: no valid header at byte {position}") from error
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return header[156:157], name.decode("utf-8", "surrogateescape").removeprefix("./"), size


def _octal(field: bytes) -> int:
    """A number as a header holds it; int() alone would take a sign, by which a walk could go backwards for ever."""
    digits = field.strip(b"\0 ") or b"0"
    if not digits.isdigit():
        raise ValueError(f"{field!r} is no octal number")
    return int(digits, 8)


def is_safe(name: str) -> bool:
    """Whether a member's path stays below the folder that a tar would be unpacked in."""
    return not name.startswith("/") and (".." not in name or ".." not in name.split("/"))


def _check_name(name: str, path: str | Path) -> str:
    """The name itself. No member is ever unpacked, but a shard that tries to leave its folder is not to be trusted."""
    if not is_safe(name):
        raise ValueError(f"{path} is not safe: the member {name[:200]!r} would lie outside of its folder")
    return name


def _whole_size(size: int, overrides: dict[str, str], path: str | Path, position: int) -> int:
    """The size in the header, or that in a pax record where it is too large for the header."""
    if "size" not in overrides:
        return size
    text = overrides["size"]
    real = int(text) if len(text) < 20 and text.isascii() and text.isdigit() else -1
    if real != size and real < LARGEST_OCTAL:
        raise ValueError(f"{path} is damaged: its member at byte {position} has the impossible size {text[:30]!r}")
    return real


def _read_overrides(descriptor: int, path: str | Path, kind: bytes, body: int, size: int) -> dict[str, str]:
    """What a GNU long name or a pax header says of the member that follows: its `path`, its `size`."""
    if size > MAX_RECORDS:
        raise ValueError(f"{path} is damaged: the name or the records at byte {body} should have {size} bytes")
    content = os.pread(descriptor, size, body)
    if kind == b"L":
        return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    try:
        records = _parse_pax(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: no valid pax records at byte {body}") from error
    return {key: value for key, value in records.items() if key in ("path", "size")}


def _parse_pax(records: bytes) -> dict[str, str]:
    """The `length key=value` records of an extended header. Raises ValueError."""
    found, position = {}, 0
    while position < len(records):
        digits = records[position : position + 8].split(b" ", 1)[0]
        end = position + (int(digits) if digits.isdigit() else 0)
        key, equals, value = records[position + len(digits) + 1 : end].partition(b"=")
        if not equals or end > len(records) or records[end - 1 : end] != b"\n":
            raise ValueError(f"no record at byte {position}")
        found[key.decode()] = value[:-1].decode("utf-8", "surrogateescape")
        position = end
    return found


def member_name(descriptor: int, offset: int) -> str:
    """The name in the header before a member's bytes; what a long name was cut to, where it is one."""
    header = os.pread(descriptor, BLOCK, offset - BLOCK)
    return header[:100].split(b"\0", 1)[0].decode("utf-8", "replace").removeprefix("./")


def member_before(header: bytes, size: int) -> str:
    """The name in the header before a member of so many bytes, long ones cut. Raises ValueError if it is no such."""
    kind, name, stored = _parse_header(header, "", 0)
    if kind not in REGULAR or (stored != size and size < LARGEST_OCTAL):
        raise ValueError(f"a member of {stored} bytes, not {size}")
    return name


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


def load_index(tar: str | Path) -> NDArray[np.int64] | None:
    """The places of a shard from the index beside it, or None where there is none that fits the file.

    Read as the bytes that `save_index` writes: np.load takes five times as long, which 100,000 shards would feel.
    """
    try:
        with open(os.path.splitext(tar)[0] + ".index.npy", "rb", 0) as file:  # noqa: PTH122, PTH123
            content = file.read()
        table = np.frombuffer(content, np.int64, offset=INDEX_HEAD).reshape(-1, 3)
        fits = content.startswith(INDEX_START) and _fits(tar, table)
    except (OSError, ValueError, IndexError):
        return None
    return table[1:] if fits else None


def _fits(tar: str | Path, table: NDArray[np.int64]) -> bool:
    """Whether the first row fits the file, and the last member's header: a shard written anew may keep its size."""
    offset, size, _ = table[-1].tolist()
    descriptor = os.open(tar, os.O_RDONLY)
    try:
        if table[0].tolist() != [INDEX_VERSION, os.fstat(descriptor).st_size, len(table) - 1]:
            return False
        if len(table) > 1:
            member_before(os.pread(descriptor, BLOCK, offset - BLOCK), size)
        return True
    finally:
        os.close(descriptor)


def find_places(tars: Sequence[str]) -> Iterator[NDArray[np.int64]]:
    """The places of many shards in turn: from the indices beside them, by scanning otherwise; several at a time.

    Raises ValueError, OSError.
    """

    def find(names: Sequence[str]) -> list[NDArray[np.int64]]:
        return [scan(name).places if (saved := load_index(name)) is None else saved for name in names]

    for places in in_threads(find, tars):
        yield from places


def in_threads(work: Callable[[Sequence[str]], T], names: Sequence[str]) -> Iterator[T]:
    """The results of `work` for successive parts of `names`: file systems answer many at a time."""
    parts = [names[start : start + AT_A_TIME] for start in range(0, len(names), AT_A_TIME)]
    pool = ThreadPoolExecutor(SCAN_THREADS)
    try:
        yield from pool.map(work, parts)
    finally:
        pool.shutdown(cancel_futures=True)  # after an error nobody wants to wait for the others
