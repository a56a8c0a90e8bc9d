"""What a run leaves behind when it gives up: enough to do the step again and see where it broke.

faults/step_00000123/fault.json          the steps that were skipped in a row: images of each rank, losses and norms
faults/step_00000123/config.yaml         the run
faults/step_00000123/checkpoints/        the state before the first of them, since a skipped step changes nothing
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinoreg.config import to_yaml
from dinoreg.parallel.mesh import Ranks
from dinoreg.train.recipe import RunConfig

FAULT = "fault.json"


@dataclass(frozen=True)
class Trace:
    """What is remembered of a step until it is known to have been sound. metrics: device scalars of this rank."""

    step: int
    keys: list[tuple[str, str]]
    metrics: dict[str, Tensor]


class Recent:
    """The traces of the latest steps; as many as can have passed before the host reads the counters."""

    def __init__(self, cfg: RunConfig, ranks: Ranks) -> None:
        self.cfg, self.ranks = cfg, ranks
        self._traces: deque[Trace] = deque(maxlen=cfg.train.max_skipped + cfg.train.log_every)

    def append(self, trace: Trace) -> None:
        self._traces.append(trace)

    def leave(self, run_dir: Path, in_row: int) -> Path:
        """Write down the latest `in_row` steps, which were skipped; every rank must call. The folder it lies in."""
        traces = list(self._traces)[-in_row:]
        mine = [(trace.keys, _numbers(trace.metrics)) for trace in traces]
        everyone = self.ranks.gather_objects(mine)
        folder = run_dir / "faults" / f"step_{traces[0].step:08d}"
        if self.ranks.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(to_yaml(self.cfg))
            steps = [
                {"step": trace.step, "ranks": [_of_rank(*rank[place]) for rank in everyone]}
                for place, trace in enumerate(traces)
            ]
            fault = {"seed": self.cfg.seed, "world": self.ranks.world, "steps": steps}
            (folder / FAULT).write_text(json.dumps(fault, indent=1))
        return folder


def _numbers(metrics: dict[str, Tensor]) -> dict[str, str | float]:
    """On the host, once; JSON has no NaN, so what is not finite becomes the text that float() reads."""
    values = torch.stack([value.detach().float() for value in metrics.values()]).tolist()
    finite = torch.tensor(values).isfinite().tolist()
    return {name: value if fine else str(value) for name, value, fine in zip(metrics, values, finite, strict=True)}


def _of_rank(keys: list[tuple[str, str]], numbers: dict[str, str | float]) -> dict[str, Any]:
    return {"images": [f"{source} {key}" for source, key in keys], "metrics": numbers}
