"""What a job does on each of its tasks: say that it starts, and become `dinoreg train`."""

from __future__ import annotations

import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TextIO

import submitit

from dinoreg.train.stopping import SIGNALS
from launch.glance import newest_checkpoint
from launch.logs import IN_VAIN
from launch.record import Job, Start, editing, now, read_jobs

RECIPE = "launch.yaml"  # in the run directory: the run as it was submitted
LOGS = "jobs"  # in the run directory, or the sweep's: what submitit writes, and a log for each task


@dataclass(frozen=True)
class Task:
    """A run, or another thing that a job does. Called by submitit in every task of a job.

    The process becomes `dinoreg train`: nothing of submitit is left that could take a signal or change an exit code.
    """

    run_dir: str  # where its record lies
    code: str  # the snapshot to run
    folder: str  # that the job was submitted from, which relative paths are meant from
    cluster: str
    patience: int  # requeues in a row without a newer checkpoint

    def __call__(self) -> NoReturn:
        # Kept over exec, until dinoreg knows what to do with them. One that came before would end one task of many.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        task = submitit.JobEnvironment()
        job = str(os.getpid()) if self.cluster == "debug" else task.job_id
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        nodes = os.environ.get("SLURM_JOB_NODELIST", socket.gethostname())
        if end := self.begin(job, restart, nodes, task.global_rank == 0, sys.stdout):
            print(end, file=sys.stderr)
            sys.exit(2)
        os.chdir(self.working_folder())
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *self.words()])

    def words(self) -> list[str]:
        """What Python is started with. Unbuffered, so that `dinoreg-launch logs -f` shows a line when it is written."""
        return ["-u", self.code, "train", str(Path(self.run_dir) / RECIPE)]

    def working_folder(self) -> str:
        """In which Python is started."""
        return self.folder if Path(self.folder).is_dir() else "."  # a container may lack it

    def doing(self, start: Start) -> str:
        """In the line that says a start."""
        return f"from step {start.step}"

    def advice(self) -> str:
        """What to do when it ended without having come to its end."""
        return f"go on with: dinoreg-launch resume {self.run_dir}"

    def begin(self, job: str, restart: int, nodes: str, speaks: bool, log: TextIO) -> str | None:
        """Note the start; or why there must be none, when starting has no end: all tasks see the same."""
        run_dir = Path(self.run_dir)
        start = Start(restart, now(), newest_checkpoint(run_dir), nodes)
        entry = next((each for each in read_jobs(run_dir) if each.id == job), Job(job))
        vain = entry.vain_starts(start)
        if speaks:
            with editing(run_dir, job) as entry:
                entry.starts.append(start)
            print(f"job {job}, start {restart + 1}, on {nodes}: {self.doing(start)}", file=log, flush=True)
        if vain <= self.patience:
            return None
        return f"dinoreg-launch: {vain} {IN_VAIN}: still at step {start.step}. Find out why, and {self.advice()}"


def peers(job: str, rank: int, world: int) -> dict[str, str]:
    """What `dinoreg` needs to find the other tasks of this machine; Slurm's it finds by itself."""
    number, _, element = job.partition("_")  # of an array
    port = (
        20000 + (int(number) + 101 * int(element or 0)) % 10000
    )  # below what the system hands out; another for another job
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}
