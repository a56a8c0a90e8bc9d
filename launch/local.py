"""Jobs of this machine: a process in the background that starts tasks, one job after another or some at once.

It does what Slurm does with the jobs it is given: `python -m launch.local PLAN` is started by `start`, which returns.
"""

from __future__ import annotations

import os
import pickle
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TextIO
from uuid import uuid4

from dinoreg.train.stopping import EXIT_STOPPED, SIGNALS
from launch.config import LaunchConfig
from launch.executors import LEAVE, surroundings
from launch.record import editing, now, read_jobs
from launch.task import LOGS, Task, peers

PAUSE = 0.3  # seconds between two looks at the tasks and at the records
LOST = 76  # how a process leaves when another one is gone


@dataclass(frozen=True)
class Plan:
    """What the process in the background is told."""

    tasks: list[Task]
    asked: LaunchConfig
    folder: str


def start(tasks: Sequence[Task], asked: LaunchConfig, folder: Path) -> list[str]:
    """Begin in the background, to stay when the terminal is closed; the ids of the jobs."""
    path = folder / LOGS / f"local-{uuid4().hex[:8]}.pkl"
    path.write_bytes(pickle.dumps(Plan(list(tasks), asked, str(folder))))
    with (folder / LOGS / "local.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.local", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=Path(__file__).parents[1],
            start_new_session=True,
        )
    return job_ids(process.pid, len(tasks))


def job_ids(pid: int, count: int) -> list[str]:
    """As Slurm has them: the elements of an array are numbered."""
    return [str(pid)] if count == 1 else [f"{pid}_{element}" for element in range(count)]


def gpus_of(slot: int, count: int, visible: str | None) -> str:
    """CUDA_VISIBLE_DEVICES of the job in a place: its own, of those that whoever submitted it may use."""
    places = range(slot * count, (slot + 1) * count)
    known = visible.split(",") if visible else [str(place) for place in range(places.stop)]
    return ",".join(known[places.start : places.stop])


@dataclass
class Element:
    """One job: its tasks, which are started again as long as that helps."""

    job: str
    task: Task
    starts: int = 0
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    first_end: float | None = None
    told: bool = False  # to stop

    @property
    def cancelled(self) -> bool:
        """By `dinoreg-launch cancel`, which writes it into the record."""
        return any(job.id == self.job and job.cancelled for job in read_jobs(Path(self.task.run_dir)))

    def begin(self, plan: Plan, slot: int) -> bool:
        """Start all tasks; False where that was in vain too often."""
        folder, asked, world = Path(plan.folder), plan.asked, plan.asked.tasks_a_node
        gpus = gpus_of(slot, asked.gpus_a_node, os.environ.get("CUDA_VISIBLE_DEVICES"))
        python = [asked.python or sys.executable, *self.task.words()]
        lines = [*surroundings(asked), f"cd {shlex.quote(self.task.working_folder())}", 'exec "$0" "$@"']
        self.first_end = None
        for rank in range(world):
            with (folder / LOGS / f"{self.job}_{rank}_log.out").open("ab") as log:
                if rank == 0 and (end := self._note(log.fileno())):
                    os.write(log.fileno(), f"{end}\n".encode())
                    return False
                env = os.environ | peers(self.job, rank, world) | {"CUDA_VISIBLE_DEVICES": gpus}
                command = ["sh", "-c", "\n".join(lines), *python]
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
                self.processes.append(process)
        self.starts += 1
        return True

    def _note(self, log: int) -> str | None:
        with open(log, "a", closefd=False) as text:
            return self.task.begin(self.job, self.starts, socket.gethostname(), True, text)

    def look(self) -> int | None:
        """The exit code as srun would give it, the highest of all, when every task has ended."""
        codes = [process.poll() for process in self.processes]
        if any(code is not None for code in codes):
            self.first_end = self.first_end or time.monotonic()
        if None not in codes:
            self.processes = []
            return max(code if code >= 0 else 128 - code for code in codes if code is not None)
        if self.first_end is not None and time.monotonic() > self.first_end + LEAVE:
            self.send(signal.SIGKILL)  # it waits for a peer that never came
        return None

    def send(self, number: int) -> None:
        """To all tasks that still run."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)


class Queue:
    """Runs the jobs of a plan, as many at once as `launch.array` says."""

    def __init__(self, plan: Plan, jobs: Sequence[str]) -> None:
        self.plan = plan
        self.waiting = [Element(job, task) for job, task in zip(jobs, plan.tasks, strict=True)]
        self.running: dict[int, Element] = {}  # by their place: the GPUs of that number are theirs
        self.stopping = False

    def run(self) -> None:
        """Until every job has ended."""
        signal.signal(signal.SIGTERM, self._stop)
        while self.waiting or self.running:
            for slot in range(self.plan.asked.array or 1):
                if slot not in self.running and self.waiting:
                    self._begin(slot, self.waiting.pop(0))
            for slot, element in list(self.running.items()):
                self._look(slot, element)
            time.sleep(PAUSE)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True

    def _begin(self, slot: int, element: Element) -> None:
        # As in launch/task.py: a signal that comes before Python heeds it waits for it.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            if self.stopping or element.cancelled or not element.begin(self.plan, slot):
                _note_end(element)
            else:
                self.running[slot] = element
        except OSError as error:  # somebody removed its directory, say: that is no reason to end the others
            print(f"job {element.job}: {error}", flush=True)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _look(self, slot: int, element: Element) -> None:
        code = element.look()
        wanted = not self.stopping and not element.cancelled
        if code is None:
            if not wanted and not element.told:
                element.send(signal.SIGTERM)
                element.told = True
            return
        del self.running[slot]
        if wanted and (code in (EXIT_STOPPED, LOST) or code > 128):
            with _log(self.plan, element) as log:
                log.write(f"dinoreg-launch: ended with {code}; again, to go on from the last checkpoint\n")
            self._begin(slot, element)
        else:
            _note_end(element)


def _log(plan: Plan, element: Element) -> TextIO:
    return (Path(plan.folder) / LOGS / f"{element.job}_0_log.out").open("a")


def _note_end(element: Element) -> None:
    with suppress(FileNotFoundError), editing(Path(element.task.run_dir), element.job) as job:
        job.ended = now()


def main() -> None:
    """What `start` starts."""
    plan: Plan = pickle.loads(Path(sys.argv[1]).read_bytes())
    Queue(plan, job_ids(os.getpid(), len(plan.tasks))).run()


if __name__ == "__main__":
    main()
