"""What a suite found: figures with their intervals, how and on what they were measured, in one JSON file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import dinoreg
from dinoreg.config import ConfigError
from dinoreg.models.files import naming_a_full_disk
from eval.backbone import Backbone

FILE = "results.json"
ARRAYS = "arrays.npz"  # what figures are drawn from
OUTCOMES = "outcomes.npz"  # what each image adds to the scores, from which two results are compared image by image


@dataclass(frozen=True)
class Score:
    """A figure, and the interval in which it lies with 95 %, were there other images: a bootstrap's, or Wilson's.

    per_image: (n,), whose mean the figure is; or areas (n, 3, C) as of `dense.metrics.areas`, whose mean IoU in percent
    it is. In the order of the test images.
    """

    value: float
    low: float
    high: float
    unit: str = "%"
    better: str = "higher"  # or lower
    per_image: Tensor | None = field(default=None, repr=False, compare=False)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"value": self.value, "low": self.low, "high": self.high, "unit": self.unit, "better": self.better}

    def texts(self) -> tuple[str, str]:
        """The value and the interval, for people."""
        digits = 1 if self.unit == "%" else 3
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.value:.{digits}f}{unit}", f"{self.low:.{digits}f} to {self.high:.{digits}f}"


@dataclass
class Result:
    """The outcome of one suite.

    scores: by name; the first is the one that counts. protocol: all that was chosen, resolved, in plain JSON values.
    data: name, hash, train and test (numbers of images), bad (images left out, with reasons). notes: sentences that a
    reader of the figures must know. details: anything else in plain JSON values (scores by class, by learning rate,
    ...). arrays: numbers too many for JSON, by name. files: what the suite wrote into its output folder for the report,
    by name, relative to the folder.
    """

    suite: str
    scores: dict[str, Score]
    protocol: dict[str, Any]
    data: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


def write_result(folder: Path, result: Result, backbone: Backbone, weights: str | Path, seconds: float) -> Path:
    """Write folder/results.json, which appears only when it is complete. weights: as the user named them."""
    per_image = {name: score.per_image for name, score in result.scores.items()}
    outcomes: dict[str, Any] = {name: values.numpy() for name, values in per_image.items() if values is not None}
    for name, arrays in ((OUTCOMES, outcomes), (ARRAYS, result.arrays)):
        if arrays:
            _write_arrays(folder / name, arrays)
            result.files[Path(name).stem] = name
    content = {
        "suite": result.suite,
        "weights": str(weights),
        "backbone": backbone.name,
        "digest": backbone.digest,
        "found": backbone.found,
        "architecture": {
            "embed_dim": backbone.embed_dim,
            "depth": backbone.depth,
            "patch_size": backbone.patch_size,
            "registers": backbone.num_registers,
            "image_size": backbone.image_size,
        },
        "step": backbone.step,
        "scores": {name: score.plain() for name, score in result.scores.items()},
        "protocol": result.protocol,
        "data": result.data,
        "notes": result.notes,
        "details": result.details,
        "files": result.files,
        "seconds": round(seconds, 2),
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    return write_json(folder / FILE, content)


def _write_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    contents: dict[str, Any] = dict(arrays)
    write_atomically(path, lambda file: np.savez_compressed(file, **contents))


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """What lies in an .npz file; nothing where there is none. Raises ConfigError where it is damaged."""
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, EOFError, ValueError, BadZipFile) as error:
        raise ConfigError(f"{path} is damaged ({error}): measure again") from error


def write_json(path: Path, content: Any) -> Path:
    """Readable JSON under its name only when all of it is on the disk."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    return write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """A file that is there when all that `write` writes is on the disk. Raises OSError that names it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with naming_a_full_disk(path), partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave an empty file under the final name
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_scores(content: dict[str, Any]) -> dict[str, Score]:
    """The scores in the content of a results.json."""
    return {name: Score(**score) for name, score in content["scores"].items()}


def commit() -> str | None:
    """Of the checkout that runs, with + where files differ from it; None where it is none."""
    root = Path(dinoreg.__file__).resolve().parents[1]
    snapshot = root / "commit.txt"  # the launcher's copy of the program has no history
    if snapshot.is_file():
        return snapshot.read_text().strip()
    if not (root / ".git").exists():
        return None
    # Somebody else's checkout is only read here, which git refuses unless told.
    command = ["git", "-c", f"safe.directory={root}", "-C", str(root), "describe", "--always", "--abbrev=40"]
    try:
        said = subprocess.run([*command, "--exclude=*", "--dirty=+"], capture_output=True, text=True)
    except OSError:
        return None
    return said.stdout.strip() or None
