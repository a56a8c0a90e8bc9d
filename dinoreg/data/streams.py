"""Shards that can only be read from the start: pipes, URLs, compressed tars. Samples are grouped as webdataset does."""

from __future__ import annotations

import itertools
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dinoreg.data.counter import Purpose, generator, make_key
from dinoreg.data.images import EXTENSIONS, MAX_BYTES, BadImage, DataError
from dinoreg.data.progress import Deal, Progress
from dinoreg.data.remote import Patience, open_remote
from dinoreg.data.tarindex import is_safe

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
READ_BYTES = 1 << 18
NAMING_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, b"K")
MAX_NAME = 1 << 20  # bytes
BARREN = 20  # shards without an image in between end the run; fewer where there are fewer


def is_streamed(path: str) -> bool:
    """Whether a source has no random access."""
    return path.startswith(STREAMED_PREFIXES) or path.endswith(STREAMED_SUFFIXES)


@dataclass(frozen=True)
class StreamedEntry:
    """What a stream gave: the bytes of an image, or the reason why a shard broke off or a member was refused."""

    data: bytes | BadImage
    url: str
    key: str
    turn: int = 0  # of the shard among the reader's

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

    Each pass shuffles the shards and deals them out (see `Deal`). Samples then go through a buffer from which a random
    one leaves. A shard is done when its last image has left the buffer; `take_done` tells. A stream goes on by whole
    shards: those dealt to this consumer that are not done (`progress`) are read from their beginning, so at most the
    images of the shards that were being read, or lay in the buffer, are seen again. One that cannot be read counts as
    done: its turn comes again in the next pass.
    """

    def __init__(
        self,
        urls: list[str],
        buffer: int,
        key: int,
        consumer: int,
        consumers: int,
        deal: Deal | None = None,
        progress: Progress | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.urls, self.buffer, self.key = urls, buffer, key
        self.consumer, self.consumers = consumer, consumers
        self.deal = deal or Deal(len(urls), consumers)
        self.progress = progress or Progress(self.deal.epoch)
        self.patience = patience or Patience()
        self._inside: Counter[int] = Counter()  # images of each turn that have not been handed out
        self._whole: set[int] = set()  # turns that have been read to their end, with images inside
        self._done: list[tuple[int, int]] = []
        self._barren: set[str] = set()  # shards that gave nothing since the last that gave an image
        self._epoch = self.progress.epoch
        self._entries = self._shuffled()

    def next(self) -> StreamedEntry:
        """The next image, or the failure of a shard. Raises DataError when nothing can be read at all."""
        entry = next(self._entries)
        if not isinstance(entry.data, BadImage):
            self._inside[entry.turn] -= 1
            if entry.turn in self._whole:
                self._finish(entry.turn)
        return entry

    def take_done(self) -> list[tuple[int, int]]:
        """(pass, turn) of the shards whose last image was handed out since this was asked last."""
        done, self._done = self._done, []
        return done

    def _finish(self, turn: int) -> None:
        """A shard that has been read to its end is done when none of its images is inside."""
        self._whole.add(turn)
        if not self._inside[turn]:
            self._whole.remove(turn)
            del self._inside[turn]
            self._done.append((self._epoch, turn))

    def _shuffled(self) -> Iterator[StreamedEntry]:
        for epoch in itertools.count(self.progress.epoch):
            self._epoch = epoch
            rng = generator(make_key(self.key, self.consumer), Purpose.STREAM, epoch)
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
        """This consumer's samples of a pass. One that gives too little for all ends the run, for so would the next."""
        order = generator(self.key, Purpose.STREAM, epoch + 1).permutation(len(self.urls))
        left = self.deal.left(epoch)
        before = self.progress.done if epoch == self.progress.epoch else set()
        found, given = 0, 0
        for turn, place in enumerate(self.deal.share(left, epoch, self.consumer).tolist()):
            if turn in before:
                continue
            for mine, entry in self._one_shard(self.urls[order[place]], place, turn):
                is_image = not isinstance(entry.data, BadImage)
                found, given = found + is_image, given + (is_image and mine)
                if mine:
                    yield entry
            self._finish(turn)
        complete = len(left) == len(self.urls) and not before
        if complete and 0 < found < self.consumers and not given:
            raise DataError(f"{found} streamed images are too few for {self.consumers} readers: lower data.workers")

    def _one_shard(self, url: str, place: int, turn: int) -> Iterator[tuple[bool, StreamedEntry]]:
        """A shard's images and failures, and whether they are this consumer's."""
        # Counted from another consumer in each shard, so that shards of one image are not all the same one's.
        first = place * self.consumers // len(self.urls)
        found, failure = 0, ""
        for key, data in read_shard(url, self.patience):
            entry = StreamedEntry(data, url, key, turn)
            if isinstance(data, BadImage):
                failure = str(data)
                yield True, entry
                continue
            mine = self.deal.by_shard or (first + found) % self.consumers == self.consumer
            found += 1
            self._inside[turn] += mine
            yield mine, entry
        self._barren = set() if found else self._barren | {url}
        if len(self._barren) >= min(len(set(self.urls)), BARREN):
            raise DataError(f"no image in any of {len(self._barren)} streamed shards, as {url}. {failure}")


