"""The register that is longest where the last block begins, and whether it says anything of the image (figure 2b)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.parallel.mesh import Ranks

TOP = 100  # dimensions that are drawn
FEW = 3  # dimensions of which is said how much of the squared length is in them


class RegisterSums:
    """Sums over images of the registers as they enter the last block, and of how it reads them, after its norm."""

    def __init__(self, registers: int, dim: int, device: torch.device | str) -> None:
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        self._norms, self._largest = (torch.zeros(registers, dtype=torch.float64, device=device) for _ in range(2))
        # Of vectors of length 1, and of squares; before and after the norm.
        self._units, self._squares = (
            torch.zeros(2, registers, dim, dtype=torch.float64, device=device) for _ in range(2)
        )

    def add(self, registers: Tensor, read: Tensor) -> None:
        """Both (B, R, D)."""
        if not registers.shape[1]:
            return
        norms = registers.double().norm(dim=-1)
        self._count += len(registers)
        self._norms += norms.sum(0)
        self._largest += F.one_hot(norms.argmax(1), norms.shape[1]).sum(0)
        for at, each in enumerate((registers.double(), read.double())):
            self._units[at] += F.normalize(each, dim=-1).sum(0)
            self._squares[at] += each.square().sum(0)

    def reduce(self, ranks: Ranks) -> None:
        """Those of all ranks, on each."""
        for tensor in (self._count, self._norms, self._largest, self._units, self._squares):
            ranks.sum_(tensor)

    def told(self) -> dict[str, Any] | None:
        """None without registers. norms: means; largest: shares of images in which each is the longest; index: of the
        longest on average; over_second: how many times the mean norm of the next, None where that is 0; cosine: before
        and after the norm, by register, the mean over all pairs of images; few: share of the index's squared length in
        FEW dimensions.
        """
        if not len(self._norms) or not self._count:
            return None
        norms = self._norms / self._count
        index = int(norms.argmax())
        second = norms.topk(2).values[1] if len(norms) > 1 else None
        strongest = self._squares[:, index].sort(dim=-1, descending=True).values
        few = [float(each[:FEW].sum() / each.sum()) if each.any() else None for each in strongest]
        return {
            "norms": norms.tolist(),
            "largest": (self._largest / self._count).tolist(),
            "index": index,
            "over_second": float(norms[index] / second) if second else None,
            "cosine": [self._cosines(at) for at in range(2)],
            "few": few,
        }

    def profile(self) -> Tensor:
        """(2, TOP): root mean squares of the longest register's strongest dimensions, before and after the norm."""
        index = int(self._norms.argmax())
        rms = (self._squares[:, index] / self._count).sqrt()
        return rms[:, rms[0].argsort(descending=True)[:TOP]].float().cpu()

    def _cosines(self, at: int) -> list[float | None]:
        pairs = float(self._count * (self._count - 1))
        if not pairs:
            return [None] * len(self._norms)
        return [(float(total.square().sum()) - float(self._count)) / pairs for total in self._units[at]]
