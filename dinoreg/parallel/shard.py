"""Where the model meets the machine: activation checkpointing, then compile, then FSDP2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class EfficiencyConfig:
    """Options that change speed and memory, never results (beyond rounding)."""

    shard: Literal["full", "hybrid", "none"] = "full"  # hybrid: shard within a node, replicate across nodes
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False  # torch.compile each block
    attention: Literal["auto", "xformers", "varlen", "sdpa"] = "auto"
