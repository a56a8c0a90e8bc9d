"""Linear CKA of representations that are never held: from sums over images, however many there are.

CKA (Kornblith et al. 2019; equation 4 of Lappe and Giese 2025) is ||X'Y||² / (||X'X|| ||Y'Y||) with columns centred:
D x D matrices instead of n x n ones. Its debiased form has the unbiased HSIC of Song et al. (2012, equation 5), which
leaves out the diagonals of the n x n kernels: for linear kernels these are the squared row norms, and what is left out
are sums over them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from dinoreg.parallel.mesh import Ranks

FOLDS = 8  # of the images, each of which is left out once, for the interval
T = 2.364624  # standard errors, of Student's distribution with FOLDS - 1 degrees of freedom, that hold 95 %
CONSTANT = 1e-12  # of its squared length: what varies less is the rounding of fp32 (6e-8)


@dataclass(frozen=True)
class Cka:
    """plain: with columns centred; debiased: its bias towards 1 removed, may be negative; floor: the mean of the plain
    one over all ways to pair images at random. None where one of the two does not vary.
    """

    plain: float | None
    debiased: float | None
    floor: float | None


class Moments:
    """Sums over images of representations that are themselves sums of parts.

    mixtures: name of a representation -> the parts that it is the sum of. What is held is D x D for each pair of parts,
    in fp64 on the device. about: (P, D), roughly the means of the parts, the same on all ranks; it is subtracted, which
    changes no CKA, and without it a mean that is a million times larger than what varies would leave only rounding.
    """

    def __init__(self, parts: Sequence[str], mixtures: Mapping[str, Sequence[str]], about: Tensor) -> None:
        self.parts, self.names = list(parts), list(mixtures)
        self.about, device, dim = about.double(), about.device, about.shape[-1]
        self._mixed = [{self.parts.index(part) for part in mixture} for mixture in mixtures.values()]
        made = [[float(part in mixture) for part in parts] for mixture in mixtures.values()]
        self.mixing = torch.tensor(made, dtype=torch.float64, device=device)
        count = len(self.names)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self._pairs = list(combinations_with_replacement(range(len(self.parts)), 2))
        self._blocks = zeros(len(self._pairs), dim, dim)
        self._rows = zeros(1)[0]
        self._sums = zeros(count, dim)
        self._squares = zeros(count)  # of row norms
        self._lengths = zeros(count)  # the same, with nothing subtracted
        self._products = zeros(count, count)  # of squared row norms of two representations
        self._levers = zeros(count, count, dim)  # rows of one times squared row norms of the other

    @staticmethod
    def bytes(parts: int, dim: int) -> int:
        """About what one takes."""
        return 8 * dim**2 * parts * (parts + 1) // 2

    @property
    def count(self) -> int:
        """Images."""
        return int(self._rows)

    def add(self, parts: Tensor) -> None:
        """parts: (B, P, D)."""
        self._lengths += torch.einsum("gp,bpd->bgd", self.mixing, parts.double()).square().sum((0, 2))
        rows = parts.double() - self.about
        for block, (p, q) in zip(self._blocks, self._pairs, strict=True):
            block.addmm_(rows[:, p].T, rows[:, q])
        mixed = torch.einsum("gp,bpd->bgd", self.mixing, rows)
        squares = mixed.square().sum(-1)
        self._rows += len(rows)
        self._sums += mixed.sum(0)
        self._squares += squares.sum(0)
        self._products += squares.T @ squares
        self._levers += torch.einsum("bgd,bh->ghd", mixed, squares)

    def plus(self, other: Moments, sign: int = 1) -> Moments:
        """Of the images of both; sign -1: of these without the others'."""
        new = Moments.__new__(Moments)
        new.__dict__.update(self.__dict__)
        for name, mine in self._state().items():
            setattr(new, name, torch.add(mine, other._state()[name], alpha=sign))
        return new

    def reduce(self, ranks: Ranks) -> None:
        """Those of all ranks, on each."""
        for tensor in self._state().values():
            ranks.sum_(tensor)

    def cka(self, one: str, other: str) -> Cka:
        """Of two representations by name."""
        x, y = self.names.index(one), self.names.index(other)
        if self.count < 2 or not (self._varies(x) and self._varies(y)):
            return Cka(None, None, None)
        (both, hsic), (first, hsic_x), (second, hsic_y) = (self._alike(*pair) for pair in ((x, y), (x, x), (y, y)))
        length = math.sqrt(first * second)
        floor = float(self._trace(x) * self._trace(y)) / ((self.count - 1) * length)
        debiased = hsic / math.sqrt(hsic_x * hsic_y) if self.count > 3 and min(hsic_x, hsic_y) > 0 else None
        return Cka(both / length, debiased, floor)

    def _state(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if name.startswith("_") and isinstance(value, Tensor)}

    def _cross(self, x: int, y: int) -> Tensor:
        """X'Y (D, D), of the parts that the two are made of."""
        found = torch.zeros_like(self._blocks[0])
        mine, others = self._mixed[x], self._mixed[y]
        for block, (p, q) in zip(self._blocks, self._pairs, strict=True):
            if p in mine and q in others:
                found += block
            if p != q and q in mine and p in others:
                found += block.T
        return found

    def _alike(self, x: int, y: int) -> tuple[float, float]:
        """||X'Y||² with columns centred, and n (n - 3) times the unbiased HSIC, 0 for fewer than four images."""
        cross = self._cross(x, y)
        hsic = self._hsic(x, y, cross) if self.count > 3 else 0.0
        cross.addr_(self._sums[x], self._sums[y], alpha=-1 / float(self._rows))
        return float(cross.square().sum()), hsic

    def _trace(self, x: int) -> Tensor:
        """Summed squared distances from the mean."""
        return self._squares[x] - self._sums[x].square().sum() / self._rows

    def _varies(self, x: int) -> bool:
        return bool(self._trace(x) > CONSTANT * self._lengths[x])

    def _hsic(self, x: int, y: int, cross: Tensor) -> float:
        """Kernels K = XX', L = YY' are without their diagonals k, l, of row norms:

        tr(KL) + 1'K1 1'L1 / ((n - 1)(n - 2)) - 2 1'KL1 / (n - 2), where, with s = X'1 and t = Y'1,
        tr(KL) = ||X'Y||² - k'l; 1'K1 = s's - 1'k; 1'KL1 = s'X'Yt - s'X'l - t'Y'k + k'l. cross: X'Y.
        """
        s, t, n, both = self._sums[x], self._sums[y], self._rows, self._products[x, y]
        trace = cross.square().sum() - both
        totals = (s.square().sum() - self._squares[x]) * (t.square().sum() - self._squares[y])
        chain = s @ cross @ t - s @ self._levers[x, y] - t @ self._levers[y, x] + both
        return float(trace + totals / ((n - 1) * (n - 2)) - 2 * chain / (n - 2))


