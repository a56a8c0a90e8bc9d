"""What a job does on each of its tasks: say that it starts, and become `dinoreg train`."""

from __future__ import annotations

import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import submitit

from dinoreg.train.stopping import SIGNALS
from launch.glance import newest_checkpoint
from launch.record import Job, Start, editing, now, read_jobs

RECIPE = "launch.yaml"  # in the run directory: the run as it was submitted
LOGS = "jobs"  # in the run directory: what submitit writes, and a log for each task


@dataclass(frozen=True)
class Task:
    """Called by submitit in every task of a job.

    The process becomes `dinoreg train`: nothing of submitit is left that could take a signal or change an exit code.
    """

    run_dir: str
    code: str  # the snapshot to run
    folder: str  # that the job was submitted from, which relative paths are meant from
    cluster: str
    patience: int  # requeues in a row without a newer checkpoint

    def __call__(self) -> NoReturn:
        # Kept over exec, until dinoreg knows what to do with them. One that came before would end one task of many.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        task = submitit.JobEnvironment()
        job = str(os.getpid()) if self.cluster == "debug" else task.job_id
        self._begin(job, speaks=task.global_rank == 0)
        if self.cluster == "local":
            os.environ |= peers(job, task.global_rank, task.num_tasks)
        if Path(self.folder).is_dir():  # a container may lack it
            os.chdir(self.folder)
        sys.stdout.flush()
        # Unbuffered, so that `dinoreg-launch logs -f` shows a line when it is written.
        arguments = [sys.executable, "-u", self.code, "train", str(Path(self.run_dir) / RECIPE)]
        os.execv(sys.executable, arguments)

    def _begin(self, job: str, speaks: bool) -> None:
        """Note the start, or exit with 2 when there is no end to starting: all tasks see the same, and do the same."""
        run_dir, restart = Path(self.run_dir), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        nodes = os.environ.get("SLURM_JOB_NODELIST", socket.gethostname())
        start = Start(restart, now(), newest_checkpoint(run_dir), nodes)
        entry = next((each for each in read_jobs(run_dir) if each.id == job), Job(job))
        vain = entry.vain_starts(start)
        if speaks:
            with editing(run_dir, job) as entry:
                entry.starts.append(start)
            print(f"job {job}, start {restart + 1}, on {nodes}: from step {start.step}", flush=True)
        if vain > self.patience:
            if speaks:
                print(
                    f"dinoreg-launch: {vain} requeues brought nothing new: still at step {start.step}. Find out why, "
                    f"and go on with: dinoreg-launch resume {self.run_dir}",
                    file=sys.stderr,
                )
            sys.exit(2)


def peers(job: str, rank: int, world: int) -> dict[str, str]:
    """What `dinoreg` needs to find the other tasks of this machine; Slurm's it finds by itself."""
    port = 20000 + int(job) % 10000  # below what the system hands out; another for another job
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}
