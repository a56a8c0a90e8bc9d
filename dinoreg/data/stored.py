"""Sources with random access: folders of images, and local tar shards."""

from __future__ import annotations

import os
import socket
import stat
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dinoreg.config import ConfigError
from dinoreg.data import tarindex
from dinoreg.data.catalog import catalogue, stamp
from dinoreg.data.images import EXTENSIONS, MAX_BYTES, BadImage
from dinoreg.data.tables import digest, keep, pack_names, unpack_name
from dinoreg.data.tarindex import BLOCK

FOLDER_CHUNK = 1024  # files that count as one shard in the order; they are drawn from the whole folder
OPEN_SHARDS = 64  # file descriptors a process keeps
FOREIGN_INDEX = "the index beside the shard is of another one: remove it"
PROBES = 16  # shards by which it is told whether two machines, or a run and the one before, see the same files


class Source(Protocol):
    """Samples that can be read in any order. `scattered`: the order within chunks says nothing, files are apart."""

    scattered: bool

    def __len__(self) -> int: ...
    def sizes(self) -> NDArray[np.int64]: ...
    def chunk_sizes(self) -> NDArray[np.int64]: ...
    def identity(self) -> str: ...
    def check_here(self) -> None: ...
    def locate(self, index: int) -> tuple[str, str]: ...
    def announce(self, index: int) -> None: ...
    def read(self, index: int) -> bytes: ...


