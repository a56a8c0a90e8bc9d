"""Keeps a run from being poisoned: a step whose loss or gradient is not finite must change nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dinoreg.parallel.mesh import Ranks

# Gradients too: the loss is that of the weights before the update, and finite losses can have infinite gradients.
JUDGED = ("loss/total", "grad_norm/")


class Guard:
    """Judges each step on the device, without waiting for it, and counts those that are skipped.

    After a skipped step weights, optimizer state, teacher and centers are, bit for bit, what they were before it. What
    is a function of the step's number moves on: its images are spent, and so is its place in the schedules.
    """

    def __init__(self, ranks: Ranks, skipped: int = 0) -> None:
        self.ranks = ranks
        self.total = torch.tensor(float(skipped), device=ranks.device)
        self.in_row = torch.zeros((), device=ranks.device)

    def __call__(self, metrics: Mapping[str, Tensor]) -> Tensor:
        """Whether to skip: 1 where the loss or a gradient's norm is not finite on any rank, else 0; alike on all."""
        numbers = [value.detach().float() for name, value in metrics.items() if name.startswith(JUDGED)]
        bad = torch.stack(numbers).isfinite().logical_not().any().float()
        self.ranks.max_(bad)
        self.total += bad
        self.in_row = (self.in_row + 1) * bad
        return bad

    def counts(self) -> dict[str, Tensor]:
        """Device scalars: steps skipped in the whole run, and how many of them in a row until now."""
        return {"skipped/total": self.total, "skipped/in_row": self.in_row}
