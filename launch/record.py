"""launch.json in a run directory: which jobs the run was given to, and when each of them began anew."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dinoreg.config import ConfigError

NAME = "launch.json"


@dataclass
class Start:
    """One start of a job, written by its first task. step: of the checkpoint that it goes on from, 0 without one."""

    restart: int  # 0 for the first
    time: str
    step: int
    nodes: str


@dataclass
class Job:
    """One submission. A job that is requeued keeps its id and has several starts."""

    id: str
    cluster: str = ""
    host: str = ""  # that it was submitted on; a local job runs there
    submitted: str = ""
    commit: str = ""  # of the checkout, + where files differed from it
    code: str = ""  # the snapshot, and where the logs are: from the run directory, or beside it in a sweep
    logs: str = "jobs"
    cancelled: str = ""  # when somebody did, with dinoreg-launch
    ended: str = ""  # when it did, of a local job
    starts: list[Start] = field(default_factory=list)

    @property
    def requeues(self) -> int:
        return max(0, len(self.starts) - 1)

    def vain_starts(self, start: Start) -> int:
        """How many of the latest starts before this one were where it is already."""
        earlier = [each for each in self.starts if each.restart < start.restart]
        ahead = [number for number, each in enumerate(earlier, 1) if each.step < start.step]
        return len(earlier) - max(ahead, default=0)


def read_jobs(run_dir: Path) -> list[Job]:
    """All jobs of a run, the latest last; none where nothing was launched. Raises ConfigError on a damaged record."""
    content = read_record(run_dir / NAME)
    return [Job(**{**each, "starts": [Start(**start) for start in each["starts"]]}) for each in content.get("jobs", [])]


def read_record(path: Path) -> dict[str, Any]:
    """What a JSON file of the launcher holds; nothing where there is none. Raises ConfigError where it is torn."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except ValueError:
        raise ConfigError(f"{path} is damaged; see that no job of the run is left, and remove it") from None


@contextmanager
def editing(run_dir: Path, job_id: str) -> Iterator[Job]:
    """One job of the record, new if need be, to be changed. The launcher and a job's first task may both be at it."""
    with locked(run_dir / f"{NAME}.lock"):
        jobs = read_jobs(run_dir)
        job = next((each for each in jobs if each.id == job_id), None)
        if job is None:
            jobs.append(job := Job(job_id))
        yield job
        fresh = run_dir / f"{NAME}.new"
        fresh.write_text(json.dumps({"jobs": [asdict(each) for each in jobs]}, indent=1) + "\n", encoding="utf-8")
        fresh.replace(run_dir / NAME)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time, on whatever machine; the others wait."""
    with path.open("a") as lock:
        _take(lock.fileno())
        yield


def _take(file: int) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return  # a file system without locks: better unprotected than unusable


def now() -> str:
    """The time as the record writes it."""
    return time.strftime("%Y-%m-%d %H:%M:%S")