class Folder:
    """Every image file below a folder, at any depth, through links; names in one block of bytes (40 MB a million).

    cache: a folder in which the names are kept for the other processes of the run; the next run looks again.
    """

    scattered = True

    def __init__(self, root: Path, cache: Path | None = None) -> None:
        self.root = str(root)
        names, ends = pack_names(_walk_images(self.root))
        path = cache / f"folder-{digest(self.root.encode())[:16]}.tables" if cache else None
        self._tables = keep({"names": names, "ends": ends}, path)

    def __str__(self) -> str:
        return self.root

    def __len__(self) -> int:
        return len(self._tables["ends"])

    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each file, 0 where a link leads nowhere."""
        return np.array([_size(f"{self.root}/{self.name(i)}") for i in range(len(self))], dtype=np.int64)

    def chunk_sizes(self) -> NDArray[np.int64]:
        """Chunks of FOLDER_CHUNK files, so that folders and shards share one order."""
        full, rest = divmod(len(self), FOLDER_CHUNK)
        return np.array([FOLDER_CHUNK] * full + [rest] * (rest > 0), dtype=np.int64)

    def identity(self) -> str:
        """A digest of the names in their order: as long as it is the same, so is what an index means."""
        return digest(self._tables["ends"], self._tables["names"])

    def check_here(self) -> None:
        """A folder is looked at file by file."""

    def name(self, index: int) -> str:
        """The path of a file, relative to the folder."""
        return unpack_name(self._tables, index)

    def locate(self, index: int) -> tuple[str, str]:
        """(folder, name)."""
        return self.root, self.name(index)

    def announce(self, index: int) -> None:
        """A file must be opened before the disk can be asked for it."""

    def read(self, index: int) -> bytes:
        """Raises BadImage when the file has gone."""
        try:
            # Opening a pipe that somebody named like an image would wait for ever.
            descriptor = os.open(f"{self.root}/{self.name(index)}", os.O_RDONLY | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:  # noqa: PTH123
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise BadImage("not-an-image", "no plain file")
                if status.st_size > MAX_BYTES:
                    raise BadImage("too-large", f"{status.st_size} bytes")
                return file.read()
        except OSError as error:
            raise BadImage("missing", str(error)) from error


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 (pathlib takes six times as long)
    except OSError:
        return 0


def _walk_images(root: str) -> Iterator[str]:
    """Relative paths of the images below root, sorted within each folder; links are followed, circles are not."""
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        folder, above = pending.pop()
        status = os.stat(os.path.join(root, folder))  # noqa: PTH116, PTH118 (pathlib costs more than the listing)
        here = (status.st_dev, status.st_ino)
        if here in above:
            continue
        with os.scandir(os.path.join(root, folder)) as entries:  # noqa: PTH118
            found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
        prefix = folder + "/" if folder else ""
        pending += [(prefix + name, above | {here}) for name, is_folder in reversed(found) if is_folder]
        for name, is_folder in found:
            if not is_folder and name.rpartition(".")[2].lower() in EXTENSIONS:
                yield prefix + name


class Shards:
    """Images in local, uncompressed tar files, read at their offsets (24 bytes of memory a sample).

    cache: see `catalogue`. Raises ValueError and OSError, in one line.
    """

    scattered = False

    def __init__(self, tars: Sequence[str | Path], cache: Path | None = None) -> None:
        self._tables = catalogue([str(tar) for tar in tars], cache)
        self._open: OrderedDict[int, int] = OrderedDict()

    def __str__(self) -> str:
        count = len(self._tables["ends"])
        return self._tar(0) if count == 1 else f"{self._tar(0)} and {count - 1} more"

    def __len__(self) -> int:
        return len(self._tables["places"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)

    @property
    def tars(self) -> list[str]:
        """The names of all shards."""
        return [self._tar(shard) for shard in range(len(self._tables["ends"]))]

    def _tar(self, shard: int) -> str:
        return unpack_name(self._tables, shard)

    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each image."""
        return self._tables["places"][:, 1]

    def chunk_sizes(self) -> NDArray[np.int64]:
        """Samples in each tar."""
        return np.diff(self._tables["rows"], prepend=0)

    def identity(self) -> str:
        """A digest of the shards' names (as seen from their common folder), sizes and numbers of samples.

        As long as it is the same, so is what an index means; moving the shards or copying them changes nothing. Sizes
        of tars are rounded, and may be equal for other images: hence the places of the samples in some of the shards.
        """
        relative = pack_names(_below_common_folder(self.tars))
        rows, places = self._tables["rows"], self._tables["places"]
        some = [places[rows[shard - 1] if shard else 0 : rows[shard]] for shard in self._probes()]
        return digest(*relative, self._tables["stamps"][:, 0], rows, *some)

    def _probes(self) -> list[int]:
        """Some of the shards, for what would take too long for all."""
        count = len(self._tables["ends"])
        return sorted(set(np.linspace(0, count - 1, min(count, PROBES)).astype(int).tolist()))

    def check_here(self) -> None:
        """Raises ConfigError where this machine sees other files under the names, as copies on its own disk may be."""
        for shard in self._probes():
            try:
                seen = stamp(os.stat(self._tar(shard)), self._tar(shard))  # noqa: PTH116
            except (OSError, ValueError) as error:
                raise ConfigError(f"not to be read on {socket.gethostname()}: {error}", "data.sources") from error
            if seen != self._stamp(shard):
                raise ConfigError(
                    f"{self._tar(shard)} on {socket.gethostname()} is not the file that the main process sees: copies "
                    "need the same size and time of change (cp -p, rsync -a)",
                    "data.sources",
                )

    def _stamp(self, shard: int) -> tuple[int, int]:
        size, changed = self._tables["stamps"][shard].tolist()
        return size, changed

    def _shard(self, index: int) -> int:
        return int(self._tables["rows"].searchsorted(index, side="right"))

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = os.open(self._tar(shard), os.O_RDONLY | os.O_NONBLOCK)
        return self._open[shard]

    def locate(self, index: int) -> tuple[str, str]:
        """(tar, member)."""
        shard = self._shard(index)
        try:
            offset = int(self._tables["places"][index, 0])
            name = tarindex.member_name(self._descriptor(shard), offset)
        except OSError:
            name = ""
        # A shard that was cut or written anew has anything there, and the name goes to logs and terminals.
        return self._tar(shard), name if name and name.isprintable() else f"sample {index}"

    def announce(self, index: int) -> None:
        """Asks the disk for a sample that will be read soon, and does not wait for it.

        A disk that has many requests to choose from gives samples that lie apart as fast as it gives a whole shard.
        """
        offset, size, _ = self._tables["places"][index].tolist()
        if offset < BLOCK or not 0 <= size <= MAX_BYTES:
            return  # here and below: what is wrong is said when the sample is read
        with suppress(OSError):
            os.posix_fadvise(self._descriptor(self._shard(index)), offset - BLOCK, BLOCK + size, os.POSIX_FADV_WILLNEED)

    def read(self, index: int) -> bytes:
        """Raises BadImage when the shard has gone, was cut or was written anew since the run opened it."""
        shard = self._shard(index)
        offset, size, _ = self._tables["places"][index].tolist()
        if size > MAX_BYTES:
            raise BadImage("too-large", f"{size} bytes")
        if offset < BLOCK or size < 0:
            raise BadImage("unreadable", FOREIGN_INDEX)
        try:
            descriptor = self._descriptor(shard)
            data = os.pread(descriptor, BLOCK + size, offset - BLOCK)
            status = os.fstat(descriptor)  # after reading, for it may be written at this moment
        except OSError as error:
            raise BadImage("missing", str(error)) from error
        if len(data) < BLOCK + size:
            raise BadImage("truncated", "the shard ends before the sample does")
        if (status.st_size, status.st_mtime_ns) != self._stamp(shard):
            raise BadImage("changed", "the shard was written anew after the run had opened it")
        _demand_member(data[:BLOCK], size)
        return data[BLOCK:]

    def label(self, index: int) -> int | None:
        """The class number in the sample's `cls` member, if it has one. Raises ValueError where it is no number."""
        offset = int(self._tables["places"][index, 2])
        if offset < 0:
            return None
        text = os.pread(self._descriptor(self._shard(index)), 20, offset).split(b"\0", 1)[0]
        try:
            return int(text)
        except ValueError:
            where, member = self.locate(index)
            raise ValueError(f"the label of {member} in {where} is no number: {text!r}") from None


