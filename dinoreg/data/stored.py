"""Sources with random access: folders of images, and local tar shards."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dinoreg.config import ConfigError
from dinoreg.data import tarindex
from dinoreg.data.images import EXTENSIONS, MAX_BYTES, BadImage

FOLDER_CHUNK = 1024  # files that count as one shard in the order; they are drawn from the whole folder
OPEN_SHARDS = 64  # file descriptors a process keeps


class Source(Protocol):
    """Samples that can be read in any order. `scattered`: the order within chunks says nothing, files are apart."""

    scattered: bool

    def __len__(self) -> int: ...
    def sizes(self) -> NDArray[np.int64]: ...
    def chunk_sizes(self) -> NDArray[np.int64]: ...
    def locate(self, index: int) -> tuple[str, str]: ...
    def read(self, index: int) -> bytes: ...


class Folder:
    """Every image file below a folder, at any depth, through links; names in one block of bytes (40 MB a million)."""

    scattered = True

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        names = [os.fsencode(name) for name in _walk_images(self.root)]
        self._names = torch.frombuffer(bytearray(b"".join(names) or b"\0"), dtype=torch.uint8)
        self._ends = torch.from_numpy(np.cumsum([len(name) for name in names], dtype=np.int64))

    def __str__(self) -> str:
        return self.root

    def __len__(self) -> int:
        return len(self._ends)

    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each file, 0 where a link leads nowhere."""
        return np.array([_size(f"{self.root}/{self.name(i)}") for i in range(len(self))], dtype=np.int64)

    def chunk_sizes(self) -> NDArray[np.int64]:
        """Chunks of FOLDER_CHUNK files, so that folders and shards share one order."""
        full, rest = divmod(len(self), FOLDER_CHUNK)
        return np.array([FOLDER_CHUNK] * full + [rest] * (rest > 0), dtype=np.int64)

    def name(self, index: int) -> str:
        """The path of a file, relative to the folder."""
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._names[start : int(self._ends[index])].numpy().tobytes())

    def locate(self, index: int) -> tuple[str, str]:
        """(folder, name)."""
        return self.root, self.name(index)

    def read(self, index: int) -> bytes:
        """Raises BadImage when the file has gone."""
        try:
            with open(f"{self.root}/{self.name(index)}", "rb") as file:  # noqa: PTH123
                size = os.fstat(file.fileno()).st_size
                if size > MAX_BYTES:
                    raise BadImage("too-large", f"{size} bytes")
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
    """Images in local, uncompressed tar files, read at their offsets (24 bytes of memory a sample)."""

    scattered = False

    def __init__(self, tars: Sequence[Path]) -> None:
        self.tars = [str(tar) for tar in tars]
        places = tarindex.places_of(list(tars))
        self._sizes = np.array([len(table) for table in places], dtype=np.int64)
        self._ends = np.cumsum(self._sizes)
        # A tensor, because torch hands those to worker processes in shared memory.
        self._places = torch.from_numpy(np.concatenate(places))
        self._open: OrderedDict[int, int] = OrderedDict()

    def __str__(self) -> str:
        return self.tars[0] if len(self.tars) == 1 else f"{self.tars[0]} and {len(self.tars) - 1} more"

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)

    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each image."""
        return self._places[:, 1].numpy()

    def chunk_sizes(self) -> NDArray[np.int64]:
        """Samples in each tar."""
        return self._sizes

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = os.open(self.tars[shard], os.O_RDONLY)
        return self._open[shard]

    def locate(self, index: int) -> tuple[str, str]:
        """(tar, member)."""
        shard = self._shard(index)
        try:
            return self.tars[shard], tarindex.member_name(self._descriptor(shard), int(self._places[index, 0]))
        except OSError:
            return self.tars[shard], f"sample {index}"

    def read(self, index: int) -> bytes:
        """Raises BadImage when the shard has gone or was cut after it was indexed."""
        shard = self._shard(index)
        offset, size, _ = self._places[index].tolist()
        try:
            data = os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            raise BadImage("missing", str(error)) from error
        if len(data) < size:
            raise BadImage("truncated", "the shard ends before the sample does")
        return data

    def label(self, index: int) -> int | None:
        """The class number in the sample's `cls` member, if it has one."""
        offset = int(self._places[index, 2])
        if offset < 0:
            return None
        text = os.pread(self._descriptor(self._shard(index)), 20, offset).split(b"\0", 1)[0]
        return int(text)


def open_stored(names: Sequence[str]) -> list[Source]:
    """Sources of folders and uncompressed tars. Raises ConfigError."""
    tars = [Path(name) for name in names if not Path(name).is_dir()]
    for tar in tars:
        if tar.suffix != ".tar":
            raise ConfigError(f"{tar} is neither a folder nor a .tar file", "data.sources")
    sources: list[Source] = [Folder(Path(name)) for name in names if Path(name).is_dir()]
    try:
        sources += [Shards(tars)] if tars else []
    except (ValueError, OSError) as error:
        raise ConfigError(str(error), "data.sources") from error
    for source in sources:
        if len(source) == 0:
            raise ConfigError(f"no images in {source} (files named {', '.join(sorted(EXTENSIONS))})", "data.sources")
    return sources
