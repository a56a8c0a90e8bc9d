"""A grid of runs, submitted as one array. Each has a run directory of its own in the sweep's folder."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dinoreg.config import ConfigError, to_yaml
from dinoreg.train.recipe import is_free
from dinoreg.train.rundir import changes
from launch import jobs
from launch.glance import glance
from launch.grid import Axis, name_of, points, short_names, split_axes
from launch.recipe import LaunchedRun, load_launched
from launch.record import NAME, read_jobs, read_record
from launch.snapshot import Snapshot, take_snapshot
from launch.status import natural, state_name
from launch.submit import Cluster, check, queue, training

SWEEP = "sweep.json"  # in the sweep's folder: its axes
COMMON = "sweep.yaml"  # what its runs have in common: the first of them
MOST = 100  # runs that nobody asks for by mistake


@dataclass(frozen=True)
class Sweep:
    """runs: by the names of their folders."""

    folder: Path
    axes: list[Axis]
    runs: dict[str, LaunchedRun]

    @property
    def first(self) -> LaunchedRun:
        return next(iter(self.runs.values()))


def plan(recipe: str, words: Sequence[str], most: int = MOST) -> Sweep:
    """All runs of a grid, each as `train` would read it. Raises ConfigError on what is wrong with any of them."""
    axes, rest = split_axes(words)
    grid = points(axes)
    if len(grid) > most:
        raise ConfigError(f"a grid of {len(grid)} runs; if that is meant, say --most {len(grid)}")
    first = load_launched(recipe, [*rest, *grid[0]])
    folder, runs = Path(first.run_dir), {}
    _refuse_other(folder, [axis.key for axis in axes], first)
    for overrides in grid:
        config = load_launched(recipe, [*rest, *overrides])
        name = name_of(config, axes)
        if name in runs:
            raise ConfigError(f"the same value twice: {', '.join(overrides)} is {name} again")
        # Once more: now that it is known where the run lies, what lies there is compared.
        runs[name] = load_launched(recipe, [*rest, *overrides, f"run_dir={folder / name}"])
        runs[name].tracking.name = config.tracking.name or f"{folder.name} {name}"
    return Sweep(folder, axes, runs)


def submit(sweep: Sweep, cluster: Cluster) -> tuple[dict[str, str], dict[str, str]]:
    """The jobs by the names of their runs, and why others got none: finished, or waiting or running already.

    Raises ConfigError, with nothing in the queue.
    """
    check(sweep.first.launch, sweep.folder, cluster)
    with alone(sweep.folder):
        left = leave_out({name: Path(config.run_dir) for name, config in sweep.runs.items()})
        wanted = {name: config for name, config in sweep.runs.items() if name not in left}
        _write(sweep)
        return (submit_runs(wanted, sweep.folder, cluster, take_snapshot(sweep.folder)) if wanted else {}), left


def submit_runs(runs: dict[str, LaunchedRun], folder: Path, cluster: Cluster, code: Snapshot) -> dict[str, str]:
    """Give runs to Slurm, or to this machine, as one array; the jobs by name."""
    tasks = [training(config, cluster, code) for config in runs.values()]
    asked = next(iter(runs.values())).launch
    return dict(zip(runs, queue(tasks, asked, folder, cluster, code), strict=True))


def leave_out(runs: dict[str, Path]) -> dict[str, str]:
    """Of the runs by name those that are finished, wait or run, and which of it."""
    latest = jobs.latest(runs.values())
    told = jobs.states(latest)
    left = {}
    for name, run in runs.items():
        finished, state = glance(run).finished, told.get(run)
        if finished or (state is not None and state.active):
            left[name] = "finished" if run not in latest else state_name(latest[run], state, finished)
    return left


def runs_of(folder: Path) -> list[Path]:
    """The folder itself where that is a run, or the runs of a sweep in it. Raises ConfigError where it is neither."""
    if (folder / SWEEP).is_file():
        return sorted((path.parent for path in folder.glob(f"*/{NAME}")), key=natural)
    if not (folder / NAME).is_file():
        raise ConfigError(f"{folder} was not launched: it has neither {NAME} nor {SWEEP}")
    return [folder]


def is_sweep(folder: Path) -> bool:
    """Whether a folder is one of a sweep."""
    return (folder / SWEEP).is_file()


def axes_of(folder: Path) -> list[str]:
    """The keys of a sweep. Raises ConfigError where there is none."""
    if not is_sweep(folder):
        raise ConfigError(f"{folder} is no folder of a sweep: it has no {SWEEP}")
    return list(read_record(folder / SWEEP)["axes"])


def _refuse_other(folder: Path, keys: list[str], first: LaunchedRun) -> None:
    """Raises ConfigError where the folder belongs to something else. first: of the runs, of which the axes differ."""
    if read_jobs(folder) or (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} is a run; give another folder to the sweep", key="run_dir")
    if not is_sweep(folder):
        return
    known = axes_of(folder)
    if keys != known:
        raise ConfigError(
            f"{folder} is a sweep over {', '.join(known)}, not over {', '.join(keys)}; give another folder",
            key="run_dir",
        )
    other = changes(folder / COMMON, first.run())
    listed = [f"{key}={now} (was {was})" for key, (was, now) in other.items() if not is_free(key) and key not in keys]
    if listed:
        raise ConfigError(
            f"{folder} is a sweep with other options: {', '.join(listed)}; give the old ones, or another folder",
            key="run_dir",
        )


def _write(sweep: Sweep) -> None:
    sweep.folder.mkdir(parents=True, exist_ok=True)
    if not is_sweep(sweep.folder):
        (sweep.folder / COMMON).write_text(to_yaml(sweep.first), encoding="utf-8")
    names = short_names([axis.key for axis in sweep.axes])
    fresh = sweep.folder / f"{SWEEP}.new"
    fresh.write_text(json.dumps({"axes": names}, indent=1) + "\n", encoding="utf-8")
    fresh.replace(sweep.folder / SWEEP)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Raises ConfigError while another command submits runs of the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{SWEEP}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder} is in use by another sweep command; try again when that has ended") from None
        except OSError:
            pass  # a file system without locks: better unprotected than unusable
        yield
