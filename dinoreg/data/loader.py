"""From sources to batches: workers, collation, device prefetch."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.data import Dataset, get_worker_info

from dinoreg.config import ConfigError
from dinoreg.data.batch import BadSample, Batch
from dinoreg.data.counter import Purpose, generator
from dinoreg.data.crops import CropConfig, cut
from dinoreg.data.feed import Feed, WorkerDied
from dinoreg.data.images import BadImage, DataError, open_picture
from dinoreg.data.masks import MaskConfig, draw_masks
from dinoreg.data.photometric import NUM_PARAMETERS, PhotometricConfig, draw
from dinoreg.data.progress import Deal, Progress, ShardDone, deal_from, describe, rank_position
from dinoreg.data.sources import DataConfig, Reader, Sources, Streamed
from dinoreg.data.workers import choose_workers, fit_shared_memory

logger = logging.getLogger("dinoreg")

MAX_ATTEMPTS = 100  # samples tried for one place in a batch
MAX_RESTARTS = 3  # of the workers in a run
PAGE = 4096  # bytes
LEAST_TRIED = 100  # samples before the share of bad ones is judged; fewer where the data are fewer


class TooManyBadSamples(DataError):
    """More samples are unusable than the configuration allows."""


@dataclass
class BatchMaker(Dataset[Batch]):
    """Makes any step's batch for one rank. Its state is what it was built with, so it can live in any process."""

    sources: Sources
    crops: CropConfig
    photometric: PhotometricConfig
    masks: MaskConfig
    grid: tuple[int, int]
    channels: int
    batch_size: int
    seed: int
    rank: int
    world: int
    position: dict[str, Any] = field(default_factory=dict)  # of streams, where the run began or went on
    progress: dict[int, dict[int, Progress]] = field(default_factory=dict)  # since, by consumer and part

    def __post_init__(self) -> None:
        self._reader: Reader | None = None

    def __getitem__(self, step: int) -> Batch:
        """The rank's contiguous share of the step's samples."""
        with _one_thread():
            return self._make(step)

    def _make(self, step: int) -> Batch:
        info, numbers = get_worker_info(), self._share(step)
        self.reader.announce(self._share(step + (info.num_workers if info else 1)))  # the next that this process makes
        start, share = numbers.start, len(numbers)
        crops, sizes = self.crops, (share, self.crops.local_count)
        batch = Batch(
            empty_crops(share, 2, crops.global_size, self.channels),
            empty_crops(*sizes, crops.local_size, self.channels),
            torch.empty(share, 2 + crops.local_count, NUM_PARAMETERS),
            torch.from_numpy(draw_masks(self.masks, self.grid, self.batch_size, self.seed, start, share)),
            torch.arange(start, start + share),
        )
        for row, number in enumerate(numbers):
            self._cut(batch, row, number)
            rng = generator(self.seed, Purpose.PHOTOMETRIC, number)
            batch.photometric[row] = torch.from_numpy(draw(self.photometric, rng, self.channels, crops.local_count))
        batch.shards_done += self.reader.take_done()
        if info is not None:
            # Here, where a lack of room is an error, and not in the thread that sends, where the batch would be lost.
            for tensor in (batch.photometric, batch.masks, batch.positions):
                tensor.share_memory_()
        return batch

    def _share(self, step: int) -> range:
        """The numbers of the rank's samples."""
        share = self.batch_size // self.world
        start = step * self.batch_size + self.rank * share
        return range(start, start + share)

    def _cut(self, batch: Batch, row: int, number: int) -> None:
        """Fills one row of crops, with another sample where the one whose turn it is cannot be used."""
        for attempt in range(MAX_ATTEMPTS):
            entry = self.reader.entry(number, attempt)
            try:
                picture = open_picture(entry.read(), self.channels)
                rng = generator(self.seed, Purpose.CROP, number)
                cut(self.crops, picture, rng, batch.global_crops[row], batch.local_crops[row])
                batch.keys.append(entry.where())
                return
            except BadImage as error:
                batch.bad.append(BadSample(error.reason, *entry.where()))
        raise TooManyBadSamples(f"{MAX_ATTEMPTS} samples in a row are unusable; the last: {batch.bad[-1]}")

    @property
    def reader(self) -> Reader:
        """Opened by the process that reads, for streams and file descriptors do not travel."""
        if self._reader is None:
            info = get_worker_info()
            worker, workers = (info.id, info.num_workers) if info else (0, 1)
            consumer, consumers = self.rank * workers + worker, self.world * workers
            progress = self.progress.get(consumer)
            self._reader = Reader(self.sources, self.seed, consumer, consumers, self.position, progress)
        return self._reader


