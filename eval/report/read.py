"""Finds results.json files and says whose they are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from dinoreg.config import ConfigError
from eval.results import ARRAYS, FILE, OUTCOMES, Score, read_arrays, read_scores
from eval.suites import EXPERIMENTS, SUITES

NEEDED = ("suite", "scores", "protocol", "data", "digest", "found")


@dataclass(frozen=True)
class Evaluation:
    """A results.json that was read. path: of the file."""

    path: Path
    content: dict[str, Any]

    @property
    def suite(self) -> str:
        return str(self.content["suite"])

    @property
    def title(self) -> str:
        """What the suite does, in a few words."""
        return SUITES[self.suite].title if self.suite in SUITES else self.suite

    @property
    def digest(self) -> str:
        return str(self.content["digest"])

    @property
    def step(self) -> int | None:
        return self.content.get("step")

    @property
    def registers(self) -> int | None:
        """Their number, where the file says it."""
        said = self.content.get("architecture", {}).get("registers")
        return None if said is None else int(said)

    @property
    def data(self) -> dict[str, Any]:
        return self.content["data"]

    @property
    def protocol(self) -> dict[str, Any]:
        return self.content["protocol"]

    @property
    def details(self) -> dict[str, Any]:
        return self.content.get("details", {})

    @property
    def notes(self) -> list[str]:
        return list(self.content.get("notes", []))

    @cached_property
    def scores(self) -> dict[str, Score]:
        return read_scores(self.content)

    @property
    def main(self) -> tuple[str, Score]:
        """The name and the value of the score that counts."""
        return next(iter(self.scores.items()))

    @property
    def headlines(self) -> dict[str, Score]:
        """The score that counts; for depths once for each number of blocks, whose names end with _lin."""
        family = self.main[0].partition("_lin")[0]
        same = {name: score for name, score in self.scores.items() if name.partition("_lin")[0] == family}
        return same if "_lin" in self.main[0] else dict([self.main])

    @cached_property
    def outcomes(self) -> dict[str, NDArray[Any]]:
        """By score, what each image adds to it; empty where that was not kept."""
        return read_arrays(self.path.with_name(OUTCOMES))

    @cached_property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """What figures are drawn from, by name."""
        return read_arrays(self.path.with_name(ARRAYS))

    @property
    def bad(self) -> dict[str, str]:
        """Images that could not be read, with the reasons."""
        return dict(self.data.get("bad") or {})

    @property
    def images(self) -> int:
        """Test images on which the scores stand."""
        main = self.outcomes.get(self.main[0])
        return int(self.data["test"]) if main is None else len(main)

    @property
    def run(self) -> Path | None:
        """The run directory that the weights are of, where the results lie in it."""
        folder = self.path.parent
        inside = re.fullmatch(r"step_\d+", folder.name) and folder.parent.parent.name == "eval"
        return folder.parents[2] if inside else None

    @property
    def finished(self) -> str:
        return str(self.content.get("finished", ""))

    @property
    def seconds(self) -> float:
        return float(self.content.get("seconds", 0.0))


def read_evaluation(path: Path) -> Evaluation:
    """Raises ConfigError where the file is none of ours."""
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as results of dinoreg-eval: {error}") from error
    known: dict[str, Any] = content if isinstance(content, dict) else {}
    data: Any = known.get("data") or {}
    lacking = [key for key in NEEDED if not known.get(key)] + [
        f"data.{key}" for key in ("name", "test") if key not in data
    ]
    if lacking:
        raise ConfigError(f"{path} is no result of dinoreg-eval: it has no {lacking[0]}")
    try:
        found = Evaluation(path, known)
        assert found.scores  # parses them
    except TypeError as error:
        raise ConfigError(f"{path} holds scores that are none of dinoreg-eval: {error}") from error
    return found


def find_evaluations(place: Path) -> list[Evaluation]:
    """All results in a file, a folder or a run directory, in the order of the suites and steps. Raises ConfigError."""
    if not place.exists():
        raise ConfigError(f"no such file or folder: {place}")
    if place.is_file():
        return [read_evaluation(place)]
    # A run directory holds thousands of other files; its results are in eval/.
    inside = place / "eval" if (place / "config.yaml").is_file() and (place / "eval").is_dir() else place
    paths = sorted(_results_in(inside))
    if not paths:
        raise ConfigError(f"no {FILE} in {place}: dinoreg-eval SUITE --weights ... --output {place} writes one")
    return sorted(map(read_evaluation, paths), key=order)


def find_scores(place: Path) -> list[Evaluation]:
    """Those of suites that say how good a network is. Raises ConfigError where there are none."""
    found = [each for each in find_evaluations(place) if each.suite not in EXPERIMENTS]
    if not found:
        raise ConfigError(
            f"{place} holds experiments alone, which have no scores to compare: dinoreg-eval report shows them"
        )
    return found


def _results_in(folder: Path) -> Iterator[Path]:
    return folder.rglob(FILE)


def order(evaluation: Evaluation) -> tuple[int, int, str]:
    """As the suites are listed, then by step."""
    names = list(SUITES)
    place = names.index(evaluation.suite) if evaluation.suite in names else len(names)
    return place, evaluation.step or -1, str(evaluation.path)


def by_checkpoint(found: Iterable[Evaluation]) -> dict[str, list[Evaluation]]:
    """The results by the weights' hash, the newest step first, and of the same step the one that finished last."""
    groups: dict[str, list[Evaluation]] = {}
    for each in found:
        groups.setdefault(each.digest, []).append(each)
    newest = sorted(groups.items(), key=lambda item: _age(item[1]), reverse=True)
    return dict(newest)


def _age(group: Sequence[Evaluation]) -> tuple[int, str]:
    return max(each.step or -1 for each in group), max(each.finished for each in group)


def name_of(group: Sequence[Evaluation]) -> str:
    """What a checkpoint is called: its run and step, or its file."""
    first = group[0]
    if first.run is not None:
        return f"{first.run.name}, step {first.step:,}"
    stem = Path(str(first.content.get("weights") or first.content.get("backbone") or first.digest)).name
    return stem.removesuffix(".safetensors").removesuffix(".pth")
