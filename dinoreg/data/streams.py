"""Shards that can only be read from the start: pipes, URLs, compressed tars. Read by the webdataset library."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dinoreg.data.counter import Purpose, generator, make_key
from dinoreg.data.images import EXTENSIONS, BadImage, DataError

STREAMED_PREFIXES = (
    "pipe:",
    "http://",
    "https://",
    "ftp://",
    "ftps://",
    "sftp://",
    "scp:",
    "gs:",
    "s3:",
    "ais:",
    "hf:",
)
STREAMED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_streamed(path: str) -> bool:
    """Whether a source has no random access."""
    return path.startswith(STREAMED_PREFIXES) or path.endswith(STREAMED_SUFFIXES)


@dataclass(frozen=True)
class StreamedEntry:
    """What a stream gave: the bytes of an image, or the reason why a shard broke off."""

    data: bytes | BadImage
    url: str
    key: str

    def read(self) -> bytes:
        """Raises BadImage."""
        if isinstance(self.data, BadImage):
            raise self.data
        return self.data

    def where(self) -> tuple[str, str]:
        """(shard, key)."""
        return self.url, self.key


class Stream:
    """Endless samples of one consumer (a worker of a rank) out of all consumers, in an order fixed by the key.

    Each pass shuffles the shards; consumers take turns by shard, or by sample where there are fewer shards than
    consumers. Samples then go through a buffer from which a random one leaves. A stream cannot be resumed in its
    middle: start it again under another key.
    """

    def __init__(self, urls: list[str], buffer: int, key: int, consumer: int, consumers: int) -> None:
        self.urls, self.buffer, self.key = urls, buffer, key
        self.consumer, self.consumers = consumer, consumers
        self._entries = self._shuffled()

    def next(self) -> StreamedEntry:
        """The next image, or the failure of a shard. Raises DataError when nothing can be read at all."""
        return next(self._entries)

    def _shuffled(self) -> Iterator[StreamedEntry]:
        rng = generator(make_key(self.key, self.consumer), Purpose.STREAM, 0)
        for epoch in itertools.count():
            held: list[StreamedEntry] = []
            for entry in self._one_pass(epoch):
                if isinstance(entry.data, BadImage):
                    yield entry
                elif len(held) < self.buffer:
                    held.append(entry)
                else:
                    place = int(rng.integers(len(held)))
                    yield held[place]
                    held[place] = entry
            # Emptied before the next pass, or shards smaller than the buffer would be fetched again to fill it.
            yield from (held[place] for place in rng.permutation(len(held)))

    def _one_pass(self, epoch: int) -> Iterator[StreamedEntry]:
        """This consumer's samples of a pass. One that gives nothing ends the run, for so would the next."""
        order = generator(self.key, Purpose.STREAM, epoch + 1).permutation(len(self.urls))
        by_shard = len(self.urls) >= self.consumers
        mine = order[self.consumer :: self.consumers] if by_shard else order
        found, given, failure = 0, 0, ""
        for entry in self._read_shards([self.urls[i] for i in mine]):
            if isinstance(entry.data, BadImage):
                failure = str(entry.data)
                yield entry
                continue
            found += 1
            if by_shard or found % self.consumers == self.consumer:
                given += 1
                yield entry
        if not found:
            raise DataError(f"no image in any of {len(mine)} streamed shards, as {self.urls[mine[0]]}. {failure}")
        if not given:
            raise DataError(f"{found} streamed images are too few for {self.consumers} readers: lower data.workers")

    def _read_shards(self, urls: list[str]) -> Iterator[StreamedEntry]:
        from webdataset import tariterators  # only where something is streamed: it brings its own start-up time

        failures: list[BadImage] = []

        def note(error: Exception) -> bool:
            failures.append(BadImage("unreachable", " ".join(str(part) for part in error.args)))
            return True  # go on with the next shard

        for url in urls:
            for sample in tariterators.tarfile_samples([{"url": url}], handler=note):
                image = _image_of(sample)
                if image is not None:
                    yield StreamedEntry(image, url, sample["__key__"])
            yield from (StreamedEntry(failure, url, "") for failure in failures)
            failures.clear()


def _image_of(sample: dict[str, Any]) -> bytes | None:
    """The image among the members of one key: a plain name before a compound one (`jpg` before `seg.png`)."""
    images = [name for name in sample if name.rpartition(".")[2] in EXTENSIONS and not name.startswith("__")]
    return min((("." in name, i, sample[name]) for i, name in enumerate(images)), default=(0, 0, None))[2]
