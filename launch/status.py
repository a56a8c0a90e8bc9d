"""A table of runs: how far, how fast, how good, and why not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinoreg.config import ConfigError
from launch import jobs
from launch.evaluations import EVAL, RESULTS, step_of
from launch.glance import Glance, glance
from launch.logs import end_of, why
from launch.record import NAME, Job, read_jobs
from launch.slurm import UNKNOWN, JobState, NoAnswer

HEADER = ("RUN", "JOB", "STATE", "STEP", "IMG/S", "ETA", "SAVED", "SCORE", "REQUEUES")


@dataclass(frozen=True)
class Row:
    """One run. notes: why it waits, or why it ended; how its evaluations are."""

    run: str
    job: Job
    requeues: int  # of all its jobs
    state: str
    glance: Glance
    notes: list[str]

    def cells(self) -> tuple[str, ...]:
        """As the table shows them."""
        at, running = self.glance, self.state == "running"
        return (
            *(self.run, self.job.id, self.state, f"{at.step}/{at.total or '?'}"),
            f"{at.images_per_second:.1f}" if at.images_per_second is not None else "-",
            duration(at.seconds_left) if running and at.seconds_left is not None else "-",
            *(str(at.checkpoint or "-"), at.score or "-", str(self.requeues)),
        )


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The launched runs among the folders, and directly or two levels below them. Raises ConfigError without any."""
    found = [run.parent for folder in folders for pattern in ("", "*/", "*/*/") for run in folder.glob(pattern + NAME)]
    if not found:
        raise ConfigError(f"no run was launched in {', '.join(map(str, folders))}: there is no {NAME}")
    return sorted(dict.fromkeys(found), key=natural)


def natural(path: Path) -> list[tuple[int, float, str]]:
    """To sort by: numbers by their size, 4 before 16."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", str(path))
    return [(1, float(part), "") if number % 2 else (0, 0.0, part) for number, part in enumerate(parts)]


def rows(runs: Iterable[Path]) -> list[Row]:
    """One for each run, of its latest job, with what its evaluations are at."""
    latest = jobs.latest(runs)
    evaluations = {run: jobs.latest(_unfinished(run)) for run in latest}
    told = _told(latest | {path: job for found in evaluations.values() for path, job in found.items()})
    return [_row(run, job, told[run], _notes(evaluations[run], told)) for run, job in latest.items()]


def _told(asked: dict[Path, Job]) -> dict[Path, JobState | None]:
    """What a run has done can be shown without Slurm."""
    try:
        return jobs.states(asked)
    except NoAnswer as error:
        return dict.fromkeys(asked, JobState(UNKNOWN, error.message))


def _unfinished(run: Path) -> list[Path]:
    """Evaluations that were submitted and have not brought a result."""
    submitted = [path.parent for path in run.glob(f"{EVAL}/*/step_*/{NAME}")]
    return [path for path in sorted(submitted) if not (path / RESULTS).is_file()]


def _notes(evaluations: dict[Path, Job], told: dict[Path, JobState | None]) -> list[str]:
    """A line for those of each suite that wait or run, and one for those that failed, with the last one's reason."""
    notes = []
    for suite in dict.fromkeys(path.parent for path in evaluations):
        own = {path: told[path] for path in evaluations if path.parent == suite}
        active = [state.name.lower() for state in own.values() if state is not None and not state.over]
        failed = [path for path, state in own.items() if state is None or state.over]
        if active:
            counts = ", ".join(f"{active.count(name)} {name}" for name in dict.fromkeys(active))
            notes.append(f"eval {suite.name}: {counts}")
        if failed:
            last, more = failed[-1], f", and {len(failed) - 1} more" if len(failed) > 1 else ""
            end = end_of(last, evaluations[last], own[last])
            notes.append(f"eval {suite.name}, step {step_of(last)}{more}: {end}")
    return notes


def _row(run: Path, job: Job, state: JobState | None, notes: list[str]) -> Row:
    at = glance(run)
    name = state_name(job, state, at.finished)
    if name == "finished":
        note = None
    elif state is not None and not state.over:
        note = state.reason if state.name in ("PENDING", UNKNOWN) and state.reason not in ("", "None") else None
    else:
        note = why(run, job) or (None if job.starts else "it had not begun")
        if name == "cancelled" and not (note or "").startswith("stopped by") and job.starts:
            note = f"it had no time to save what came after step {at.checkpoint}"
    requeues = sum(each.requeues for each in read_jobs(run))
    return Row(str(run), job, requeues, name, at, [*([note] if note else []), *notes])


def state_name(job: Job, state: JobState | None, finished: bool) -> str:
    """One word. Slurm's own where the job is not at its end, or ended by itself without finishing the run."""
    if state is not None and state.active:
        return state.name.lower()
    if finished:
        return "finished"
    if job.cancelled or (state is not None and state.name == "CANCELLED"):
        return "cancelled"
    return "ended" if state is None or state.name == "COMPLETED" else state.name.lower()


def table(found: Sequence[Row]) -> str:
    """Lines with columns of the same width, and below a run what there is to say about it."""
    cells = [HEADER, *(row.cells() for row in found)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADER))]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    notes: list[list[str]] = [[], *(row.notes for row in found)]
    return "\n".join("\n    ".join([line, *said]) for line, said in zip(lines, notes, strict=True))


def duration(seconds: float) -> str:
    """2d 3:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{f'{days}d ' if days else ''}{hours}:{minutes:02d}:{rest:02d}"
