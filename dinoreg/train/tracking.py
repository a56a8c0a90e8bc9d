"""metrics.jsonl always, wandb when there is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    wandb: Literal["online", "offline", "disabled"] = "disabled"
    project: str = "dinoreg"
    name: str | None = None  # default: the run directory's name
    pictures_every: int = 1000  # steps between pictures of crops and attention; 0 for none
