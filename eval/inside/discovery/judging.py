"""Which bias is best, chosen on some of the images and judged on the others, and what all the others would give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.inside.discovery.corloc import corloc
from eval.inside.discovery.rules import CENTRED, MINUS_MEAN, PUBLISHED
from eval.inside.discovery.search import Outcome
from eval.metrics import bootstrap
from eval.results import Score

AT_ZERO, AT_MEAN, AT_CENTRED = 0, -2, -1  # places among the ways to set the bias
LABEL_FREE = {PUBLISHED: AT_ZERO, MINUS_MEAN: AT_MEAN, CENTRED: AT_CENTRED}


@dataclass(frozen=True)
class Choice:
    """A block, a feature and a bias, by their places in what was tried."""

    block: int
    feature: int
    bias: int


@dataclass(frozen=True)
class Verdict:
    """An outcome, and which of its images may be used to choose: tuning, bool (n,)."""

    outcome: Outcome
    tuning: NDArray[np.bool_]

    @property
    def can_choose(self) -> bool:
        """Whether there are images to choose with and others to judge on."""
        return bool(self.tuning.any() and not self.tuning.all())

    def best(self, block: int, feature: int) -> Choice:
        """The best bias of a cell on the tuning images; of equals the first that was tried."""
        counts = self.outcome.right[self.tuning, block, feature, :AT_MEAN].sum(0)
        return Choice(block, feature, int(counts.argmax()))

    def best_of_all(self) -> Choice:
        """Over blocks and features too."""
        counts = self.outcome.right[self.tuning][..., :AT_MEAN].sum(0)
        return Choice(*(int(at) for at in np.unravel_index(counts.argmax(), counts.shape)))

    def right(self, choice: Choice) -> NDArray[np.bool_]:
        """Of all images (n,)."""
        return self.outcome.right[:, choice.block, choice.feature, choice.bias]

    def scores(self) -> dict[str, Score]:
        """Those of the published setting first, the first block and feature that were tried."""
        right = self.outcome.right
        found = {
            "corloc": corloc(right[:, 0, 0, AT_ZERO]),
            "corloc_minus_mean": corloc(right[:, 0, 0, AT_MEAN]),
            "corloc_centred": corloc(right[:, 0, 0, AT_CENTRED]),
        }
        if self.can_choose:
            found["corloc_tuned"] = corloc(self.right(self.best_of_all())[~self.tuning])
        for at, name in enumerate(("floor_whole_image", "floor_middle")):
            found[name] = corloc(self.outcome.floors[:, at])
        return found

    def table(self, blocks: Sequence[int], features: Sequence[str]) -> list[dict[str, Any]]:
        """A row for every block and feature: images in which the box is right, by each way to set the bias."""
        rows = []
        for block, index in enumerate(blocks):
            for feature, name in enumerate(features):
                cell = self.outcome.right[:, block, feature]
                row = {"block": index, "feature": name, "images": len(cell)}
                row |= {rule: int(cell[:, at].sum()) for rule, at in LABEL_FREE.items()}
                if self.can_choose:
                    choice = self.best(block, feature)
                    right = cell[:, choice.bias]
                    row |= {
                        "best": choice.bias,
                        "tuning": [int(right[self.tuning].sum()), int(self.tuning.sum())],
                        "tested": [int(right[~self.tuning].sum()), int((~self.tuning).sum())],
                    }
                rows.append(row)
        return rows


def standing_out(outcome: Outcome, cutoffs: Tensor) -> list[dict[str, Any]]:
    """For each block: how many patches stand out by their norm, and how far their features lie from the image's mean.

    ratio: for each feature, mean distance of those by the mean distance of all others, with its interval; None where
    there are no such patches, or no others.
    """
    found = []
    for block, cutoff in enumerate(cutoffs.tolist()):
        loud, quiet = outcome.loud[:, block], outcome.patches - outcome.loud[:, block]
        ratios: list[dict[str, float] | None] = []
        for apart in np.moveaxis(outcome.apart[:, block], 1, 0):
            sums = torch.from_numpy(np.column_stack([apart, loud, quiet]).astype(np.float64))
            total = sums.sum(0)
            if min(total[2:].min(), total[1]) <= 0:
                ratios.append(None)
                continue
            low, high = bootstrap(sums, _ratio)
            ratios.append({"value": float(_ratio(total[None])), "low": low, "high": high})
        # Where few images have such patches, some draws of images have none.
        finite = [each if each and all(map(math.isfinite, each.values())) else None for each in ratios]
        found.append({"cutoff": cutoff, "patches": int(loud.sum()), "of": int(outcome.patches.sum()),
                      "images": int((loud > 0).sum()), "ratio": finite})  # fmt: skip
    return found


def _ratio(sums: Tensor) -> Tensor:
    """(R, 4): distances of both kinds, numbers of both."""
    return (sums[:, 0] / sums[:, 2]) / (sums[:, 1] / sums[:, 3])


def draw_tuning(count: int, share: float, seed: int) -> NDArray[np.bool_]:
    """Which of the images (count,) are for choosing, always the same."""
    chosen = np.zeros(count, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(count)[: round(count * share)]] = True
    return chosen
