"""Checkpoints of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CheckpointConfig:
    """When to save, and how many to keep."""

    every: int = 1000  # steps
    keep: int = 3  # resumable checkpoints kept; the teacher files are all kept
