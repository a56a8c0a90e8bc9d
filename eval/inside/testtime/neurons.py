"""Which neurons make patches outliers: those that fire most on them in the blocks up to where they appear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from eval.backbone import Backbone
from eval.inside.artifacts.norms import finite
from eval.inside.intervene import Edits, onward

RISEN = 0.5  # of the way to its height at the block where outliers are told


def leaving_norms(backbone: Backbone, images: Tensor, block: int) -> Tensor:
    """L2 norms (B, N), fp32, of the patches as they leave a block, before any norm layer.

    Raises ConfigError where they are no numbers.
    """
    tokens = backbone.layers(images, [block], norm=False)[0].patches
    return finite(tokens.float().norm(dim=-1))


@dataclass
class Tally:
    """Sums over the patches that are outliers (first) and over all others, in fp64.

    activation: (2, L, H), of |hidden activation| of each neuron; norm: (2, L + 1), as a patch enters each block and
    leaves the last; patches: (2,), how many.
    """

    activation: Tensor
    norm: Tensor
    patches: Tensor

    @property
    def mean_activation(self) -> Tensor:
        """(2, L, H); not a number where there are no such patches."""
        return self.activation / self.patches[:, None, None]

    @property
    def mean_norm(self) -> Tensor:
        """(2, L + 1), likewise."""
        return self.norm / self.patches[:, None]


def tally(backbone: Backbone, images: Tensor, outliers: Tensor) -> Tally:
    """images (B, C, H, W); outliers bool (B, N)."""
    model = backbone.model
    first = 1 + backbone.num_registers
    which = torch.stack([outliers, ~outliers]).flatten(1).float()  # (2, B N)
    sums: dict[int, Tensor] = {}

    def noting(block: int, hidden: Tensor) -> Tensor:
        sums[block] = _summed(which, hidden[:, first:].flatten(0, 1).abs())
        return hidden

    edits = Edits(hidden={block: partial(noting, block) for block in range(model.depth)})
    x, packing, _ = model.embed([images])
    norms = [
        _summed(which, packing.split(tokens)[0][:, first:].float().norm(dim=-1).flatten())
        for tokens, packing in onward(model, x, packing, edits)
    ]
    activation = torch.stack([sums[block] for block in range(model.depth)], dim=1)
    return Tally(activation.double(), torch.stack(norms, dim=1).double(), which.double().sum(1))


def _summed(which: Tensor, values: Tensor) -> Tensor:
    """which (2, n) @ values (n, ...) in fp32, also inside of the network's lower precision."""
    with torch.autocast(values.device.type, enabled=False):
        return which @ values.float()


def onset(norm: Tensor, detect: int) -> int:
    """The block in which outliers rise: after it they are at least half as far above the others as after `detect`.

    norm: (2, L + 1), mean norms of outliers and of the others, as of `Tally`.
    """
    above = (norm[0] / norm[1] - 1)[1 : detect + 2]  # after each block
    return int((above >= RISEN * above[-1]).double().argmax())


def strongest(activation: Tensor, top_layer: int, top_k: int) -> list[tuple[int, int]]:
    """The `top_k` (block, neuron) with the highest mean |activation| on outliers, in blocks up to `top_layer`.

    activation: (L, H). Ties go to the earlier one.
    """
    counted = activation[: top_layer + 1]
    order = counted.flatten().argsort(descending=True, stable=True)[:top_k].tolist()
    return [divmod(at, counted.shape[1]) for at in order]


def others_alike(neurons: Sequence[tuple[int, int]], width: int, seed: int = 0) -> list[tuple[int, int]]:
    """As many neurons of the same blocks, drawn at random among the other ones: what moving any would do."""
    rng = np.random.default_rng(seed)
    drawn = []
    for block in dict.fromkeys(block for block, _ in neurons):
        taken = [neuron for at, neuron in neurons if at == block]
        free = np.setdiff1d(np.arange(width), taken)
        count = min(len(taken), len(free))
        drawn += [(block, int(neuron)) for neuron in rng.choice(free, count, replace=False)]
    return drawn
