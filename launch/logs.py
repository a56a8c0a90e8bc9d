"""The logs of a run's jobs: where they are, following them, and the one line that says why a run ended."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from dinoreg.config import ConfigError
from launch.jobs import active_jobs
from launch.record import Job, read_jobs
from launch.slurm import JobState, NoAnswer

IN_VAIN = "requeues brought nothing new"  # what a start says that is none
TAIL = 1 << 16  # bytes at the end of a log in which its reason is looked for
PAUSE = 0.5  # seconds between two looks at a log that is followed
ASK_EVERY = 10.0  # seconds between two questions whether the job still runs

# The line that says what went wrong, the best first: a run's own, a rank's about another, Python's, then Slurm's.
_REASONS = (
    re.compile(r"^dinoreg(-launch|-eval)?: (?!ended with)(.+)"),
    re.compile(r"^rank \d+( \(.*\))?,? .*(is gone|failed|hangs|frozen|no sign|stands still).*"),
    re.compile(r"^(\w+\.)*\w*(Error|Exception|Interrupt)\b.*"),
    re.compile(r"^(slurmstepd|srun|sbatch|bash|sh|/)\S*: .+"),
)
# What an evaluation says of its weights, and what follows from something else, which is said too.
_NOISE = re.compile(r"^/\S*\.safetensors: |Exited with exit code|Job step aborted|STEP \S+ ON|forcing job termination")


def log_of(run_dir: Path, job: Job, rank: int = 0) -> Path:
    """What one task of a job printed, over all its starts; the first task's holds what sbatch said too."""
    return run_dir / job.logs / f"{job.id}_{rank}_log.out"


def why(run_dir: Path, job: Job) -> str | None:
    """The last line of the first task's latest start that says why it ended; None where nothing does."""
    path = log_of(run_dir, job)
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        text = file.read().decode(errors="replace")
    *earlier, last = text.split(f"\njob {job.id}, start ")
    found = reason_in(last)
    if found and IN_VAIN in found and earlier and (before := reason_in(earlier[-1])):
        return f"{found}; the last one: {before}"
    return found


def end_of(run_dir: Path, job: Job, state: JobState | None) -> str:
    """In words, how a job ended that did not do what it was to do."""
    if job.cancelled or (state is not None and state.name == "CANCELLED"):
        return "cancelled"
    told = "" if state is None or state.name in ("COMPLETED", "FAILED") else state.name.lower().replace("_", " ")
    return why(run_dir, job) or told or ("its log does not say why" if job.starts else "it had not begun")


def reason_in(text: str) -> str | None:
    """The best line of a log, in the order of _REASONS; of several, the last."""
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|^\[rank\d+\]: ?", "", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not _NOISE.search(line)]
    for pattern in _REASONS:
        found = [match for line in lines if (match := pattern.match(line))]
        if found:
            last = found[-1]
            return last.group(2) if pattern is _REASONS[0] else last.group(0)
    return None


def read_log(run_dir: Path, rank: int, follow: bool) -> Iterator[str]:
    """Pieces of the latest job's log; with `follow` until the job ends. Raises ConfigError where there is none."""
    jobs = read_jobs(run_dir)
    if not jobs:
        raise ConfigError(f"{run_dir} was not launched: it has no launch.json")
    path = log_of(run_dir, jobs[-1], rank)
    if not follow and not path.exists():
        raise ConfigError(f"{path} is not there: job {jobs[-1].id} has not begun, or has no task {rank}")
    for pieces in _read([path], [run_dir], follow):
        yield from pieces


def read_logs(run_dirs: Sequence[Path], rank: int, follow: bool) -> Iterator[str]:
    """The same of several runs, in whole lines that begin with the name of their run."""
    paths = [log_of(run_dir, read_jobs(run_dir)[-1], rank) for run_dir in run_dirs]
    rests = [""] * len(paths)
    for pieces in _read(paths, run_dirs, follow):
        for number, piece in enumerate(pieces):
            *lines, rests[number] = (rests[number] + piece).split("\n")
            yield "".join(f"{run_dirs[number].name} | {line}\n" for line in lines)


def _read(paths: Sequence[Path], run_dirs: Sequence[Path], follow: bool) -> Iterator[list[str]]:
    """What is new in each file, until nothing is, or with `follow` until no run has a job any more."""
    positions, ended, asked = [0] * len(paths), not follow, time.monotonic()
    while True:
        found = [_from(path, position) for path, position in zip(paths, positions, strict=True)]
        positions = [position for _, position in found]
        if any(text for text, _ in found):
            yield [text for text, _ in found]
        elif ended:
            return
        else:
            time.sleep(PAUSE)
            if time.monotonic() > asked + ASK_EVERY:
                ended, asked = not _goes_on(run_dirs), time.monotonic()


def _goes_on(run_dirs: Sequence[Path]) -> bool:
    try:
        return bool(active_jobs(run_dirs))
    except NoAnswer:
        return True  # whoever reads on may end that


def _from(path: Path, position: int) -> tuple[str, int]:
    if not path.exists():
        return "", position
    with path.open("rb") as file:
        file.seek(position)
        data = file.read()
    return data.decode(errors="replace"), position + len(data)
