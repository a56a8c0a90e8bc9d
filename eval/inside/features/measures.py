"""What the principal components of patch tokens hold: of each image by itself, and of all images together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dinoreg.models.maps import principal_components

SIGMAS = 3.0  # standard deviations that the paper's colours span
FIRST, FIRST_THREE, BEYOND, SMOOTH, OF_NORM = range(5)  # columns of what is noted of each image


def note(tokens: Tensor, norms: Tensor, grid: tuple[int, int]) -> Tensor:
    """Of each image (B, 5), of its patches' tokens (B, N, D) and their norms before the final norm (B, N).

    Shares of the variance that the first component and the first three hold; share of the patches on which the first
    is beyond +-3 standard deviations; correlation of the first between neighbours; share of the first that is linear
    in the norm (its squared correlation).
    """
    found = principal_components(tokens)
    first = found.scores[..., 0]
    columns = [
        found.shares[..., 0],
        found.shares.sum(-1),
        (first.abs() > SIGMAS).double().mean(-1),
        neighbour_correlation(first.unflatten(-1, grid)),
        correlation(first, norms.double()) ** 2,
    ]
    return torch.stack(columns, dim=-1)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, over the last axis; 0 where one of them is constant."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    scale = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where(scale > 0, (a * b).sum(-1) / scale.clamp(min=1e-300), 0.0)


def neighbour_correlation(maps: Tensor) -> Tensor:
    """Of the two patches of each pair side by side or above one another: (B, h, w) -> (B,)."""
    left = torch.cat([maps[:, :, :-1].flatten(1), maps[:, :-1].flatten(1)], dim=1)
    right = torch.cat([maps[:, :, 1:].flatten(1), maps[:, 1:].flatten(1)], dim=1)
    return correlation(left, right)


@dataclass
class Moments:
    """Sums over tokens, fp64, from which the components of any number of images follow.

    count: (); total: (D,); products: (D, D); of the tokens at each place of the grid, places: (N, D), and in each bin
    of norms, bins: (K, D); how many are in each bin, filled: (K,). Each place has the same number.
    """

    count: Tensor
    total: Tensor
    products: Tensor
    places: Tensor
    bins: Tensor
    filled: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.count, self.total, self.products, self.places, self.bins, self.filled]

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)))


def moments_of(tokens: Tensor, norm_bins: Tensor, count: int) -> Moments:
    """Of a batch (B, N, D). norm_bins: int64 (B, N), which of `count` bins each token's norm is in."""
    x = tokens.double()
    flat, which = x.flatten(0, 1), norm_bins.flatten()
    return Moments(
        x.new_tensor(float(len(flat))),
        flat.sum(0),
        flat.T @ flat,
        x.sum(0),
        x.new_zeros(count, x.shape[-1]).index_add_(0, which, flat),
        torch.bincount(which, minlength=count).double(),
    )


class Joint(NamedTuple):
    """Components of the tokens of all images together. shares: of the variance, each component's, largest first (D,).

    of_place, of_norm: share of the first component's variance that is between places of the grid, and between norms,
    whatever the relation is; corrected for what chance gives to so many groups.
    """

    shares: Tensor
    of_place: float
    of_norm: float


def joint_components(moments: Moments) -> Joint:
    """From sums over all images."""
    n, mean = float(moments.count), moments.total / moments.count
    covariance = moments.products / n - mean[:, None] * mean
    strengths, directions = torch.linalg.eigh(covariance)
    strengths = strengths.flip(-1).clamp(min=0)
    variance = float(strengths[0])
    first = directions[:, -1]
    each_place = moments.count.new_full((len(moments.places),), n / len(moments.places))
    shares = [
        _between(sums @ first, sizes, float(mean @ first), variance)
        for sums, sizes in ((moments.places, each_place), (moments.bins, moments.filled))
    ]
    return Joint(strengths / strengths.sum().clamp(min=1e-300), *shares)


def _between(sums: Tensor, sizes: Tensor, mean: float, variance: float) -> float:
    """Share of a variance that lies between groups (adjusted R squared): their sums (K,), and sizes (K,)."""
    there = sizes > 0
    sums, sizes = sums[there], sizes[there]
    n, groups = float(sizes.sum()), len(sizes)
    if variance <= 0 or n <= groups:
        return 0.0
    between = float((sizes * (sums / sizes - mean) ** 2).sum()) / n
    return max(0.0, 1 - (1 - between / variance) * (n - 1) / (n - groups))
