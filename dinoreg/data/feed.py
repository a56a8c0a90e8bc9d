"""Batches from one set of worker processes, and what is said when these die or are silent."""

from __future__ import annotations

import errno
import multiprocessing
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize

import torch
from torch.utils.data import DataLoader, Dataset

from dinoreg.data.batch import Batch
from dinoreg.data.images import DataError
from dinoreg.data.workers import end_workers, start_worker, worker_context

POLL = 1.0  # seconds between looks at whether the workers live
SETTLE = 5.0  # seconds in which a worker that broke a connection is seen to be dead


class WorkerDied(Exception):
    """A data worker is gone, or had no shared memory left: others may do better. The message is one line."""


class Feed:
    """Batches of successive steps, made by `workers` processes, or by this one where there are none.

    Construction raises WorkerDied, as `next` does.
    """

    def __init__(self, maker: Dataset[Batch], steps: range, workers: int, prefetch: int, timeout: float) -> None:
        self.step, self.timeout = steps.start, timeout
        others = set(multiprocessing.active_children())
        loader = DataLoader(
            maker,
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=start_worker,
            timeout=POLL if workers else 0,
            # Not fork: the main process holds threads and a CUDA context, which do not survive it.
            multiprocessing_context=worker_context() if workers else None,
            # Or it would take a number from the generator of the training run whenever workers are started.
            generator=torch.Generator(),
        )
        self._batches = _started(loader, others)
        self.workers: list[BaseProcess] = [p for p in multiprocessing.active_children() if p not in others]
        self.workers.sort(key=lambda worker: worker.pid or 0)
        # Before the interpreter waits for its children, among which one may be stuck.
        Finalize(self, end_workers, args=(self.workers,), exitpriority=10)

    def next(self) -> Batch:
        """The next step's batch. Raises StopIteration at the end, WorkerDied, and DataError in one line."""
        began = time.monotonic()
        while True:
            found = self._try()
            if isinstance(found, WorkerDied):
                raise found
            if found is not None:
                self.step += 1
                return found
            if self.timeout and time.monotonic() - began > self.timeout:
                raise self._silence()

    def _try(self) -> Batch | WorkerDied | None:
        """A batch, or why there will be none, or None where it is not ready.

        Told and not raised: an exception would hold the frames, these the queues, and the workers would not end.
        """
        try:
            return next(self._batches)
        except DataError as error:
            # A worker's exception arrives with its traceback; the last line is what people need.
            raise type(error)(_last_line(error)) from None
        except (RuntimeError, OSError, EOFError) as error:
            waiting = str(error).startswith("DataLoader timed out")
            death = self._death(str(error), 0.0 if waiting else SETTLE)
            if death is None and not waiting:
                raise
            return death

    def close(self) -> None:
        """Ends the workers, stuck ones too, within seconds."""
        for worker in self.workers:
            if worker.is_alive():
                worker.terminate()
        del self._batches
        end_workers(self.workers)

    def _death(self, error: str, patience: float) -> WorkerDied | None:
        """What explains the error, if a worker's end does."""
        if not self.workers:
            return None
        if "shared memory" in error and "No space left" in error:
            return WorkerDied("/dev/shm is full")
        wait([worker.sentinel for worker in self.workers], timeout=patience)
        dead = [worker for worker in self.workers if not worker.is_alive()]
        return WorkerDied(f"process {dead[0].pid} {_how(dead[0].exitcode)}") if dead else None

    def _silence(self) -> DataError:
        pids = ", ".join(str(worker.pid) for worker in self.workers)
        return DataError(
            f"the batch of step {self.step + 1} did not come from the data workers (processes {pids}) within "
            f"data.timeout={self.timeout:g} seconds: a disk, a server or a command of data.sources does not answer"
        )


def _started(loader: DataLoader[Batch], others: set[BaseProcess]) -> Iterator[Batch]:
    """Raises WorkerDied where there is no room even for the semaphores of its queues, which are files in /dev/shm."""
    try:
        return iter(loader)
    except OSError as error:
        end_workers(set(multiprocessing.active_children()) - others)
        if error.errno != errno.ENOSPC:
            raise
        raise WorkerDied("/dev/shm is full") from None


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _last_line(error: Exception) -> str:
    name = f"{type(error).__module__}.{type(error).__qualname__}: "
    return str(error).strip().splitlines()[-1].removeprefix(name)