Intervals = dict[str, tuple[float, float] | None]


def jackknife(folds: Sequence[Moments], pairs: Mapping[str, tuple[str, str]]) -> dict[str, Intervals]:
    """Where `plain` and `debiased` CKA of each pair lie with 95 %, were there other images.

    By how they move when each fold is left out; None where one is undefined for any of them, and for too few images
    to have some in each fold.
    """
    if not all(fold.count for fold in folds):
        return {name: {"plain": None, "debiased": None} for name in pairs}
    everything = total(folds)
    left: dict[str, list[Cka]] = {name: [] for name in pairs}
    for fold in folds:
        others = everything.plus(fold, -1)
        for name, pair in pairs.items():
            left[name].append(others.cka(*pair))
    return {
        name: {
            "plain": _interval(everything.cka(*pair).plain, [each.plain for each in left[name]], 0),
            "debiased": _interval(everything.cka(*pair).debiased, [each.debiased for each in left[name]], -1),
        }
        for name, pair in pairs.items()
    }


def _interval(value: float | None, left: Sequence[float | None], least: float) -> tuple[float, float] | None:
    """least: what it can be; the most is 1."""
    known = [each for each in left if each is not None]
    if value is None or len(known) < len(left):
        return None
    spread = torch.tensor(known, dtype=torch.float64).var(correction=0) * (len(left) - 1)
    half = T * math.sqrt(float(spread))
    return max(least, value - half), max(value, min(1.0, value + half))  # 1 may be 1.0000001


def total(folds: Sequence[Moments]) -> Moments:
    """Of the images of all folds."""
    everything = folds[0]
    for fold in folds[1:]:
        everything = everything.plus(fold)
    return everything
