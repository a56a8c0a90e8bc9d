"""Checkpoints as rows, and as columns what was measured: the same score, on the same data, in the same protocol."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from eval.published import PUBLISHED, Published
from eval.report.paired import Difference, difference
from eval.report.read import Evaluation, by_checkpoint, name_of, order
from eval.report.wording import CIRCUMSTANCES, as_text, changed, standard_of
from eval.results import Score

# Of a protocol, what follows from the network or only puts other entries into words.
FOLLOWS = CIRCUMSTANCES | {"view", "blocks", "padding", "resized", "unit", "labels", "tested", "compared"}
FOLLOWS |= {"max_train", "max_test"}  # the data's hash is of the images that are used


@dataclass
class Checkpoint:
    """One set of weights with all its results. place: the number of the place that the user named."""

    name: str
    place: int
    evaluations: list[Evaluation]

    @property
    def first(self) -> Evaluation:
        return self.evaluations[0]

    @property
    def run(self) -> Path | None:
        return self.first.run

    @property
    def step(self) -> int | None:
        return self.first.step

    @property
    def registers(self) -> int | None:
        return self.first.registers

    @property
    def shape(self) -> tuple[Any, ...]:
        """All of the architecture but the registers; those of the same shape differ in registers alone."""
        about = dict(self.first.content.get("architecture", {}))
        about.pop("registers", None)
        return tuple(sorted(about.items()))


@dataclass(frozen=True)
class Column:
    """What is comparable. key: of data and protocol; sample: one of the results in it."""

    suite: str
    score: str
    key: str
    sample: Evaluation = field(compare=False)

    @property
    def published(self) -> str:
        """The key of its published figures."""
        return f"{self.suite}/{self.score}"

    @property
    def obstacles(self) -> list[str]:
        """Why published figures cannot stand in it; none where they can."""
        said = []
        if standard_of(self.sample) is None:
            said.append(f"the images are those of {self.sample.data['name']}")
        options = [key for key in changed(self.sample) if key != "select"]
        if options:
            said.append(f"the protocol has other {', '.join(options[:3])}{' and more' * (len(options) > 3)}")
        return said

    @property
    def chosen_elsewhere(self) -> bool:
        """Whether published figures chose on the test images, unlike these."""
        return "select" in changed(self.sample)

    @cached_property
    def rows(self) -> list[Published]:
        """The published figures that may stand in it."""
        return [] if self.obstacles else [row for row in PUBLISHED if self.published in row.scores]


@dataclass
class Grid:
    """All that is compared. rows: what a table shows, of each run in a place the newest step; all: every checkpoint."""

    all: list[Checkpoint]
    rows: list[Checkpoint]
    columns: list[Column]

    @staticmethod
    def of(places: Sequence[Sequence[Evaluation]]) -> Grid:
        """places: what was found in each; the first checkpoint is the reference."""
        found = [each for place in places for each in place]
        place_of = {each.digest: number for number, place in reversed(list(enumerate(places))) for each in place}
        groups = sorted(by_checkpoint(found).items(), key=lambda item: place_of[item[0]])
        everything = [Checkpoint(name_of(group), place_of[digest], group) for digest, group in groups]
        _tell_apart(everything)
        columns = {column: None for each in sorted(found, key=order) for column in _columns(each)}
        return Grid(everything, _newest(everything), list(columns))

    def at(self, row: Checkpoint, column: Column) -> Evaluation | None:
        """The result in a cell; the last one where it was measured several times."""
        fitting = [each for each in row.evaluations if column in _columns(each)]
        return max(fitting, key=lambda each: each.finished, default=None)

    def score(self, row: Checkpoint, column: Column) -> Score | None:
        found = self.at(row, column)
        return None if found is None else found.scores[column.score]

    def against_first(self, row: Checkpoint, column: Column) -> Difference | None:
        """The difference from the first row; None for that row, and where one of the two is lacking."""
        ours, theirs = self.at(row, column), self.at(self.rows[0], column)
        if row is self.rows[0] or ours is None or theirs is None:
            return None
        return difference(ours, theirs, column.score)

    def best(self, column: Column) -> float | None:
        """The best value in a column of several."""
        scores = [score for row in self.rows if (score := self.score(row, column))]
        if len(scores) < 2:
            return None
        return (max if scores[0].better == "higher" else min)(score.value for score in scores)

    def published(self) -> list[Published]:
        """The published rows that have a figure in some column."""
        return [known for known in PUBLISHED if any(known in column.rows for column in self.columns)]

    def variants(self, column: Column) -> list[Column]:
        """Columns of the same score, on other data or in another protocol, itself among them."""
        return [other for other in self.columns if other.published == column.published]

    def remarks(self) -> list[str]:
        """Why the same score has several columns."""
        said = []
        for name in dict.fromkeys(column.published for column in self.columns):
            one, *others = [column for column in self.columns if column.published == name]
            for other in others:
                said.append(f"{one.suite} has several columns that cannot be compared: {unlike(one, other)}.")
        return list(dict.fromkeys(said))


def unlike(one: Column, other: Column) -> str:
    """In what two columns of the same score differ."""
    ours, theirs = one.sample, other.sample
    said = []
    if ours.data.get("hash") != theirs.data.get("hash"):
        said.append(f"measured on {_size(ours)} and on {_size(theirs)}")
    keys = [key for key, value in _protocol(ours).items() if _protocol(theirs).get(key) != value]
    if keys:
        values = (f"{key} = {as_text(ours.protocol[key])} and {as_text(theirs.protocol.get(key))}" for key in keys[:4])
        said.append("with " + ", ".join(values) + (f" and {len(keys) - 4} more" if len(keys) > 4 else ""))
    return "; ".join(said)


def _size(evaluation: Evaluation) -> str:
    data = evaluation.data
    count = f"{data.get('train', 0):,} training, {data.get('test', 0):,} test images"
    return f"{data['name']} ({count}, {data.get('hash')})"


def _protocol(evaluation: Evaluation) -> dict[str, Any]:
    return {key: value for key, value in evaluation.protocol.items() if key not in FOLLOWS}


def _columns(evaluation: Evaluation) -> list[Column]:
    key = json.dumps([evaluation.data.get("hash"), _protocol(evaluation)], sort_keys=True)
    return [Column(evaluation.suite, name, key, evaluation) for name in evaluation.headlines]


def _newest(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Of each run in a place the newest step that has the most results; all that are of no run."""
    chosen: dict[Any, Checkpoint] = {}
    for number, each in enumerate(checkpoints):
        key: Any = number if each.run is None else (each.place, each.run.resolve())
        known = chosen.get(key)
        if known is None or _rank(each) > _rank(known):
            chosen[key] = each
    return list(chosen.values())


def _rank(checkpoint: Checkpoint) -> tuple[int, int]:
    return len({each.suite for each in checkpoint.evaluations}), checkpoint.step or -1


def _tell_apart(checkpoints: Sequence[Checkpoint]) -> None:
    """Names that several have get the folder, or the hash, behind them."""
    for name in {each.name for each in checkpoints}:
        same = [each for each in checkpoints if each.name == name]
        for each in same if len(same) > 1 else []:
            each.name = f"{name} ({each.first.digest[:6]})"
