"""What came of a sweep: a table of its runs for people, for programs and for papers. Also while they run."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dinoreg.config import ConfigError
from dinoreg.train.tracking import read_metrics
from launch import evaluations
from launch.evaluations import Score
from launch.grid import as_text, short_names
from launch.plot import draw
from launch.status import rows
from launch.sweep import axes_of, runs_of
from launch.task import RECIPE

LOSS, KNN = "loss", "k-NN in training"
TAIL = 10  # the loss of a run is the mean of its last readings: one in ten of them


@dataclass
class Point:
    """One run. values: of the axes; scores: by name, the loss and the k-NN of the training among them."""

    run: Path
    values: list[Any]
    state: str
    step: int
    scores: dict[str, Score] = field(default_factory=dict)


def write_table(folder: Path) -> str:
    """Write table.csv, table.md and plot.png into a sweep's folder; the table for a terminal. Raises ConfigError."""
    keys = axes_of(folder)
    points = read_points(folder, keys)
    axes = list(short_names(keys).values())
    shown = _of_note(points)
    if not shown:
        return f"{_aligned(_cells(axes, points, shown))}\nnothing is measured yet"
    _write_csv(folder / "table.csv", keys, points)
    (folder / "table.md").write_text(_markdown(_cells(axes, points, shown)), encoding="utf-8")
    draw(folder / "plot.png", folder.name, axes, points, shown)
    return f"{_aligned(_cells(axes, points, shown))}\nin {folder}: table.csv, table.md, plot.png"


def read_points(folder: Path, keys: Sequence[str]) -> list[Point]:
    """The runs of a sweep, in the order of their values. Raises ConfigError where there is none."""
    runs = [run for run in runs_of(folder) if (run / RECIPE).is_file()]
    if not runs:
        raise ConfigError(f"no run of the sweep in {folder} was submitted")
    points = [
        Point(run, _values(run, keys), row.state, row.glance.step, _scores(run))
        for run, row in zip(runs, rows(runs), strict=True)
    ]
    return sorted(points, key=lambda point: [order(value) for value in point.values])


def order(value: Any) -> tuple[float, str]:
    """Numbers by their size, before texts."""
    number = isinstance(value, int | float)
    return (float(value), "") if number else (math.inf, as_text(value))


def _values(run: Path, keys: Sequence[str]) -> list[Any]:
    recipe = yaml.safe_load((run / RECIPE).read_text(encoding="utf-8"))
    found = []
    for key in keys:
        value = recipe
        for name in key.split("."):
            value = value[name]
        found.append(value)
    return found


def _scores(run: Path) -> dict[str, Score]:
    evaluations.collect(run)
    path = run / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    found = {}
    if losses := [(int(line["step"]), line["loss/total"]) for line in records if "loss/total" in line]:
        last = losses[-max(1, len(losses) // TAIL) :]
        found[LOSS] = Score("training", LOSS, last[-1][0], sum(value for _, value in last) / len(last))
    if tops := [line for line in records if "knn/top1" in line]:
        found[KNN] = Score("training", KNN, int(tops[-1]["step"]), 100 * tops[-1]["knn/top1"], unit="%")
    return found | {score.name: score for score in evaluations.scores(run)}


def _of_note(points: Sequence[Point]) -> list[str]:
    """Names of the scores for people: of each suite the one that counts most, which is its first."""
    first: dict[str, str] = {}
    for point in points:
        for name, score in point.scores.items():
            first.setdefault(name if score.suite == "training" else score.suite, name)
    return list(first.values())


def _cells(axes: Sequence[str], points: Sequence[Point], shown: Sequence[str]) -> list[list[str]]:
    cells = [[*axes, "state", "step", *shown]]
    for point in points:
        found = [_shown(point, name) for name in shown]
        cells.append([*map(as_text, point.values), point.state, str(point.step), *found])
    return cells


def _shown(point: Point, name: str) -> str:
    """With its step where that is not the run's: teachers of different steps are no comparison."""
    if (score := point.scores.get(name)) is None:
        return "-"
    return f"{score} at {score.step}" if score.suite != "training" and score.step < point.step else str(score)


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def _markdown(cells: Sequence[Sequence[str]]) -> str:
    rows_ = [f"| {' | '.join(row)} |" for row in (cells[0], ["---"] * len(cells[0]), *cells[1:])]
    return "\n".join(rows_) + "\n"


def _write_csv(path: Path, keys: Sequence[str], points: Sequence[Point]) -> None:
    """All scores with all digits, and the steps and intervals of those that have some."""
    names = list(dict.fromkeys(name for point in points for name in point.scores))
    parts = ("value", "step", "low", "high")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        heads = [name if part == "value" else f"{name} {part}" for name in names for part in parts]
        writer.writerow(["run", *keys, "state", "step", *heads])
        for point in points:
            found = [getattr(point.scores.get(name), part, "") for name in names for part in parts]
            writer.writerow([point.run.name, *map(as_text, point.values), point.state, point.step, *found])
