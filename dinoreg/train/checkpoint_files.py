"""The files of a checkpoint: written so that they survive a crash, checked before they are used, opened without trust.

A checkpoint's folder holds what torch.distributed.checkpoint writes (`.metadata`, `__<rank>_<n>.distcp`), `run.json`,
and `manifest.json` with the size and the CRC-32 of each of the others, which is written last.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, EnumMeta
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter, Metadata
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

MANIFEST = "manifest.json"
METADATA = ".metadata"
RUN = "run.json"
_CHUNK = 8 * 2**20  # bytes read at a time

Sums = dict[str, tuple[int, int]]  # bytes and CRC-32, by file name


class _Summed(io.BufferedWriter):
    """A file that knows its checksum. It is taken of what should be in the file, before anything can be lost."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.size = self.sum = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.sum = zlib.crc32(data, self.sum)
        self.size += memoryview(data).nbytes
        try:
            return super().write(data)
        except OSError as error:
            self.error = error  # torch.save would tell of "unexpected pos" instead
            raise


class SummedFiles(FileSystem):
    """Writes files, and keeps the checksum of each under its name."""

    def __init__(self) -> None:
        self.sums: Sums = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        file = _Summed(Path(path))
        try:
            with file:
                yield file
        except Exception as error:
            if file.error is not None and error is not file.error:
                raise file.error from error
            raise
        self.sums[Path(path).name] = file.size, file.sum

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)

    def write_text(self, path: Path, text: str) -> None:
        """Write and sync."""
        with self.create_stream(path, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


class SummingWriter(FileSystemWriter):
    """torch's writer, which syncs each file; `files.sums` has what this rank wrote."""

    def __init__(self, folder: Path) -> None:
        # Nothing is copied ahead: all is in host memory, and the attempt would open a context on every rank's GPU 0.
        super().__init__(folder, per_thread_copy_ahead=0)
        self.fs = self.files = SummedFiles()

    def storage_meta(self) -> StorageMeta:
        """Without the path, which the final name will not match."""
        return StorageMeta(save_id=self.save_id)


def write_manifest(folder: Path, sums: Sums) -> None:
    files = {name: {"bytes": size, "crc32": f"{crc:08x}"} for name, (size, crc) in sorted(sums.items())}
    SummedFiles().write_text(folder / MANIFEST, json.dumps({"files": files}, indent=1))


def read_manifest(folder: Path) -> Sums:
    """Raises ValueError when it cannot be read, or names files outside of the folder."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        sums = {str(name): (int(entry["bytes"]), int(entry["crc32"], 16)) for name, entry in files.items()}
    except OSError as error:
        raise ValueError(f"{MANIFEST} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is not a manifest") from error
    for name in sums:
        _demand_inside(name, MANIFEST)
    if not {METADATA, RUN} <= sums.keys():
        raise ValueError(f"{MANIFEST} does not name {METADATA} and {RUN}")
    return sums


def check_file(path: Path, size: int, crc: int) -> None:
    """Raises ValueError when the file is not the one that was written."""
    try:
        found = path.stat().st_size
        if found != size:
            raise ValueError(f"{path.name} has {found:,} bytes instead of {size:,}")
        if _crc_of(path) != crc:
            raise ValueError(f"{path.name} has changed since it was written: its checksum differs")
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error


def _crc_of(path: Path) -> int:
    crc = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not
            raise
    finally:
        os.close(descriptor)


# ---- opening without trust

_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    (_METADATA_MODULE, "Metadata"),
    (_METADATA_MODULE, "TensorStorageMetadata"),
    (_METADATA_MODULE, "ChunkStorageMetadata"),
    (_METADATA_MODULE, "TensorProperties"),
    (_METADATA_MODULE, "_MEM_FORMAT_ENCODING"),
    (_METADATA_MODULE, "MetadataIndex"),
    (_METADATA_MODULE, "StorageMeta"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),  # looks a layout up by its name
    ("torch", "Size"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """torch keeps the metadata as a pickle, which could name any function of Python's to be called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):  # by which Python 3.11.0 to 3.11.3 writes members of an Enum
            return _member
        raise ValueError(f"{METADATA} is refused: it names {module}.{name}, which no checkpoint of ours needs")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise ValueError(f"{METADATA} is refused: it refers to something outside of itself")


def _member(kind: Any, name: str) -> Enum:
    """getattr, of nothing but an Enum."""
    if not (isinstance(kind, EnumMeta) and name in kind.__members__):
        raise ValueError(f"{METADATA} is refused: it wants an attribute '{name}', which no checkpoint of ours needs")
    return kind[name]


def read_metadata(folder: Path) -> Metadata:
    """What a checkpoint holds. Raises ValueError for what is no metadata of ours; runs nothing that the file names."""
    try:
        with (folder / METADATA).open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        tensors, places = metadata.state_dict_metadata, metadata.storage_data.values()
        strange = [name for name, entry in tensors.items() if not isinstance(entry, TensorStorageMetadata)]
        names = {str(place.relative_path) for place in places}
    except ValueError:
        raise
    except OSError as error:
        raise ValueError(f"{METADATA} cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{METADATA} cannot be read: {type(error).__name__}") from error
    if strange:
        raise ValueError(f"{METADATA} is refused: {strange[0]} is not a tensor")
    for name in names:
        _demand_inside(name, METADATA)
    return metadata


def _demand_inside(name: str, source: str) -> None:
    if Path(name).name != name:
        raise ValueError(f"{source} is refused: it names {name}, a file outside of its folder")


class SafeReader(FileSystemReader):
    """torch's reader, with metadata from `read_metadata`; it opens tensors with `weights_only=True` by itself."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.metadata = read_metadata(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


class TensorsOnly(DefaultLoadPlanner):
    """torch's planner would open anything else with an unrestricted pickle."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> NoReturn:
        raise ValueError(f"{read_item.dest_index.fqn} is refused: it is not a tensor")
