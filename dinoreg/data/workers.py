"""The processes that load data: how many, started how, and who may end them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from dinoreg.allocator import keep_freed_memory
from dinoreg.config import ConfigError

logger = logging.getLogger("dinoreg")

MAX_WORKERS = 16  # a rank, when chosen here
SHARED_MEMORY = Path("/dev/shm")  # where batches lie between a worker and the main process
BATCHES_HELD = 3  # by the main process: trained on, being copied to the device, just received
SIGNALS = frozenset((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2))
MEMORY_KEPT = 128 * 2**20  # bytes of freed memory in a worker; an image larger than most shall not stay in all of them
GRACE = 2.0  # seconds for a worker to end by itself when it is told to
LOOK_EVERY = 1.0  # seconds between a worker's looks at whether the main process lives


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes started meanwhile inherit the blocked signals; those of this thread arrive afterwards.

    Slurm and Ctrl-C signal every process of a job, and the main process needs all the others to finish its step.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def worker_context() -> Any:
    """Workers from a server process that has imported the loader once, so that each starts in a moment.

    They are born with SIGNALS blocked: give `start_worker` to the DataLoader, or it cannot end them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dinoreg.data.loader"])
    # Apart, because Python 3.11 unblocks signals when it has started the tracker.
    with signals_blocked():
        resource_tracker.ensure_running()
    with signals_blocked():
        forkserver.ensure_running()
    return context


def start_worker(_: int = 0) -> None:
    """Makes this process one that only the main process can end, and that ends when the main process is gone."""
    keep_freed_memory(MEMORY_KEPT)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_obey, daemon=True).start()


def _obey() -> None:
    # The parent by the system's account is the server of workers, which lives as long as they do.
    main = multiprocessing.parent_process()
    assert main is not None
    deadline: float | None = None
    while main.is_alive() and (deadline is None or time.monotonic() < deadline):
        told = signal.sigtimedwait(SIGNALS, LOOK_EVERY)
        if told is not None and told.si_signo == signal.SIGTERM and told.si_pid == main.pid and deadline is None:
            deadline = time.monotonic() + GRACE
    _end_commands()
    os._exit(1)  # whatever the worker is stuck in


def _end_commands() -> None:
    """Ends what reads a stream for this worker: a command that waits for a network would wait on."""
    for file in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            for command in map(int, file.read_text().split()):
                os.killpg(command, signal.SIGKILL)  # each leads a group


def end_workers(workers: Iterable[BaseProcess]) -> None:
    """Ends processes within GRACE and a little, stuck ones too. They end more softly where their queues are closed."""
    living = [worker for worker in workers if worker.is_alive()]
    for worker in living:
        worker.terminate()
    deadline = time.monotonic() + GRACE + 2 * LOOK_EVERY
    for worker in living:
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.is_alive():
            worker.kill()


def choose_workers(local_world: int) -> int:
    """Workers for a rank: its share of the cores that this process may use, less one for the training loop."""
    return max(0, min(MAX_WORKERS, len(os.sched_getaffinity(0)) // local_world - 1))


def fit_shared_memory(workers: int, asked: bool, batch_bytes: int, prefetch: int, local_world: int) -> int:
    """The number of workers whose batches have room in shared memory; 0 means to load in the main process.

    batch_bytes: one rank's batch; local_world: ranks that share the memory. A full /dev/shm kills workers by SIGBUS.

    Raises:
        ConfigError: the number was asked for, and is too large.
    """
    free = _free_bytes(SHARED_MEMORY)
    fitting = workers
    while fitting and _needed(fitting, batch_bytes, prefetch) * local_world > free:
        fitting -= 1
    if fitting == workers:
        return workers
    need = _needed(workers, batch_bytes, prefetch) * local_world
    said = (
        f"{workers} data worker(s) a rank need {need / 2**20:.1f} MiB of {SHARED_MEMORY}, {free / 2**20:.1f} are free"
    )
    remedy = "give it more (docker run --shm-size, or --ipc=host)"
    if asked:
        raise ConfigError(f"{said}: {remedy}, or set data.workers={fitting}", "data.workers")
    logger.warning(f"careful: {said}: loading with {fitting}, which is slower; {remedy}")
    return fitting


def _needed(workers: int, batch_bytes: int, prefetch: int) -> int:
    return (workers * prefetch + BATCHES_HELD) * batch_bytes


def _free_bytes(folder: Path) -> int:
    try:
        found = os.statvfs(folder)
    except OSError:
        return 2**63  # a system that keeps shared memory elsewhere
    return found.f_bavail * found.f_frsize
