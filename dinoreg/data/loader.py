"""From sources to batches: workers, collation, device prefetch."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dinoreg.config import ConfigError
from dinoreg.data.batch import BadSample, Batch
from dinoreg.data.counter import Purpose, generator
from dinoreg.data.crops import CropConfig, cut
from dinoreg.data.images import BadImage, DataError, open_picture
from dinoreg.data.masks import MaskConfig, draw_masks
from dinoreg.data.photometric import NUM_PARAMETERS, PhotometricConfig, draw
from dinoreg.data.sources import DataConfig, Reader, Sources

MAX_WORKERS = 16  # a rank, when chosen here
MAX_ATTEMPTS = 100  # samples tried for one place in a batch
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
    start_step: int

    def __post_init__(self) -> None:
        self._reader: Reader | None = None

    def __getitem__(self, step: int) -> Batch:
        """The rank's contiguous share of the step's samples."""
        with _one_thread():
            return self._make(step)

    def _make(self, step: int) -> Batch:
        share = self.batch_size // self.world
        start = step * self.batch_size + self.rank * share
        crops, sizes = self.crops, (share, self.crops.local_count)
        batch = Batch(
            _empty(share, 2, self.channels, crops.global_size, crops.global_size),
            _empty(*sizes, self.channels, crops.local_size, crops.local_size),
            torch.empty(share, 2 + crops.local_count, NUM_PARAMETERS),
            torch.from_numpy(draw_masks(self.masks, self.grid, self.batch_size, self.seed, start, share)),
            torch.arange(start, start + share),
        )
        for row, number in enumerate(range(start, start + share)):
            self._cut(batch, row, number)
            rng = generator(self.seed, Purpose.PHOTOMETRIC, number)
            batch.photometric[row] = torch.from_numpy(draw(self.photometric, rng, self.channels, crops.local_count))
        return batch

    def _cut(self, batch: Batch, row: int, number: int) -> None:
        """Fills one row of crops, with another sample where the one whose turn it is cannot be used."""
        for attempt in range(MAX_ATTEMPTS):
            entry = self.reader.entry(number, attempt)
            try:
                picture = open_picture(entry.read(), self.channels)
                rng = generator(self.seed, Purpose.CROP, number)
                return cut(self.crops, picture, rng, batch.global_crops[row], batch.local_crops[row])
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
            self._reader = Reader(self.sources, self.seed, self.start_step, consumer, consumers)
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


def _empty(*shape: int) -> torch.Tensor:
    """Uninitialised uint8; in a worker directly in the memory shared with the main process, to save a copy."""
    tensor = torch.empty(0, dtype=torch.uint8)
    if get_worker_info() is None:
        return tensor.new_empty(shape)
    size = torch.Size(shape).numel()
    return tensor.set_(torch.UntypedStorage._new_shared(size), 0, shape) if size else tensor.new_empty(shape)  # type: ignore[call-overload]


def _qualified(error: Exception) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}: "


class BatchLoader:
    """Batches of one rank, step by step; counts the samples tried and the bad ones, by reason."""

    def __init__(self, maker: BatchMaker, cfg: DataConfig, workers: int, steps: int) -> None:
        self.maker, self.cfg, self.workers = maker, cfg, workers
        self.steps = range(maker.start_step, steps)
        self.tried = 0
        self.bad: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Batch]:
        """Raises TooManyBadSamples; DataError when a worker dies or a stream gives nothing."""
        for batch in self._batches():
            self._judge(batch)
            yield batch

    def _batches(self) -> Iterator[Batch]:
        try:
            yield from DataLoader(
                self.maker,
                batch_size=None,
                sampler=self.steps,
                num_workers=self.workers,
                prefetch_factor=self.cfg.prefetch if self.workers else None,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=_start_worker,
                # Not fork: the main process holds threads and a CUDA context, which do not survive it.
                multiprocessing_context=worker_context() if self.workers else None,
            )
        except DataError as error:
            # A worker's exception arrives with its traceback; the last line is what people need.
            raise type(error)(str(error).strip().splitlines()[-1].removeprefix(_qualified(error))) from None
        except RuntimeError as error:
            if not re.match(r"DataLoader worker \(pid.*(exited|killed)", str(error)):
                raise
            raise DataError(
                f"a data worker died, most often because the machine or /dev/shm ran out of memory: "
                f"lower data.workers or data.prefetch ({str(error).splitlines()[0]})"
            ) from error

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
) -> BatchLoader:
    """The loader of one rank for the steps start_step .. steps - 1 (`steps` is the length of the whole run).

    grid: patches (h, w) of a global crop; batch_size: source images a step over all ranks; local_world: ranks that
    share this machine's cores. Raises ConfigError when the ranks cannot share the batch equally.
    """
    if batch_size % world:
        raise ConfigError(f"{batch_size} images cannot be shared equally by {world} ranks", "train.batch_size")
    maker = BatchMaker(sources, crops, photometric, masks, grid, channels, batch_size, seed, rank, world, start_step)
    workers = choose_workers(local_world) if data.workers < 0 else data.workers
    return BatchLoader(maker, data, workers, steps)


def choose_workers(local_world: int) -> int:
    """Workers for a rank: its share of the cores that this process may use, less one for the training loop."""
    return max(0, min(MAX_WORKERS, len(os.sched_getaffinity(0)) // local_world - 1))


def worker_context() -> Any:
    """Workers from a server process that has imported this module once, so that each starts in a moment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _start_worker(_: int) -> None:
    # Ctrl-C is the main process's to handle; a worker ends with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
