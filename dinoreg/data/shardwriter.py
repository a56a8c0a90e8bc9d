"""Writes one shard: a deterministic tar, its index and a report, atomically."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinoreg.data import tarindex
from dinoreg.data.images import BadImage, Picture, open_picture
from dinoreg.data.stored import Source

JPEG_QUALITY = 92  # of images that were made smaller
SUFFIXES = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "JPEG2000": "jp2",
    "TIFF": "tif",
    "PPM": "ppm",
}  # others: their name in lower case


@dataclass(frozen=True)
class PrepareOptions:
    """What decides the content of the shards."""

    shard_size_mb: float = 256  # of source bytes
    resize: int | None = None  # pixels of the short side, of larger images only; they become JPEG
    verify: bool = True  # decode every image, and leave out those that cannot be
    labels: bool = True  # keep labels, or take them from class folders
    channels: int = 3
    seed: int = 0  # of the shuffling


@dataclass
class ShardReport:
    """What was written to one shard."""

    name: str
    fingerprint: str  # of everything that decides the content
    samples: int
    bytes: int
    sha256: str
    left_out: list[tuple[str, str, str]] = field(default_factory=list)  # reason, source, key


@dataclass(frozen=True)
class ShardJob:
    """One shard to be written: which samples, in which order."""

    path: Path
    numbers: NDArray[np.int64]
    fingerprint: str


@dataclass
class ShardWriter:
    """Writes the shard of a job; lives in each worker process. `labels` has -1 where a sample has none."""

    sources: list[Source]
    labels: NDArray[np.int64]
    options: PrepareOptions

    def __call__(self, job: ShardJob) -> Iterator[ShardReport | int]:
        """Yields 1 for each sample done, so that somebody can watch, and the report at the end."""
        kept = finished_shard(job)
        if kept is not None:
            yield len(job.numbers)
            yield kept
            return
        partial = job.path.with_name(f".{job.path.name}.partial")
        report = ShardReport(job.path.name, job.fingerprint, 0, 0, "")
        with partial.open("wb") as file:
            hashed: Any = _HashedFile(file)
            with tarfile.open(fileobj=hashed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for number in job.numbers.tolist():
                    self._add(tar, report, number)
                    yield 1
            report.bytes, report.sha256 = hashed.size, hashed.digest.hexdigest()
        partial.replace(job.path)
        tarindex.save_index(job.path, tarindex.scan(job.path).places)
        write_atomically(sidecar(job.path), json.dumps(asdict(report)))
        yield report

    def _add(self, tar: tarfile.TarFile, report: ShardReport, number: int) -> None:
        source, index = _find(self.sources, number)
        where, key = source.locate(index)
        try:
            data, suffix = self._encode(source.read(index))
        except BadImage as error:
            report.left_out.append((error.reason, where, key))
            return
        name = _member_name(number, key)
        _add_member(tar, f"{name}.{suffix}", data)
        if self.labels[number] >= 0:
            _add_member(tar, f"{name}.cls", str(self.labels[number]).encode())
        report.samples += 1

    def _encode(self, data: bytes) -> tuple[bytes, str]:
        """The bytes to store, and their file suffix. Raises BadImage."""
        picture = open_picture(data, self.options.channels)
        limit = self.options.resize
        photo = isinstance(picture.content, Image.Image) and self.options.channels in (1, 3)
        if limit is not None and photo and min(picture.width, picture.height) > limit:
            return _shrink(picture, limit), "jpg"
        if self.options.verify:
            picture.decode()
        if isinstance(picture.content, np.ndarray):
            return data, "npy" if data[:6] == b"\x93NUMPY" else "tif"
        kind = picture.content.format or "img"
        return data, SUFFIXES.get(kind, kind.lower())


def _shrink(picture: Picture, short_side: int) -> bytes:
    """The image upright, in grey or RGB, with its short side at short_side pixels, as JPEG. Raises BadImage."""
    ratio = short_side / min(picture.width, picture.height)
    size = (max(short_side, round(picture.width * ratio)), max(short_side, round(picture.height * ratio)))
    # Decoding may do the coarse part, up to twice the size that is wanted.
    coarse = max(step for step in (1, 2, 4, 8) if step == 1 or step * ratio <= 0.5)
    pixels = picture.decode(coarse).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels if picture.channels == 3 else pixels[:, :, 0])
    out = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()


def finished_shard(job: ShardJob) -> ShardReport | None:
    """The report of a shard that an earlier run has finished, if its bytes are still right."""
    try:
        report = ShardReport(**json.loads(sidecar(job.path).read_text()))
        if report.fingerprint != job.fingerprint or tarindex.load_index(job.path) is None:
            return None
        if _digest(job.path) != report.sha256:
            return None
    except (OSError, ValueError, TypeError):
        return None
    report.left_out = [(reason, source, key) for reason, source, key in report.left_out]
    return report


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class _HashedFile:
    """Passes what is written on to a file, and hashes it on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.size


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Owner, mode and time are left at fixed values, so that equal content makes equal shards."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _member_name(number: int, key: str) -> str:
    """A key that is unique, sorts as the source does, has no dot, and still says where the image came from."""
    stem = re.sub(r"\.[A-Za-z0-9]+$", "", key)
    return f"{number:09d}_{re.sub(r'[^A-Za-z0-9-]+', '_', stem)[-60:].strip('_')}"


def _find(sources: Sequence[Source], number: int) -> tuple[Source, int]:
    for source in sources:
        if number < len(source):
            return source, number
        number -= len(source)
    raise IndexError(number)


def sidecar(shard: Path) -> Path:
    """What is known of a finished shard until the manifest says it."""
    return shard.with_suffix(".json")


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