def read_shard(url: str, patience: Patience) -> Iterator[tuple[str, bytes | BadImage]]:
    """(key, image) of each sample of a tar, and what was refused or broke off as (member or nothing, reason)."""
    from webdataset.tariterators import group_by_keys  # only where something is streamed: it is slow to import

    refused: list[tuple[str, bytes | BadImage]] = []

    def note(error: Exception) -> bool:
        refused.append(("", BadImage("unreadable", str(error.args[0]))))
        return True  # go on with the next member

    for sample in group_by_keys(_members(url, patience, refused), handler=note):
        image = _image_of(sample)
        if image is not None:
            yield sample["__key__"], image
        yield from refused
        refused.clear()
    yield from refused


def _members(url: str, patience: Patience, refused: list[tuple[str, bytes | BadImage]]) -> Iterator[dict[str, Any]]:
    """The regular files of a tar; what comes before a break is kept."""
    stream = None
    try:
        stream = open_remote(url, patience)
        with tarfile.open(fileobj=stream, mode="r|*", bufsize=READ_BYTES, tarinfo=_Header) as tar:  # type: ignore[call-overload]
            for member in tar:
                tar.members = []  # or every header would be kept
                if member.size > MAX_BYTES:
                    # The end: tarfile would look for the next member for as long as this one claims to be.
                    refused.append((member.name, BadImage("too-large", f"{member.size} bytes by its header")))
                    return
                if not member.isreg():
                    continue
                if not is_safe(member.name):
                    refused.append((member.name, BadImage("unsafe-path", "it leads out of its folder")))
                    continue
                file = tar.extractfile(member)
                assert file is not None
                yield {"fname": member.name, "data": file.read(), "__url__": url}
    except Exception as error:  # of networks, tarfile, decompressors, or a scheme that webdataset does not know
        text = next(iter(str(error).strip().splitlines()), type(error).__name__)
        refused.append(("", BadImage("unreachable", text)))
    finally:
        if stream is not None:
            stream.close()


class _Header(tarfile.TarInfo):
    """A member's header. A member that only holds the name of the next one is read as a whole, so it must be short."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        if header.type in NAMING_TYPES and header.size > MAX_NAME:
            raise tarfile.ReadError(f"a name of {header.size} bytes by the header of {header.name!r}")
        return header


def _image_of(sample: dict[str, Any]) -> bytes | None:
    """The image among the members of one key: a plain name before a compound one (`jpg` before `seg.png`)."""
    images = [name for name in sample if name.rpartition(".")[2] in EXTENSIONS and not name.startswith("__")]
    return min((("." in name, i, sample[name]) for i, name in enumerate(images)), default=(0, 0, None))[2]
