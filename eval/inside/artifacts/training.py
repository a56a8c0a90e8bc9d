"""The norms of patches along the training of a run, from the teachers that it left (registers paper, figure 4b)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from eval.inside.artifacts.bins import Counts, quantiles, share_above
from eval.inside.artifacts.clouds import find_cutoff


def find_steps(weights: Path | None, most: int) -> list[tuple[int, Path]]:
    """The teachers of the run that the weights are of, by step: at most so many, evenly; none where there is one."""
    if weights is None:
        return []
    folder = weights / "teacher" if weights.is_dir() else weights.parent
    if folder.name != "teacher":
        return []
    steps = sorted(
        (int(found.group(1)), path)
        for path in folder.glob("step_*.safetensors")
        if (found := re.fullmatch(r"step_(\d+)", path.stem))
    )
    if len(steps) < 2:
        return []
    places = np.unique(np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int))
    return [steps[place] for place in places]


def tell_step(step: int, counts: Counts, cutoff: float | None, rule: str) -> dict[str, Any]:
    """Of one teacher: shares beyond the cutoff of the network looked at, and beyond its own by the same rule."""
    middle, high, most = quantiles(counts, [0.5, 0.999, 1.0])
    own = find_cutoff(counts, rule)
    return {
        "step": step,
        "median": middle,
        "high": high,
        "largest": most,
        "share": share_above(counts, cutoff),
        "own_cutoff": own.value,
        "own_share": share_above(counts, own.value),
    }