@contextmanager
def _one_thread() -> Iterator[None]:
    """Crops are far too small to be shared out between threads, even in the main process, which has several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def empty_crops(images: int, crops: int, side: int, channels: int) -> torch.Tensor:
    """Uninitialised uint8 (images, crops, channels, side, side), a pixel's channels side by side in memory.

    In a worker directly in the memory shared with the main process, to save a copy.
    """
    shape = (images, crops, side, side, channels)
    tensor, size = torch.empty(0, dtype=torch.uint8), math.prod(shape)
    if size and get_worker_info() is not None:
        tensor.set_(torch.UntypedStorage._new_shared(size), 0, shape)  # type: ignore[call-overload]
    return tensor.resize_(shape).permute(0, 1, 4, 2, 3)


class BatchLoader:
    """Batches of one rank, step by step; counts the samples tried and the bad ones, by reason.

    Workers that die are started again at the step that was reached. What is stored goes on exactly; streams go on by
    whole shards, so that images of those that were being read are seen again.
    """

    def __init__(self, maker: BatchMaker, cfg: DataConfig, workers: int, steps: range) -> None:
        self.maker, self.cfg, self.workers, self.steps = maker, cfg, workers, steps
        self.tried = 0
        self.bad: Counter[str] = Counter()
        self._feed: Feed | None = None
        self._reached = steps.start
        self._trained: dict[int, dict[int, Progress]] = {}  # by consumer and part, as `position` last told
        self._later: list[tuple[int, list[ShardDone]]] = []  # what steps after that have finished

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Batch]:
        """Raises TooManyBadSamples; DataError when workers die repeatedly or are silent, or a stream gives nothing."""
        for batch in self._batches():
            self._judge(batch)
            yield batch

    def close(self) -> None:
        """Ends the workers."""
        if self._feed is not None:
            self._feed.close()
            self._feed = None

    def position(self, steps: int | None = None) -> dict[str, Any]:
        """How far this rank has read its streams when `steps` steps of the run are trained; for JSON.

        Batches are fetched ahead of the step that is trained, hence the number; None counts all that were handed out.
        It must not fall. `merge_positions` joins the ranks' for `build_loader`. Empty where nothing is streamed.
        """
        steps = self._reached if steps is None else steps
        _add(self._trained, [done for step, done in self._later if step < steps])
        self._later = [(step, done) for step, done in self._later if step >= steps]
        found = {}
        for part, deal in self._deals().items():
            start = self.maker.position.get(str(part)) if deal.done or deal.epoch else None
            readers = {consumer: parts[part] for consumer, parts in self._trained.items() if part in parts}
            found[str(part)] = rank_position(deal, start, readers)
        return found

    def _deals(self) -> dict[int, Deal]:
        consumers = self.maker.world * max(1, self.workers)
        return {
            number: deal_from(self.maker.position, number, len(part.urls), consumers)
            for number, part in enumerate(self.maker.sources.parts)
            if isinstance(part, Streamed)
        }

    def _batches(self) -> Iterator[Batch]:
        self._reached, restarts = self.steps.start, 0
        while self._reached < self.steps.stop:
            try:
                yield from self._until_death()
            except WorkerDied as error:
                reason, restarts = str(error), restarts + 1
                if restarts > MAX_RESTARTS:
                    raise DataError(
                        f"a data worker died again after {MAX_RESTARTS} new starts ({reason}), most often because the "
                        "machine or /dev/shm ran out of memory: lower data.workers or data.prefetch"
                    ) from None
                logger.warning(
                    f"careful: a data worker died ({reason}), most often for want of memory; the workers start again "
                    f"at step {self._reached + 1} ({restarts} of at most {MAX_RESTARTS} times)"
                )

    def _until_death(self) -> Iterator[Batch]:
        """Batches from the step that was reached on."""
        handed_out = copy.deepcopy(self._trained)
        _add(handed_out, [done for _, done in self._later])
        maker = replace(self.maker, progress=handed_out) if self.workers else self.maker
        steps = range(self._reached, self.steps.stop)
        self._feed = Feed(maker, steps, self.workers, self.cfg.prefetch, self.cfg.timeout)
        try:
            for _ in steps:
                batch = self._feed.next()
                self._later += [(self._reached, batch.shards_done)] if batch.shards_done else []
                self._reached += 1
                yield batch
        finally:
            self.close()

    def _judge(self, batch: Batch) -> None:
        """Stops the run when too many samples are bad."""
        self.tried += len(batch) + len(batch.bad)
        self.bad.update(sample.reason for sample in batch.bad)
        bad = self.bad.total()
        enough = min(LEAST_TRIED, self.maker.sources.num_samples or LEAST_TRIED)
        if batch.bad and self.tried >= enough and bad > self.cfg.max_bad_share * self.tried:
            reason = self.bad.most_common(1)[0][0]
            example = next((sample for sample in batch.bad if sample.reason == reason), batch.bad[0])
            raise TooManyBadSamples(
                f"{bad} of {self.tried} samples are unusable, more than data.max_bad_share={self.cfg.max_bad_share}; "
                f"the commonest reason is {reason!r}, for example {example.key} in {example.source}"
            )


def build_loader(
    sources: Sources,
    data: DataConfig,
    crops: CropConfig,
    photometric: PhotometricConfig,
    masks: MaskConfig,
    *,
    grid: tuple[int, int],
    channels: int,
    batch_size: int,
    seed: int,
    rank: int,
    world: int,
    start_step: int,
    steps: int,
    local_world: int = 1,
    stream_position: dict[str, Any] | None = None,
    agree: Callable[[int], int] | None = None,
) -> BatchLoader:
    """The loader of one rank for the steps start_step .. steps - 1 (`steps` is the length of the whole run).

    grid: patches (h, w) of a global crop; batch_size: source images a step over all ranks; local_world: ranks that
    share this machine's cores and shared memory; stream_position: what `merge_positions` gave when the checkpoint was
    written (streams go on by whole shards; all else follows from start_step); agree: gives all ranks the largest of
    their numbers, for streams are dealt out to equally many workers on every rank.

    Raises:
        ConfigError: the ranks cannot share the batch equally, or the workers asked for do not fit in shared memory.
    """
    if batch_size % world:
        raise ConfigError(f"{batch_size} images cannot be shared equally by {world} ranks", "train.batch_size")
    position = stream_position or {}
    maker = BatchMaker(sources, crops, photometric, masks, grid, channels, batch_size, seed, rank, world, position)
    workers = choose_workers(local_world) if data.workers < 0 else data.workers
    size = _batch_bytes(crops, batch_size // world, channels, grid)
    workers = fit_shared_memory(workers, data.workers >= 0, size, data.prefetch, local_world)
    if agree and data.workers < 0 and sources.num_samples is None:
        workers = -agree(-workers)
    if rank == 0:
        _tell(sources, position)
    return BatchLoader(maker, data, workers, range(start_step, steps))


def _batch_bytes(crops: CropConfig, images: int, channels: int, grid: tuple[int, int]) -> int:
    """Shared memory that a batch takes, each of its tensors in whole pages."""
    each = 2 * crops.global_size**2, crops.local_count * crops.local_size**2
    tensors = [channels * each[0], channels * each[1], 4 * NUM_PARAMETERS * (2 + crops.local_count)]
    tensors += [2 * grid[0] * grid[1], 8]
    return sum(-(-images * one // PAGE) * PAGE for one in tensors)


def _tell(sources: Sources, position: dict[str, Any]) -> None:
    """One line on how streams go on."""
    for part, one in position.items():
        here = sources.parts[int(part)] if int(part) < len(sources.parts) else None
        shards = len(here.urls) if isinstance(here, Streamed) else 0
        if shards != one["shards"]:
            logger.warning(
                f"careful: data.sources streams {shards} shards, before it were {one['shards']}: their pass begins anew"
            )
            return
    if position:
        logger.info(describe(position))


def _add(progress: dict[int, dict[int, Progress]], batches: Iterable[list[ShardDone]]) -> None:
    """Notes, by consumer and part, the shards that batches have finished."""
    for shard in (shard for batch in batches for shard in batch):
        way = progress.setdefault(shard.consumer, {}).setdefault(shard.part, Progress())
        way.add(shard.epoch, shard.turn)


def prefetch_to_device(batches: Iterable[Batch], device: torch.device | str) -> Iterator[Batch]:
    """The batches on `device`, each copied on a side stream while the step before it is computed."""
    device = torch.device(device)
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    side = torch.cuda.Stream(device)
    ready: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(side):
            copied = batch.to(device, non_blocking=True), side.record_event()
        if ready is not None:
            yield _hand_over(*ready)
        ready = copied
    if ready is not None:
        yield _hand_over(*ready)


def _hand_over(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """Makes the computing stream wait for this copy alone, and the allocator for the computing stream."""
    current = torch.cuda.current_stream(batch.global_crops.device)
    current.wait_event(copied)
    batch.record_stream(current)
    return batch
