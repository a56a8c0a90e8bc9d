"""Give a run to Slurm, to this machine, or to a debugger."""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Literal

import submitit
from submitit.core.utils import FailedJobError

from dinoreg.config import ConfigError, to_yaml
from launch.checks import check_local, check_slurm
from launch.executors import local_executor, slurm_executor
from launch.jobs import active_job
from launch.recipe import LaunchedRun
from launch.record import editing, now
from launch.snapshot import Snapshot, take_snapshot
from launch.task import LOGS, RECIPE, Task

Cluster = Literal["slurm", "local", "debug"]


def script(config: LaunchedRun) -> str:
    """The sbatch script that would be submitted. Nothing is written."""
    return slurm_executor(config, Path(config.run_dir) / "code" / "SNAPSHOT").script()


def submit(config: LaunchedRun, cluster: Cluster, code: Snapshot | None = None) -> str:
    """Check, copy the program, and submit; the job's id. With `debug` this process becomes the run, and never returns.

    code: an earlier snapshot to run again. Raises ConfigError on anything that is not as it should be; nothing is in
    the queue then.
    """
    run_dir = Path(config.run_dir)
    if (job := active_job(run_dir)) is not None:
        raise ConfigError(
            f"{run_dir} has job {job.id} already; see dinoreg-launch status {run_dir}, or dinoreg-launch cancel "
            f"{run_dir}",
            key="run_dir",
        )
    if cluster == "slurm":
        check_slurm(config)
    else:
        check_local(config, debug=cluster == "debug")
    code = code or take_snapshot(run_dir)
    (run_dir / LOGS).mkdir(exist_ok=True)
    (run_dir / RECIPE).write_text(to_yaml(config))
    patience = config.launch.max_requeues_without_progress
    task = Task(str(run_dir), str(code.folder), str(Path.cwd()), cluster, patience)
    if cluster == "debug":
        _note(run_dir, str(os.getpid()), cluster, code)
        submitit.DebugExecutor(run_dir / LOGS).submit(task).results()
    job_id = _to_slurm(config, task) if cluster == "slurm" else _to_this_machine(config, task)
    _note(run_dir, job_id, cluster, code)
    return job_id


def _to_slurm(config: LaunchedRun, task: Task) -> str:
    said = io.StringIO()
    try:
        with redirect_stderr(said):  # where submitit prints what sbatch says
            return str(slurm_executor(config, Path(task.code)).submit(task).job_id)
    except FailedJobError:
        words = " ".join(said.getvalue().replace("sbatch: error: ", "").split())
        raise ConfigError(f"nothing is queued, for sbatch says: {words}") from None


def _to_this_machine(config: LaunchedRun, task: Task) -> str:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the run stays when the terminal is closed
    with _output_to(Path(config.run_dir) / LOGS / "local.log"):
        return str(local_executor(config, Path(task.code)).submit(task).job_id)


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Processes that are started in here hold no pipe or terminal of ours."""
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("ab") as log:
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            yield
        finally:
            for number, copy in enumerate(kept, 1):
                os.dup2(copy, number)
                os.close(copy)


def _note(run_dir: Path, job_id: str, cluster: Cluster, code: Snapshot) -> None:
    with editing(run_dir, job_id) as job:
        job.cluster, job.host, job.submitted = cluster, socket.gethostname(), now()
        job.commit, job.code = code.commit, str(code.folder.relative_to(run_dir))
