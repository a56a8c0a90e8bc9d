"""How the jobs of runs are: Slurm's by asking Slurm, local ones by looking for their process."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from collections.abc import Iterable
from pathlib import Path

from dinoreg.config import ConfigError
from launch import slurm
from launch.record import NAME, Job, editing, now, read_jobs
from launch.slurm import UNKNOWN, JobState

HERE = ("local", "debug")


def active_job(run_dir: Path) -> Job | None:
    """The run's job, if it waits or runs."""
    return active_jobs([run_dir]).get(run_dir)


def active_jobs(run_dirs: Iterable[Path]) -> dict[Path, Job]:
    """The latest jobs that wait or run, by run."""
    jobs = latest(run_dirs)
    told = states(jobs)
    return {run: job for run, job in jobs.items() if (state := told[run]) is not None and state.active}


def in_use(run_dirs: Iterable[Path]) -> bool:
    """Whether any of the runs goes on: its job waits or runs, or somebody else trains in its directory."""
    run_dirs = list(run_dirs)
    return bool(active_jobs(run_dirs)) or any(map(_held, run_dirs))


def _held(run_dir: Path) -> bool:
    """By the lock of dinoreg/train/rundir.py."""
    try:
        with (run_dir / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # nothing has trained there, or nobody can know
    return False


def states(jobs: dict[Path, Job]) -> dict[Path, JobState | None]:
    """How the job of each run is; None where nobody remembers. All of Slurm's are asked for at once.

    Raises NoAnswer where Slurm does not answer.
    """
    given = {run: job.id for run, job in jobs.items() if job.cluster not in HERE}
    told = slurm.job_states(given.values(), {(run / NAME).stat().st_uid for run in given})  # a colleague's run, maybe
    return {run: _local(run, job) if job.cluster in HERE else told.get(job.id) for run, job in jobs.items()}


def _local(run_dir: Path, job: Job) -> JobState | None:
    if job.host != socket.gethostname():
        return JobState(UNKNOWN, f"on {job.host}")
    if job.ended or not _is_alive(run_dir, job):
        return None
    return JobState("RUNNING") if job.starts else JobState("PENDING", "waits for the others")


def _is_alive(run_dir: Path, job: Job) -> bool:
    """By its command line too: another process may have the number by now."""
    try:
        words = Path(f"/proc/{job.id.partition('_')[0]}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    own = (str(run_dir).encode(), os.path.normpath(run_dir / job.logs).encode())
    return any(folder in word for word in words for folder in own)


def cancel(run_dir: Path) -> Job:
    """End the job of a run, which saves what it has done if it is given the time. Raises ConfigError."""
    job = active_job(run_dir)
    if job is None:
        raise ConfigError(f"{run_dir} has no job that waits or runs")
    with editing(run_dir, job.id) as entry:
        entry.cancelled = now()
    if job.cluster == "debug":
        os.kill(int(job.id), signal.SIGTERM)
    elif job.cluster != "local":  # whose process looks into the record
        slurm.cancel(job.id)
    return job


def latest(run_dirs: Iterable[Path]) -> dict[Path, Job]:
    """The latest job of each run that has one."""
    return {run: jobs[-1] for run in run_dirs if (jobs := read_jobs(run))}
