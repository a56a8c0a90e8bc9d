"""Tokens drawn at random, the same ones whatever the batches and the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

PRIME = 1_000_003  # so that two seeds and two images have no generator in common


def generator_of(seed: int, place: int) -> torch.Generator:
    """For what is drawn for one image."""
    return torch.Generator().manual_seed(seed * PRIME + place)


def draw_some(among: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """At most so many different places where `among` (N,) is true, on the host: int64."""
    places = among.nonzero()[:, 0]
    return places[torch.randperm(len(places), generator=generator)[:most]]


def draw_each(among: Tensor, times: int, generator: torch.Generator) -> Tensor:
    """So many places where `among` (N,) is true, each drawn from all of them: int64 (times,). There must be one."""
    places = among.nonzero()[:, 0]
    return places[torch.randint(len(places), (times,), generator=generator)]
