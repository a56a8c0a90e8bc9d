"""Histograms of norms: bins of equal ratio, so that one table holds any network's norms in bounded memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PER_OCTAVE = 64  # bins between a norm and twice that norm: each is 1.09 % wide
LOWEST, HIGHEST = -10, 20  # exponents of 2 at the ends; what lies beyond counts in the first or the last bin
BINS = PER_OCTAVE * (HIGHEST - LOWEST)

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


def edges() -> Floats:
    """The norms between bins (BINS + 1,)."""
    return 2.0 ** (LOWEST + np.arange(BINS + 1) / PER_OCTAVE)


def centres() -> Floats:
    """The middle of each bin (BINS,), by ratio."""
    return 2.0 ** (LOWEST + (np.arange(BINS) + 0.5) / PER_OCTAVE)


def to_bins(norms: Tensor) -> Tensor:
    """The bin of each norm, int64, of any shape."""
    return ((norms.float().log2() - LOWEST) * PER_OCTAVE).floor().clamp(0, BINS - 1).long()


def count_rows(places: Tensor, most: int) -> Tensor:
    """How often each of `most` places occurs in each row: int64 (rows, n) -> (rows, most)."""
    rows = torch.arange(len(places), device=places.device)[:, None] * most
    return torch.bincount((places + rows).flatten(), minlength=len(places) * most).view(len(places), most)


def histogram(norms: Tensor) -> Tensor:
    """Norms (rows, n) -> counts int64 (rows, BINS)."""
    return count_rows(to_bins(norms), BINS)


def quantiles(counts: Counts, shares: list[float]) -> list[float | None]:
    """The norms below which these shares of the tokens lie, within a bin's width; None where there are no tokens."""
    total = counts.sum()
    if not total:
        return [None] * len(shares)
    below, bounds = np.concatenate([[0], counts.cumsum()]) / total, np.log2(edges())
    found: list[float | None] = []
    for share in shares:
        at = min(int(np.searchsorted(below, share, side="right")) - 1, int(np.flatnonzero(counts)[-1]))
        at = max(at, int(np.flatnonzero(counts)[0]))
        inside = (share - below[at]) / (below[at + 1] - below[at]) if counts[at] else 0.0
        found.append(float(2 ** (bounds[at] + min(max(inside, 0.0), 1.0) / PER_OCTAVE)))
    return found


def moments(counts: Counts) -> tuple[float, float]:
    """Mean and standard deviation of the norms, as if each were its bin's centre."""
    middle, total = centres(), counts.sum()
    mean = float((counts * middle).sum() / total)
    return mean, float(math.sqrt((counts * (middle - mean) ** 2).sum() / total))


def share_above(counts: Counts, cutoff: float | None) -> float | None:
    """The share of tokens beyond a cutoff, whose bin is split by ratio; None where there are no tokens."""
    total = counts.sum()
    if not total:
        return None
    if cutoff is None:
        return 0.0
    place = (math.log2(max(cutoff, 2.0**LOWEST)) - LOWEST) * PER_OCTAVE
    at = min(int(place), BINS - 1)
    above: Any = counts[at + 1 :].sum() + counts[at] * (1 - min(place - at, 1.0))
    return float(above / total)
