"""Jobs in parallel processes, under a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from dinoreg.data.images import DataError

PATIENCE = 3.0  # seconds of work without a progress bar
REFRESH = 0.2  # seconds between its pictures, at least

Job = TypeVar("Job")
Result = TypeVar("Result")
Work = Callable[[Job], Iterator[Result | int]]  # yields how much was done since the last time, and last the result


def run_jobs(
    work: Work[Job, Result], jobs: Sequence[Job], *, total: int, workers: int, title: str, quiet: bool = False
) -> list[Result]:
    """The results of all jobs, in their order. workers: -1 for every core; 0 or 1 works in this process.

    Raises what a job raises; DataError when a process dies.
    """
    if workers < 0:
        workers = len(os.sched_getaffinity(0))
    events = _in_processes(work, jobs, workers) if min(workers, len(jobs)) > 1 else _here(work, jobs)
    results: dict[int, Result] = {}
    with _progress(quiet) as progress:
        task = progress.add_task(title, total=total)
        for number, event in events:
            if isinstance(event, Exception):
                raise event
            if isinstance(event, int):
                progress.advance(task, event)
            else:
                results[number] = event
    return [results[number] for number in range(len(jobs))]


def watch(items: Iterable[Result], total: int, title: str) -> Iterator[Result]:
    """The items, under a progress bar if they take longer than people wait without one."""
    progress, due = _progress(quiet=False), time.monotonic() + PATIENCE
    task = progress.add_task(title, total=total)
    try:
        for done, item in enumerate(items, 1):
            yield item
            if time.monotonic() >= due:
                progress.start()
                progress.update(task, completed=done)
                due = time.monotonic() + REFRESH
    finally:
        if progress.live.is_started:
            progress.stop()


def _progress(quiet: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=quiet)


def _here(work: Work[Job, Result], jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
    for number, job in enumerate(jobs):
        for event in work(job):
            yield number, event


def _in_processes(work: Work[Job, Result], jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, Any]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([type(work).__module__])  # so that a worker starts in a moment
    tasks, events = context.Queue(), context.Queue()
    count = min(workers, len(jobs))
    for item in [*enumerate(jobs), *[None] * count]:
        tasks.put(item)
    processes = [context.Process(target=_serve, args=(work, tasks, events), daemon=True) for _ in range(count)]
    try:
        for process in processes:
            process.start()
        finished = 0
        while finished < len(jobs):
            try:
                number, event = events.get(timeout=1.0)
            except queue.Empty:
                _expect_alive(processes)
                continue
            finished += not isinstance(event, int)
            yield number, event
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        tasks.cancel_join_thread()


def _expect_alive(processes: Sequence[Any]) -> None:
    dead = [process.exitcode for process in processes if process.exitcode not in (None, 0)]
    if dead:
        raise DataError(
            f"a worker process died (exit code {dead[0]}), most often for want of memory: use fewer workers"
        )


def _serve(work: Work[Any, Any], tasks: Any, events: Any) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a traceback of its own
    for number, job in iter(tasks.get, None):
        try:
            for event in work(job):
                events.put((number, event))
        except Exception as error:
            events.put((number, error))