def _below_common_folder(names: Sequence[str]) -> Iterator[str]:
    parts = [name.rpartition("/") for name in names]
    folders = {folder + slash: os.path.abspath(folder + slash) for folder, slash, _ in parts}  # noqa: PTH100
    common = os.path.commonpath(list(folders.values()))
    relative = {folder: os.path.relpath(where, common) for folder, where in folders.items()}
    return (f"{relative[folder + slash]}/{base}" for folder, slash, base in parts)


def _demand_member(header: bytes, size: int) -> None:
    """An index may have been made by anybody, and says nothing of names. Raises BadImage."""
    try:
        name = tarindex.member_before(header, size)
    except ValueError as error:
        raise BadImage("unreadable", FOREIGN_INDEX) from error
    if not tarindex.is_safe(name):
        raise BadImage("unsafe-path", name)


def open_stored(names: Sequence[str], cache: Path | None = None) -> list[Source]:
    """Sources of folders and uncompressed tars. cache: a folder for what is found in them. Raises ConfigError."""
    tars = [name for name in names if name.endswith(".tar")]  # 100,000 names are looked at later, many at a time
    folders = [Path(name) for name in names if not name.endswith(".tar")]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is neither a folder nor a .tar file", "data.sources")
    try:
        sources: list[Source] = [Folder(folder, cache) for folder in folders]
        sources += [Shards(tars, cache)] if tars else []
    except FileNotFoundError as error:
        raise ConfigError(f"no such file or folder: {error.filename}", "data.sources") from error
    except (ValueError, OSError) as error:
        raise ConfigError(str(error), "data.sources") from error
    for source in sources:
        if len(source) == 0:
            raise ConfigError(f"no images in {source} (files named {', '.join(sorted(EXTENSIONS))})", "data.sources")
    return sources
