"""Attention edges that are cut, or given something else to read, in some blocks (D2), and registers exchanged (D5).

Zeros are nothing that a network has ever seen, so that a drop after zeroing says little (Parodi et al. 2026, arXiv
2604.14433). Beside each cut stand three replacements that keep what is usual: the mean over images, noise with the same
mean and spread, and the same tokens of another image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dinoreg.models.packing import Packing
from dinoreg.models.vit import VisionTransformer
from eval.inside.artifacts.norms import finite
from eval.inside.intervene import Edits, Groups, Reading, finish, onward

# Name: (who reads, what is read), as fields of `Groups`.
EDGES = {
    "CLS<-PATCH": ("cls", "patches"),
    "CLS<-CLS": ("cls", "cls"),
    "CLS<-REG": ("cls", "registers"),
    "PATCH<-REG": ("patches", "registers"),
}
SWAP = "REG"  # registers themselves are replaced as they enter a block, for all who read them from there on
CUT, ZERO, MEAN, NOISE, SHUFFLE = "cut", "zero", "mean", "noise", "shuffle"
REPLACED = (ZERO, MEAN, NOISE, SHUFFLE)
WAYS = (CUT, *REPLACED)


@dataclass(frozen=True)
class Run:
    """One way of knocking out one edge in the blocks first, ..., last."""

    edge: str
    way: str
    first: int
    last: int

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def plan(depth: int, num_registers: int, layers: Sequence[int], window: int) -> list[Run]:
    """Every edge in every way, in windows of blocks that begin at `layers`, and in all blocks at once."""
    edges = [name for name, (_, read) in EDGES.items() if num_registers or read != "registers"]
    windows = [(layer, min(layer + window, depth) - 1) for layer in layers]
    spans = dict.fromkeys([*windows, (0, depth - 1)])
    runs = [Run(edge, way, *span) for edge in edges for way in WAYS for span in spans]
    if num_registers:
        runs += [Run(SWAP, way, layer, layer) for way in REPLACED for layer in layers]
    return runs


def spread_layers(depth: int, most: int) -> list[int]:
    """At most so many blocks (0 = all), evenly spread from the first to the last."""
    if not 0 < most < depth:
        return list(range(depth))
    if most == 1:
        return [depth - 1]
    return sorted({round(at * (depth - 1) / (most - 1)) for at in range(most)})


@dataclass
class Moments:
    """Sums over images of what enters each block, fp64 (L, T, D), and of its square; count: of images."""

    count: int
    total: Tensor
    square: Tensor

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.square + other.square)

    def usual(self) -> Usual:
        mean = self.total / self.count
        std = (self.square / self.count - mean.square()).clamp(min=0).sqrt()
        return Usual(mean.float(), std.float())


@dataclass
class Usual:
    """Mean and standard deviation over images of each token that enters each block: (L, T, D)."""

    mean: Tensor
    std: Tensor

    def to(self, device: torch.device) -> Usual:
        return Usual(self.mean.to(device), self.std.to(device))


def moments(model: VisionTransformer, images: Tensor) -> Moments:
    """images: (B, C, H, W). Raises ConfigError where tokens are no numbers."""
    x, packing, _ = model.embed([images])
    entering = (packing.split(tokens)[0].double() for tokens, _ in onward(model, x, packing))
    sums = [(finite(tokens.sum(0)).cpu(), tokens.square().sum(0).cpu()) for tokens in entering]
    total, square = (torch.stack(each[:-1]) for each in zip(*sums, strict=True))
    return Moments(len(images), total, square)


@dataclass
class Pass:
    """A batch on its way through the plain network: packed tokens as they enter each block and leave the last."""

    streams: list[Tensor]
    packing: Packing

    @staticmethod
    def of(model: VisionTransformer, images: Tensor) -> Pass:
        x, packing, _ = model.embed([images])
        return Pass([tokens for tokens, _ in onward(model, x, packing)], packing)

    def tokens(self, layer: int) -> Tensor:
        """(B, T, D)."""
        return self.packing.split(self.streams[layer])[0]


def knocked_out(
    model: VisionTransformer, plain: Pass, donors: Pass, usual: Usual, run: Run, places: Tensor
) -> Tensor:  # fmt: skip
    """CLS (B, D) after the final norm. donors: of as many images, whose tokens "shuffle" gives; places: (B,) of images,
    which seed the noise."""
    groups = Groups.of(model.num_registers)

    def instead(layer: int, read: slice) -> Tensor:
        return replacement(run.way, layer, read, donors, usual, places)

    if run.edge == SWAP:
        edits = Edits(stream={run.first: partial(_replace, groups.registers, instead(run.first, groups.registers))})
    else:
        readers, read = (getattr(groups, name) for name in EDGES[run.edge])
        edits = Edits(
            readings={
                layer: [Reading(readers, read, None if run.way == CUT else instead(layer, read))]
                for layer in range(run.first, run.last + 1)
            }
        )
    last = finish(model, plain.streams[run.first], plain.packing, edits, run.first)
    return model.norm(last[:, 0]).float()


def replacement(way: str, layer: int, read: slice, donors: Pass, usual: Usual, places: Tensor) -> Tensor:
    """What stands in place of the tokens `read` that enter a block: (B, K, D), or (K, D) alike for all images."""
    mean = usual.mean[layer, read]
    if way == ZERO:
        return torch.zeros_like(mean)
    if way == MEAN:
        return mean
    if way == SHUFFLE:
        return donors.tokens(layer)[:, read]
    drawn = torch.stack([_noise(int(place), layer, mean) for place in places])
    return mean + usual.std[layer, read] * drawn


def _noise(place: int, layer: int, like: Tensor) -> Tensor:
    """Standard normal numbers that depend on the image and the block alone, not on batches and ranks."""
    generator = torch.Generator(like.device).manual_seed(place * 1009 + layer)
    return torch.randn(like.shape, generator=generator, device=like.device)


def _replace(which: slice, instead: Tensor, tokens: Tensor) -> Tensor:
    changed = tokens.clone()
    changed[:, which] = instead.to(tokens.dtype)
    return changed


def choose_donors(places: Tensor, labels: Tensor | None, own: Tensor, own_labels: Tensor) -> Tensor:
    """For each image the place among the donors of another one, of another class where there are some: int64 (B,).

    places (K,), labels (K,) of the donors, labels None where images have no classes; own, own_labels (B,): the images'.
    """
    chosen = []
    for place, label in zip(own.tolist(), own_labels.tolist(), strict=True):
        others = (places != place).nonzero()[:, 0]
        if labels is not None and len(differing := others[labels[others] != label]):
            others = differing
        chosen.append(int(others[place * 2654435761 % 2**32 % len(others)]))  # Knuth's multiplicative hash
    return torch.tensor(chosen)
