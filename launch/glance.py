"""How a run is, from the files in its directory alone: no job and no GPU is asked."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.evaluations import main_scores

TAIL = 1 << 20  # bytes of metrics.jsonl that are looked at: thousands of steps
SCORES = {"knn/top1": "k-NN"}  # what is worth a column, and its short name


@dataclass(frozen=True)
class Glance:
    """What a run has done. Where something is not known, it is None."""

    step: int = 0
    total: int | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None  # at the latest pace
    checkpoint: int = 0
    score: str | None = None

    @property
    def finished(self) -> bool:
        return self.total is not None and self.checkpoint >= self.total


def glance(run_dir: Path) -> Glance:
    """Read what a run has written so far; nothing of it need be there."""
    train = _train_section(run_dir)
    records = _records(run_dir / "metrics.jsonl")
    latest = {name: value for record in records for name, value in record.items()}
    step, checkpoint = int(latest.get("step", 0)), newest_checkpoint(run_dir)
    total = _total(train, latest)
    pace = latest.get("throughput/images_per_second")
    left = (total - step) * train["batch_size"] / pace if total and pace and math.isfinite(pace) else None
    return Glance(max(step, checkpoint), total, pace, left, checkpoint, _score(run_dir, records))


def _score(run_dir: Path, records: list[dict[str, float]]) -> str | None:
    """The latest, of the run itself or of an evaluation; of a suite the one that counts most."""
    found = [
        (record["step"], f"{label} {record[name]:.1%}")
        for record in records
        for name, label in SCORES.items()
        if name in record and "step" in record
    ]
    found += [(score.step, f"{score.suite} {score}") for score in main_scores(run_dir)]
    return max(enumerate(found), key=lambda each: (each[1][0], each[0]))[1][1] if found else None


def newest_checkpoint(run_dir: Path) -> int:
    """The step of the newest whole checkpoint; 0 without one."""
    names = [re.fullmatch(r"step_(\d{8,})", path.name) for path in (run_dir / "checkpoints").glob("step_*")]
    return max((int(name.group(1)) for name in names if name), default=0)


def _train_section(run_dir: Path) -> dict[str, Any]:
    """`train:` of the resolved recipe: of the run, or of the launch where it has not begun."""
    for name in ("config.yaml", "launch.yaml"):
        if (run_dir / name).is_file():
            return dict(yaml.safe_load((run_dir / name).read_text(encoding="utf-8"))["train"])
    return {"batch_size": 1}


def _total(train: dict[str, Any], latest: dict[str, float]) -> int | None:
    """Steps of the whole run. How long an epoch is, only the run itself knows, and says with each reading."""
    batch = train["batch_size"]
    if train.get("steps"):
        return int(train["steps"])
    images = train.get("images")
    if train.get("epochs") and latest.get("epoch"):
        images = train["epochs"] * latest["images"] / latest["epoch"]
    return max(1, math.ceil(images / batch - 1e-6)) if images else None


def _records(path: Path) -> list[dict[str, float]]:
    """The last readings; a line that is being written is left out."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = file.read().decode(errors="replace").splitlines()
    return [{name: float(value) for name, value in record.items()} for line in lines if (record := _parsed(line))]


def _parsed(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return record if isinstance(record, dict) else {}
