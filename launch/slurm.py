"""What Slurm is asked: its partitions, and how jobs are. Each question is one call of one of its commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from dinoreg.config import ConfigError

PATIENCE = 60  # seconds for an answer; a controller under load may take many
# States of a job that is not at its end, also those that squeue shows of one that is about to start again.
ACTIVE = (
    *("PENDING", "RUNNING", "SUSPENDED", "STOPPED", "CONFIGURING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT"),
    *("REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"),
)

UNKNOWN = "UNKNOWN"  # it may be at its end or not


class NoAnswer(ConfigError):
    """Slurm said nothing: what it would have said is not known, and may be asked for again."""


@dataclass(frozen=True)
class Partition:
    """A partition, by the largest of its nodes."""

    nodes: int
    gpus: int
    cpus: int
    hosts: frozenset[str]
    default: bool


@dataclass(frozen=True)
class JobState:
    """`name` as Slurm writes it, such as RUNNING; `reason`: why it waits, how it failed, or why it is not known."""

    name: str
    reason: str = ""

    @property
    def active(self) -> bool:
        return self.name in ACTIVE

    @property
    def over(self) -> bool:
        return not self.active and self.name != UNKNOWN


def require_slurm() -> None:
    """Raises ConfigError where jobs cannot be submitted."""
    for name in ("sbatch", "srun", "sinfo"):
        if shutil.which(name) is None:
            raise ConfigError(
                f"no {name} on PATH: this is no machine of a Slurm cluster, or its module is not loaded; "
                "--cluster local runs on this machine"
            )


def partitions() -> dict[str, Partition]:
    """All partitions by name. Raises ConfigError when Slurm does not answer."""
    rows = [line.split("|") for line in ask("sinfo", "-h", "-a", "-N", "-o", "%P|%G|%c|%n").splitlines()]
    found: dict[str, Partition] = {}
    for title in dict.fromkeys(row[0] for row in rows):
        nodes = [row for row in rows if row[0] == title]
        found[title.rstrip("*")] = Partition(
            nodes=len(nodes),
            gpus=max(gpus_of(row[1]) for row in nodes),
            cpus=max(int(row[2].rstrip("+")) for row in nodes),
            hosts=frozenset(row[3] for row in nodes),
            default=title.endswith("*"),
        )
    return found


def gpus_of(gres: str) -> int:
    """`gpu:a100:4(S:0-1),gpu:h100:8,nvme:1` -> 12."""
    return sum(int(count) for count in re.findall(r"\bgpu:(?:[^:,()]+:)?(\d+)", gres))


def job_states(ids: Iterable[str], users: Iterable[int] = ()) -> dict[str, JobState]:
    """How jobs are, by id; those that Slurm has forgotten are left out. users: whose they are beside one's own.

    squeue knows what is queued, runs, or ended some minutes ago; sacct the rest, where there is accounting. Raises
    NoAnswer where squeue fails: a job that nobody can tell of may well run.
    """
    wanted = set(ids)
    if not wanted or shutil.which("squeue") is None:
        return {}
    owners = ",".join(map(str, sorted({os.getuid(), *users})))
    listed = ask("squeue", "-h", "-a", "-r", "-t", "all", "-u", owners, "-o", "%i|%T|%r")
    found = _states(listed, wanted)
    if missing := sorted(wanted - found.keys()):
        told = _of_old("sacct", "-n", "-X", "-P", "-j", ",".join(missing), "-o", "JobID,State,Reason")
        found |= _states(told, set(missing))
    return found


def _states(text: str, wanted: set[str]) -> dict[str, JobState]:
    rows = [row for line in text.splitlines() if len(row := line.split("|")) == 3 and row[0] in wanted and row[1]]
    return {job: JobState(state.split()[0], reason) for job, state, reason in rows}  # `CANCELLED by 1000` is sacct's


def cancel(job: str) -> None:
    """End a job: its tasks get SIGTERM, and are killed after Slurm's KillWait. Raises ConfigError."""
    ask("scancel", job)


def ask(*command: str) -> str:
    """What a command prints. Raises NoAnswer with its own first words when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoAnswer(f"{command[0]}: {error}") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise NoAnswer(said[0] if said else f"{command[0]} failed with {done.returncode}")
    return done.stdout


def _of_old(*command: str) -> str:
    """Nothing, where there is no accounting."""
    try:
        return ask(*command)
    except NoAnswer:
        return ""
