"""Give work to Slurm, to this machine, or to a debugger: one run, or many things at once as an array."""

from __future__ import annotations

import io
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Literal

import submitit
from submitit.core.utils import FailedJobError

from dinoreg.config import ConfigError, to_yaml
from launch import local, slurm
from launch.checks import check_local, check_slurm
from launch.config import LaunchConfig
from launch.executors import slurm_executor
from launch.jobs import active_job
from launch.recipe import LaunchedRun
from launch.record import NAME, editing, locked, now
from launch.slurm import NoAnswer
from launch.snapshot import Snapshot, take_snapshot
from launch.task import LOGS, RECIPE, Task

Cluster = Literal["slurm", "local", "debug"]


def script(asked: LaunchConfig, folder: Path, count: int = 1, name: str = "") -> str:
    """The sbatch script that would be submitted for a run, or for an array of `count`. Nothing is written."""
    return slurm_executor(asked, folder, folder / "code" / "SNAPSHOT", name or folder.name).script(count)


def submit(config: LaunchedRun, cluster: Cluster, code: Snapshot | None = None) -> str:
    """Check, copy the program, and submit; the job's id. With `debug` this process becomes the run, and never returns.

    code: an earlier snapshot to run again. Raises ConfigError on anything that is not as it should be; nothing is in
    the queue then.
    """
    run_dir = Path(config.run_dir)
    _refuse_second(run_dir)
    check(config.launch, run_dir, cluster)
    with locked(run_dir / f"{NAME}.submitting"):
        _refuse_second(run_dir)  # of two commands at once, the one that came later
        code = code or take_snapshot(run_dir)
        return queue([training(config, cluster, code)], config.launch, run_dir, cluster, code)[0]


def _refuse_second(run_dir: Path) -> None:
    if (job := active_job(run_dir)) is not None:
        raise ConfigError(
            f"{run_dir} has job {job.id} already; see dinoreg-launch status {run_dir}, or dinoreg-launch cancel "
            f"{run_dir}",
            key="run_dir",
        )


def check(asked: LaunchConfig, folder: Path, cluster: Cluster) -> None:
    """Raises ConfigError on what cannot run there, or has no folder that can be written to."""
    if cluster == "slurm":
        check_slurm(asked, folder)
    else:
        check_local(asked, folder, debug=cluster == "debug")


def training(config: LaunchedRun, cluster: Cluster, code: Snapshot) -> Task:
    """The task of a run, whose recipe is written into its directory."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / RECIPE).write_text(to_yaml(config))
    patience = config.launch.max_requeues_without_progress
    return Task(str(run_dir), str(code.folder), str(Path.cwd()), cluster, patience)


def queue(
    tasks: Sequence[Task], asked: LaunchConfig, folder: Path, cluster: Cluster, code: Snapshot, name: str = ""
) -> list[str]:
    """Submit tasks, several as one array whose logs lie below `folder`; their ids. Raises ConfigError."""
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    if cluster == "debug":
        _note(tasks[0], str(os.getpid()), folder, code)
        submitit.DebugExecutor(folder / LOGS).submit(tasks[0]).results()
    if cluster == "slurm":
        ids = _to_slurm(tasks, slurm_executor(asked, folder, Path(tasks[0].code), name or folder.name))
    else:
        ids = local.start(tasks, asked, folder)
    try:
        for task, job_id in zip(tasks, ids, strict=True):
            _note(task, job_id, folder, code)
    except OSError as error:
        if cluster == "slurm":  # nobody would know of it
            slurm.cancel(ids[0].partition("_")[0])
        raise ConfigError(f"{folder} cannot be written to: {error.strerror}; its jobs are cancelled") from None
    return ids


def _to_slurm(tasks: Sequence[Task], executor: submitit.Executor) -> list[str]:
    said = io.StringIO()
    try:
        with _outside(), redirect_stderr(said), executor.batch():  # where submitit prints what sbatch says
            jobs = [executor.submit(task) for task in tasks]
    except FailedJobError:
        words = " ".join(said.getvalue().replace("sbatch: error: ", "").split())
        silent = re.search("contact slurm|timed out|Try again|temporarily", words, re.IGNORECASE)
        raise (NoAnswer if silent else ConfigError)(f"nothing is queued, for sbatch says: {words}") from None
    return [str(job.job_id) for job in jobs]


@contextmanager
def _outside() -> Iterator[None]:
    """Where one submits from a job, sbatch would hand that job's memory, CPUs and binding on to the new one's srun."""
    inside = "SLURM_JOB_ID" in os.environ
    own = {name: value for name, value in os.environ.items() if inside and name.startswith("SLURM_")}
    own.pop("SLURM_CONF", None)
    for name in own:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(own)


def _note(task: Task, job_id: str, folder: Path, code: Snapshot) -> None:
    run_dir = Path(task.run_dir)
    with editing(run_dir, job_id) as job:
        job.cluster, job.host, job.submitted = task.cluster, socket.gethostname(), now()
        job.commit, job.code = code.commit, os.path.relpath(code.folder, run_dir)
        job.logs = os.path.relpath(folder / LOGS, run_dir)
