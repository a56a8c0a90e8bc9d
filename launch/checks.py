"""What is looked at before a job is queued, so that a mistake costs a second and not a night in the queue."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from dinoreg.config import ConfigError
from launch import slurm
from launch.config import LaunchConfig

IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
OF_ONE_MACHINE = ("/tmp", "/var/tmp", "/dev/shm", "/run")


def check_slurm(asked: LaunchConfig, folder: Path) -> None:
    """Raises ConfigError on what the cluster cannot do, and on a run directory that its nodes cannot see."""
    if found := re.search(r"%\d*[a-zA-Z%]|\\|\n", str(folder)):
        raise ConfigError(f"Slurm would read {found.group()!r} in the name of a log as something else", key="run_dir")
    slurm.require_slurm()
    _check_run_dir(folder, find_partition(asked, slurm.partitions()))


def check_local(asked: LaunchConfig, folder: Path, debug: bool) -> None:
    """Raises ConfigError on what is not for one machine, or not for one process."""
    if asked.nodes > 1:
        raise ConfigError(f"this machine is one node, not {asked.nodes}", key="launch.nodes")
    if debug and asked.world > 1:
        raise ConfigError("a debugger watches one process: give 0 or 1", key="launch.gpus_a_node")
    check_writable(folder)


def find_partition(asked: LaunchConfig, known: dict[str, slurm.Partition]) -> slurm.Partition:
    """The partition that the job will be in. Raises ConfigError when there is none, or it is too small."""
    defaults = [name for name, partition in known.items() if partition.default]
    names = asked.partition.split(",") if asked.partition else defaults[:1]
    if not names:
        raise ConfigError(f"there is no default; give one of {', '.join(sorted(known))}", key="launch.partition")
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no '{name}' here, only {', '.join(sorted(known))}", key="launch.partition")
    largest = max((known[name] for name in names), key=lambda partition: (partition.gpus, partition.nodes))
    _check_size(asked, largest, ", ".join(names))
    return largest


def _check_size(asked: LaunchConfig, there: slurm.Partition, name: str) -> None:
    """Against the largest node, and the number of all: whether the two go together, sbatch finds out."""
    if asked.gpus_a_node > there.gpus:
        raise ConfigError(
            f"{asked.gpus_a_node} GPUs on a node, but those of partition {name} have {there.gpus or 'none'}",
            key="launch.gpus_a_node",
        )
    if asked.nodes > there.nodes:
        raise ConfigError(f"partition {name} has {there.nodes} nodes, not {asked.nodes}", key="launch.nodes")
    cpus = asked.tasks_a_node * (asked.cpus_a_task or 1)
    if cpus > there.cpus:
        raise ConfigError(
            f"{asked.tasks_a_node} tasks with {asked.cpus_a_task or 1} CPUs each, but the nodes of partition {name} "
            f"have {there.cpus}",
            key="launch.cpus_a_task",
        )


def _check_run_dir(run_dir: Path, partition: slurm.Partition) -> None:
    if partition.hosts != {socket.gethostname().split(".")[0]} and (why := why_local(run_dir)):
        raise ConfigError(
            f"{run_dir} is {why}, where the nodes of the cluster do not see it; give a folder that they share",
            key="run_dir",
        )
    check_writable(run_dir)


def why_local(path: Path, mounts: str | None = None) -> str | None:
    """In words, why a folder belongs to this machine alone; None where nothing says so.

    mounts: what /proc/mounts holds.
    """
    path = path.resolve()
    if mounts is None:
        mounts = Path("/proc/mounts").read_text() if Path("/proc/mounts").exists() else ""
    above = [(Path(_unescaped(point)), kind) for _, point, kind, *_ in map(str.split, mounts.splitlines())]
    point, kind = max(
        ((p, kind) for p, kind in above if path.is_relative_to(p)), key=lambda m: len(m[0].parts), default=(None, "")
    )
    if kind in IN_MEMORY:
        return f"in memory ({kind} at {point})"
    own = next((folder for folder in OF_ONE_MACHINE if path.is_relative_to(folder)), None)
    return f"in {own} of this machine" if own else None


def _unescaped(point: str) -> str:
    """/proc/mounts writes a space as \\040."""
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match.group(1), 8)), point)


def check_writable(run_dir: Path) -> None:
    """Raises ConfigError where no run can write."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}", key="run_dir") from None
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise ConfigError(f"{run_dir} cannot be written to", key="run_dir")
