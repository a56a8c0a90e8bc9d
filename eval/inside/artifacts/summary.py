"""From what was added up to what is told: shares, quantiles, layers, with intervals over images."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from eval.inside.artifacts.bins import Counts, quantiles, share_above
from eval.inside.artifacts.clouds import find_cutoff, fit_clouds
from eval.inside.artifacts.neighbours import auroc
from eval.inside.artifacts.norms import BRANCHES
from eval.inside.artifacts.places import border_ratio, edge_sums, stripes
from eval.inside.artifacts.tally import Tally
from eval.metrics import bootstrap, mean_score, share_interval
from eval.results import Score

SHARES = [0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0]
FEW = 10  # groups of images with outliers, below which nothing is known of an interval


def percentiles(counts: Counts) -> dict[str, float | None]:
    """The norms at SHARES, by share."""
    return dict(zip(map(str, SHARES), quantiles(counts, SHARES), strict=True))


def tell_norms(tally: Tally, layer: int) -> tuple[dict[str, Any], dict[str, Score]]:
    """1.1: the patches as they leave the layer."""
    counts = tally.sums["layers"][layer, 1].numpy()
    share, outliers = tally.rows["share"], int(tally.sums["outlier_layers"][layer, 1].sum())
    others = {rule: find_cutoff(counts, rule) for rule in ("valley", "3std")}
    details = {
        "images": len(share),
        "tokens": int(counts.sum()),
        "outliers": outliers,
        "images_with": int((share > 0).sum()),
        "percentiles": percentiles(counts),
        "clouds": fit_clouds(counts).plain(),
        "rules": {
            rule: {"cutoff": each.value, "share": share_above(counts, each.value), "how": each.how}
            for rule, each in others.items()
        },
    }
    scores = {
        "outlier_share": share_score(share, "lower"),
        "norm_max_over_median": mean_score(tally.rows["ratio"], "", "lower"),
    }
    return details, scores


def share_score(share: Tensor, better: str = "higher") -> Score:
    """Percent, from the share in each image (n,), with its interval."""
    return widened(mean_score(100 * share, "%", better), len(share))


def widened(score: Score, images: int) -> Score:
    """A percentage that may be 0 or 100, of which resampling would be certain: then as wide as Wilson's for images."""
    if 0 < score.value < 100:
        return score
    low, high = share_interval(images if score.value else 0, images)
    return replace(score, low=low, high=high)


def tell_layers(tally: Tally) -> dict[str, Any]:
    """1.2: medians along layers, and after which branch those who are outliers in the end leave the others."""
    layers, outliers = (tally.sums[name].numpy() for name in ("layers", "outlier_layers"))
    normal = layers - outliers
    entering, outlier_entering = tally.sums["entering"].numpy()
    before = [quantiles(kind, [0.5])[0] for kind in (entering - outlier_entering, outlier_entering)]
    medians = [
        [[quantiles(kind[at, b], [0.5])[0] for b in (0, 1)] for at in range(len(layers))] for kind in (normal, outliers)
    ]
    largest = [[quantiles(layers[at, b], [1.0])[0] for b in (0, 1)] for at in range(len(layers))]
    return {
        "normal_median": medians[0],
        "outlier_median": medians[1],
        "largest": largest,
        "entering_median": before,
        "rise": _rise(before, medians[0], medians[1]),
    }


def _rise(
    before: list[float | None], normal: list[list[float | None]], outlier: list[list[float | None]]
) -> dict[str, Any] | None:
    """Where the ratio of the two medians grows most; None where there are no outliers. before: as they enter."""
    later = [(a, b) for pair in zip(normal, outlier, strict=True) for a, b in zip(*pair, strict=True)]
    pairs = [(before[0], before[1]), *later]
    if any(a is None or b is None or not a for a, b in pairs):
        return None
    ratios = [math.log(b / a) for a, b in pairs if a and b]
    at = int(np.diff(ratios).argmax())
    return {
        "layer": at // 2,
        "branch": BRANCHES[at % 2],
        "entering": math.exp(ratios[0]),
        "most": math.exp(max(ratios)),
        "before": math.exp(ratios[at]),
        "after": math.exp(ratios[at + 1]),
        "in_the_end": math.exp(ratios[-1]),
    }


def tell_types(tally: Tally, layer: int) -> list[dict[str, Any]]:
    """1.6: norms of CLS and of each register as they leave the layer; cv is standard deviation by mean."""
    images = len(tally.rows["share"])
    mean, square = (tally.sums["type_moments"][layer] / images).numpy().T
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return [
        {
            "type": "CLS" if at == 0 else f"register {at - 1}",
            "mean": float(mean[at]),
            "cv": float(std[at] / mean[at]) if mean[at] else None,
            "percentiles": percentiles(counts),
        }
        for at, counts in enumerate(tally.sums["types"].numpy())
    ]


def tell_neighbours(tally: Tally) -> tuple[dict[str, Any], dict[str, Score]]:
    """1.3: how well the likeness to neighbours tells outliers from normal patches."""
    groups = tally.sums["cosines"][tally.sums["seen"] > 0]
    normal, outlier = groups.sum(0)
    details: dict[str, Any] = {"normal": int(normal.sum()), "outlier": int(outlier.sum()), "auroc": None}
    if not normal.any() or not outlier.any():
        return details, {}
    value = float(auroc(normal, outlier))
    low, high = 0.0, 1.0
    if int((groups[:, 1].sum(-1) > 0).sum()) >= FEW:
        low, high = bootstrap(groups, lambda sums: auroc(sums[:, 0], sums[:, 1]).nan_to_num(0.5))
    return {**details, "auroc": value}, {"neighbour_auroc": Score(value, low, high, "")}


def tell_places(tally: Tally, grid: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Score]]:
    """1.12: how much more frequent outliers are on the border, and stripes."""
    counts = tally.sums["places"].sum(0)
    details = {**tell_map(counts, tally.sums["place_norms"], int(tally.sums["seen"].sum()), grid), "border_ratio": None}
    edges = tally.rows["edge"].double()
    if min(grid) <= 2 or not edges[:, 1].any():
        return details, {}
    ratio = float(border_ratio(edges.sum(0), grid))
    low, high = bootstrap(edges, lambda sums: border_ratio(sums, grid))
    return {**details, "border_ratio": ratio}, {"border_ratio": Score(ratio, low, high, "", "lower")}


def tell_map(counts: Tensor, norms: Tensor, seen: int, grid: tuple[int, int]) -> dict[str, Any]:
    """Of outliers counted by position (N,), and of sums of norms (N,), over so many images."""
    rates, means = ((each.double() / seen).view(grid).numpy() for each in (counts, norms))
    return {
        "images": seen,
        "outliers": int(counts.sum()),
        "share": float(rates.mean()),
        "most": float(rates.max()),
        "border_norm_ratio": float(border_ratio(edge_sums(norms, grid), grid)) if min(grid) > 2 else None,
        "stripes": {name: stripes(rates, along=at) for at, name in enumerate(("rows", "columns"))},
        "norm_stripes": {name: stripes(means, along=at) for at, name in enumerate(("rows", "columns"))},
    }
