"""Submit a run again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dinoreg.config import ConfigError
from launch.recipe import load_launched
from launch.record import read_jobs
from launch.snapshot import Snapshot
from launch.submit import Cluster, submit
from launch.task import RECIPE


def resume(run_dir: Path, overrides: Sequence[str], cluster: Cluster, new_code: bool) -> str:
    """The id of a new job for a run that was launched before. Raises ConfigError where it was not, or still runs."""
    if not (run_dir / RECIPE).is_file():
        raise ConfigError(f"{run_dir} was not launched: it has no {RECIPE}; submit it with dinoreg-launch train")
    config = load_launched(run_dir / RECIPE, [*overrides, f"run_dir={run_dir}"])
    return submit(config, cluster, None if new_code else _last_code(run_dir.absolute()))


def _last_code(run_dir: Path) -> Snapshot | None:
    """The snapshot of the latest job, if it is still there."""
    jobs = [job for job in read_jobs(run_dir) if (run_dir / job.code / "__main__.py").is_file()]
    return Snapshot(Path(os.path.normpath(run_dir / jobs[-1].code)), jobs[-1].commit) if jobs else None
