"""The `launch:` section of a recipe: what is asked of Slurm, and what surrounds the run there."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from dinoreg.config import ConfigError
from dinoreg.train.stopping import parse_time

# What launch.sbatch must not say, and who says it.
_OURS = {
    **{name: f"launch.{name}" for name in ("nodes", "partition", "account", "qos", "constraint", "exclude", "comment")},
    **dict.fromkeys(("gpus-per-node", "ntasks-per-node", "ntasks", "gpus", "gpus-per-task"), "launch.gpus_a_node"),
    **dict.fromkeys(("output", "error", "open-mode", "requeue"), "nobody: the launcher needs it as it is"),
    "array": "launch.array, and its elements by dinoreg-launch sweep",
    "time": "launch.time",
    "mem": "launch.memory",
    "cpus-per-task": "launch.cpus_a_task",
    "signal": "launch.signal_seconds",
    "job-name": "run_dir",
}


@dataclass
class LaunchConfig:
    """Resources, and what happens around `dinoreg train`. With --cluster local most of it does not matter."""

    nodes: int = 1
    gpus_a_node: int = 0  # also the tasks on each node, one a GPU; 0: one task a node, on CPUs
    partition: str | None = None  # null: the cluster's default, here and below
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    comment: str | None = None
    time: str | None = None  # 3h50m, 2d12h, or as Slurm writes it: 90 (minutes), 12:00:00, 2-12
    memory: str | None = None  # of a node, such as 320GB
    cpus_a_task: int | None = None  # data workers share them; Slurm's default is mostly 1
    array: int | None = None  # so many jobs of a sweep or of an evaluation at once; null: all, on this machine 1
    signal_seconds: int = 180  # before the time limit, to finish the step and to write a checkpoint
    max_requeues_without_progress: int = 5  # in a row without a newer checkpoint, after which the job ends
    env: list[str] = field(default_factory=list)  # NAME=value, such as NCCL_SOCKET_IFNAME=ib0
    setup: list[str] = field(default_factory=list)  # shell lines before Python, such as module load cuda
    python: str | None = None  # the interpreter on the nodes; null: this one, or python3 in a container
    container_image: str | None = None  # for Slurm with pyxis
    container_mounts: list[str] = field(default_factory=list)  # FROM:TO; the run directory is mounted anyway
    sbatch: list[str] = field(default_factory=list)  # any other option of sbatch: exclusive, reservation=big, gres=...

    def check(self) -> None:
        """Raises ConfigError on what no cluster could do."""
        for key, least in (("nodes", 1), ("gpus_a_node", 0), ("signal_seconds", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"must be at least {least}, not {getattr(self, key)}", key=key)
        if self.max_requeues_without_progress < 0:
            raise ConfigError("must be 0 (never) or more", key="max_requeues_without_progress")
        for key in ("cpus_a_task", "array"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ConfigError(f"must be at least 1, not {value}", key=key)
        for text in self.env:
            if not re.match(r"[A-Za-z_]\w*=", text):
                raise ConfigError(f"'{text}' is not of the form NAME=value", key="env")
        self._check_time()
        for name in self.sbatch_options():
            if name in _OURS:
                raise ConfigError(f"--{name} is said by {_OURS[name]}", key="sbatch")

    def _check_time(self) -> None:
        if self.time is None:
            return
        try:
            minutes = minutes_of(self.time)
        except ConfigError as error:
            raise ConfigError(error.message, key="time") from None
        if minutes * 60 <= self.signal_seconds:
            raise ConfigError(
                f"{self.time} is over before launch.signal_seconds {self.signal_seconds}; raise one or lower the other",
                key="time",
            )

    @property
    def tasks_a_node(self) -> int:
        return max(1, self.gpus_a_node)

    @property
    def world(self) -> int:
        """Processes of the run."""
        return self.nodes * self.tasks_a_node

    def sbatch_options(self) -> dict[str, str | bool]:
        """launch.sbatch by name; True for what has no value."""
        pairs = [text.removeprefix("--").partition("=") for text in self.sbatch]
        return {name: value if equals else True for name, equals, value in pairs}


def minutes_of(text: str) -> int:
    """Whole minutes of a time as people or Slurm write it, rounded up. Raises ConfigError."""
    slurm = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d\d?))?(?::(\d\d?))?", text.strip())
    if slurm is None:
        try:
            return -int(-parse_time(text) // 60)
        except ConfigError:
            raise ConfigError(
                f"not a time: '{text}'; write it as 3h50m, 2d12h, or as Slurm does: 90 (minutes), 12:00:00, 2-12"
            ) from None
    days, *parts = (int(part) if part else 0 for part in slurm.groups())
    if slurm.group(1) is None and slurm.group(4) is None:  # minutes, or minutes:seconds
        parts = [0, *parts[:2]]
    hours, minutes, seconds = parts
    return days * 1440 + hours * 60 + minutes + (seconds > 0)
