"""What evaluations of a run found: results.json of each, evaluations.jsonl of all, and the wandb run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoreg.train.tracking import EVALUATIONS, read_metrics
from launch.record import locked

EVAL = "eval"  # in the run directory: a folder for each suite, in it one for each step
RESULTS = "results.json"


@dataclass(frozen=True)
class Score:
    """The newest of a kind: `knn` and `top1`. low, high: the interval, None where none is known."""

    suite: str
    metric: str
    step: int
    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""

    @property
    def name(self) -> str:
        return f"{self.suite} {self.metric}"

    def __str__(self) -> str:
        return f"{self.value:.1f}%" if self.unit == "%" else f"{self.value:.3f}{self.unit and ' '}{self.unit}"


def folder_of(run_dir: Path, suite: str, step: int) -> Path:
    """Where one evaluation lies."""
    return run_dir / EVAL / suite / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Of a folder or file named step_00000100, whatever comes after it; -1 where the name is another."""
    found = re.match(r"step_(\d{8,})\b", path.name)
    return int(found.group(1)) if found else -1


def collect(run_dir: Path) -> int:
    """Append to evaluations.jsonl what is not in it yet; how much that was. Whoever comes first does it."""
    with locked(run_dir / f"{EVALUATIONS}.lock"):
        known = {(name, line["step"]) for line in _lines(run_dir) for name in line}
        fresh = [line for line in _found(run_dir) if not known >= {(name, line["step"]) for name in line}]
        if fresh:
            with (run_dir / EVALUATIONS).open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in fresh))
    return len(fresh)


def scores(run_dir: Path) -> list[Score]:
    """The newest of each kind, those of a suite in its own order, the most important first."""
    newest = {name: (int(line["step"]), value) for line in _lines(run_dir) for name, value in line.items()}
    return [_score(run_dir, name, *found) for name, found in newest.items() if name.startswith("eval/")]


def main_scores(run_dir: Path) -> list[Score]:
    """Of each suite the one that counts most."""
    first: dict[str, Score] = {}
    for score in scores(run_dir):
        first.setdefault(score.suite, score)
    return list(first.values())


def _score(run_dir: Path, name: str, step: int, value: float) -> Score:
    _, suite, metric = name.split("/", 2)
    said = _content(folder_of(run_dir, suite, step) / RESULTS).get("scores", {}).get(metric, {})
    return Score(suite, metric, step, value, said.get("low"), said.get("high"), said.get("unit", ""))


def _found(run_dir: Path) -> Iterator[dict[str, float]]:
    """A line for each results.json, by step."""
    for path in sorted(run_dir.glob(f"{EVAL}/*/step_*/{RESULTS}"), key=lambda path: step_of(path.parent)):
        suite, said = path.parts[-3], _content(path).get("scores", {})
        if said:
            yield {"step": step_of(path.parent), **{f"eval/{suite}/{name}": s["value"] for name, s in said.items()}}


def _lines(run_dir: Path) -> list[dict[str, float]]:
    """By step."""
    path = run_dir / EVALUATIONS
    return sorted(read_metrics(path), key=lambda line: line["step"]) if path.exists() else []


def _content(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
