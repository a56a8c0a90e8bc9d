"""Which patches of a network count as outliers, decided before all of its images are looked at."""

from __future__ import annotations

import math

import numpy as np

from eval.images import Part
from eval.inside.artifacts.clouds import Cutoff, find_cutoff
from eval.inside.artifacts.norms import norm_histogram
from eval.inside.artifacts.tally import add_up
from eval.inside.look import Look


def evenly(part: Part, most: int) -> Part:
    """At most so many of the images of a part."""
    return part.subset(np.unique(np.linspace(0, len(part) - 1, min(most, len(part))).round().astype(np.int64)))


def decide_cutoff(look: Look, rule: str, images: int, layer: int) -> tuple[Cutoff, dict[str, int]]:
    """By a rule that passes `check_rule`, from the norms of patches as they leave a layer, on at most so many images.

    And the numbers of images and tokens on which it was found: none where it is given. For all ranks together.
    """
    try:
        float(rule)
    except ValueError:
        model, part = look.backbone.model, evenly(look.part, images)
        measured = look.through(lambda batch: norm_histogram(model, batch, layer), "norms, for the cutoff", part)
        counts = add_up(measured, look.context.ranks).sums["norms"].numpy()
        tokens = int(counts.sum())  # images that cannot be read have none
        return find_cutoff(counts, rule), {"images": tokens // math.prod(look.grid), "tokens": tokens}
    return find_cutoff(np.zeros(0, dtype=np.int64), rule), {"images": 0, "tokens": 0}
