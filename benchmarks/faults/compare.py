"""What became of a run: its files, and how they compare with those of another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.faults.lab import FINAL, STEPS, Run


def lines_of(run_dir: Path) -> list[dict[str, float]]:
    """metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def learnt(run_dir: Path) -> dict[int, dict[str, float]]:
    """Losses and gradient norms by step."""
    return {
        int(line["step"]): {name: value for name, value in line.items() if name.startswith(("loss/", "grad_norm/"))}
        for line in lines_of(run_dir)
    }


def teacher_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """The last one; nothing where there is none."""
    path = run_dir / "teacher" / f"step_{STEPS:08d}.safetensors"
    return load_file(path) if path.exists() else {}


def saved_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that have their final name."""
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*") if FINAL.fullmatch(path.name))


def difference(found: Path, expected: Path, tolerance: float = 0.0) -> str:
    """Where two finished runs differ first, in words; empty where they are the same, for tolerance 0 bit for bit.

    Compared are all losses and gradient norms of all steps, that there is one line a step, and the last teacher.
    """
    steps = [int(line["step"]) for line in lines_of(found)]
    if steps != list(range(1, STEPS + 1)):
        return f"metrics.jsonl has steps {steps}"
    ours, theirs = learnt(found), learnt(expected)
    for step, numbers in theirs.items():
        for name, value in numbers.items():
            if not _close(ours[step].get(name), value, tolerance):
                return f"{name} of step {step} is {ours[step].get(name)}, not {value}"
    other = teacher_of(expected)
    if not (mine := teacher_of(found)):
        return "there is no last teacher"
    for name, tensor in other.items():
        # The gradient of the keys' bias is rounding alone, which AdamW makes as large as any other: hence 10 x.
        same = torch.allclose(mine[name], tensor, rtol=0, atol=10 * tolerance)
        if not same:
            return f"teacher {name} differs by {(mine[name] - tensor).abs().max():.2g}"
    return ""


def _close(found: float | None, expected: float, tolerance: float) -> bool:
    if found is None or isinstance(found, str) or isinstance(expected, str):
        return found == expected
    return abs(found - expected) <= tolerance * max(1.0, abs(expected))


def same(found: Path, expected: Path) -> tuple[str, bool]:
    """How two finished runs compare bit for bit: a phrase, and whether they are equal."""
    other = difference(found, expected)
    if other:
        return f"differs: {other}", False
    return f"{STEPS} steps and teacher bitwise equal", True


def one_line(run: Run, rank: int = 0) -> bool:
    """Whether a rank gave up with one line of its own, not with a traceback."""
    return bool(run.last_words(rank)) and "Traceback" not in run.said(rank)


def brief(text: str, width: int = 160, **places: Path) -> str:
    """A message, cut to what fits a table; a long path is shown by the name given here."""
    for name, path in places.items():
        text = text.replace(str(path), name)
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def went_on_from(run: Run) -> int:
    """The step that a start went on from, by the first step that it logged."""
    return min(run.logged(), default=STEPS + 1) - 1


def contents(folder: Path, leave_out: Sequence[str] = ()) -> dict[str, bytes]:
    """Every file below a folder by its relative name."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(tuple(leave_out))}
