"""Submit a run again, or those runs of a sweep that have not come to their end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dinoreg.config import ConfigError
from launch.recipe import LaunchedRun, load_launched
from launch.record import read_jobs
from launch.snapshot import Snapshot, take_snapshot
from launch.submit import Cluster, check, submit
from launch.sweep import alone, is_sweep, leave_out, runs_of, submit_runs
from launch.task import RECIPE


def resume(folder: Path, overrides: Sequence[str], cluster: Cluster, new_code: bool) -> dict[Path, str]:
    """The ids of new jobs, by run. Raises ConfigError where nothing was launched, or all is finished or still runs."""
    if is_sweep(folder):
        return _resume_sweep(folder, overrides, cluster, new_code)
    config = _again(folder, overrides)
    return {folder: submit(config, cluster, None if new_code else _last_code(folder.absolute()))}


def _resume_sweep(folder: Path, overrides: Sequence[str], cluster: Cluster, new_code: bool) -> dict[Path, str]:
    folder = folder.absolute()
    with alone(folder):
        runs = {run.name: run for run in runs_of(folder)}
        left = leave_out(runs)
        configs = {name: _again(run, overrides) for name, run in runs.items() if name not in left}
        if not configs:
            raise ConfigError(f"{folder} has no run to go on with: {_counted(list(left.values()))}")
        if cluster == "debug":
            raise ConfigError("a debugger watches one run: give one of the sweep's", key="--cluster")
        check(next(iter(configs.values())).launch, folder, cluster)
        codes = [code for name in configs if (code := _last_code(runs[name])) is not None]
        code = take_snapshot(folder) if new_code or not codes else codes[-1]
        return {runs[name]: job for name, job in submit_runs(configs, folder, cluster, code).items()}


def _again(run_dir: Path, overrides: Sequence[str]) -> LaunchedRun:
    if not (run_dir / RECIPE).is_file():
        raise ConfigError(f"{run_dir} was not launched: it has no {RECIPE}; submit it with dinoreg-launch train")
    return load_launched(run_dir / RECIPE, [*overrides, f"run_dir={run_dir}"])


def _counted(words: Sequence[str]) -> str:
    return ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))


def _last_code(run_dir: Path) -> Snapshot | None:
    """The snapshot of the latest job, if it is still there."""
    jobs = [job for job in read_jobs(run_dir) if (run_dir / job.code / "__main__.py").is_file()]
    return Snapshot(Path(os.path.normpath(run_dir / jobs[-1].code)), jobs[-1].commit) if jobs else None
