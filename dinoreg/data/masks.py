"""Block masks for the masked-image objective (iBOT), with exact counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class MaskConfig:
    """Which global crops are masked, and how much of each."""

    probability: float = 0.5  # share of the global crops that get a mask
    ratio: tuple[float, float] = (0.1, 0.5)  # share of patches masked, spread evenly over the masked crops
    min_block: int = 4  # patches in the smallest block
    min_aspect: float = 0.3  # blocks have aspect in [min_aspect, 1 / min_aspect]
