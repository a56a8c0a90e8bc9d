"""From sums and rows to the figures that are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eval.inside.decoupling.cka import CONSTANT, Cka, jackknife, total
from eval.inside.decoupling.clutter import MEASURES, rank_correlation
from eval.inside.decoupling.measure import ROW
from eval.inside.decoupling.oneshot import TOPS, class_score
from eval.inside.decoupling.ridge import cross_fitted, r2
from eval.inside.decoupling.split import GROUPS, KINDS, POINTS
from eval.inside.decoupling.tally import Table, Tally
from eval.metrics import mean_score
from eval.results import Score

# Of what the final CLS is rebuilt: single sources and unions of them.
SOURCES = {
    "weighted": ["weighted"],
    "mean": ["mean"],
    "registers": ["registers"],
    "previous": ["previous"],
    "patches": ["weighted", "mean"],
    "patches+registers": ["weighted", "mean", "registers"],
    "patches+previous": ["weighted", "mean", "previous"],
    "registers+previous": ["registers", "previous"],
    "all": ["weighted", "mean", "registers", "previous"],
}
FEWEST = 20  # images, from which a ridge regression is tried


def column(table: Table, name: str, layer: int = -1) -> Tensor:
    """A figure of ROW in one layer (n,), NaN where undefined."""
    return table.rows[:, layer, ROW.index(name)]


def mean_of(values: Tensor, unit: str = "") -> Score | None:
    """Of those images where it is defined; None where it is nowhere. unit "%": values are shares of 1."""
    known = values[values.isfinite()]
    return mean_score(100 * known if unit == "%" else known, unit) if len(known) else None


def patch_against(table: Table, other: str) -> Tensor:
    """D7: ||patch part|| / (||patch part|| + ||other part||) in the last layer, (n,); other: registers or skip."""
    patches = column(table, "norm_patches")
    return patches / (patches + column(table, f"norm_{other}"))


def ckas(tally: Tally) -> dict[str, Any]:
    """By layer, and with intervals for the last; and where CLS leaves the network. Names are those of `compared`."""
    sums = {block: total(folds) for block, folds in tally.moments.items()}
    pairs = compared(sums[tally.last].names)
    everywhere = {name: pair for name, pair in pairs.items() if not name.endswith("+residual")}
    layers = {name: [_plain(sums[block].cka(*pair)) for block in sums] for name, pair in everywhere.items()}
    after = {kind: _plain(tally.after.cka(kind, "whole")) for kind in tally.kinds if kind != "whole"}
    return {"blocks": list(sums), "layers": layers, "last": _with_intervals(tally, pairs), "after": after}


def compared(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Pairs of `mixtures`: each group with all that attention adds; and what the stream is made of with the stream.

    GROUP is what was read from it alone; GROUP/attended is the same, against the stream after attention (equation 6).
    """
    groups = [group for group in GROUPS if group in names]
    pairs = {group: (group, "branch") for group in groups} | {"skip": ("skip", "attended")}
    pairs |= {f"{group}/attended": (group, "attended") for group in groups if group != "cls"}
    return pairs | {f"{group}+residual": (f"{group}+residual", "attended") for group in groups}


def _with_intervals(tally: Tally, pairs: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Of the last layer."""
    folds = tally.moments[tally.last]
    found: dict[str, Any] = {}
    for name, intervals in jackknife(folds, pairs).items():
        cka = total(folds).cka(*pairs[name])
        found[name] = {kind: {"value": getattr(cka, kind), "interval": each} for kind, each in intervals.items()}
        found[name]["floor"] = cka.floor
    return found


def _plain(cka: Cka) -> dict[str, float | None]:
    return {"plain": cka.plain, "debiased": cka.debiased, "floor": cka.floor}


def one_shot(table: Table, kinds: Sequence[str]) -> dict[str, Any]:
    """Scores by POINT/KIND/topK, with each draw's accuracy in percent."""
    found = {}
    for p, point in enumerate(POINTS):
        for kind in kinds:
            for t, top in enumerate(TOPS):
                right = table.right[:, :, p, KINDS.index(kind), t]
                score = class_score(right.mean(1), table.labels)
                found[f"{point}/{kind}/top{top}"] = {**score.plain(), "draws": (100 * right.mean(0)).tolist()}
    return found


def rebuild(table: Table, device: torch.device) -> dict[str, Any] | None:
    """D3: R² of the final CLS from each of SOURCES, and what each source alone knows.

    None for too few images, and where CLS is the same in all.
    """
    count, final = len(table.final), table.final.double()
    if count < FEWEST or final.var(0, correction=0).sum() <= CONSTANT * final.square().sum(1).mean():
        return None
    known = table.known.to(device)
    sources = dict(zip(("weighted", "mean", "previous"), known[:, :3].unbind(1), strict=True))
    if known.shape[1] > 3:
        sources["registers"] = known[:, 3:].flatten(1)
    wanted = {name: [each for each in parts if each in sources] for name, parts in SOURCES.items()}
    # Without registers, unions with them are those of the others.
    fits = {name: tuple(parts) for name, parts in wanted.items() if parts}
    errors = {
        parts: cross_fitted([sources[each] for each in parts], table.final.to(device)) for parts in {*fits.values()}
    }
    scores = {
        name: r2(errors[parts]).plain() for name, parts in fits.items() if name != "registers" or "registers" in sources
    }
    others = {"patches": "registers+previous", "registers": "patches+previous", "previous": "patches+registers"}
    unique = {
        name: r2(errors[fits["all"]], errors[fits[rest]]).plain()
        for name, rest in others.items()
        if name != "registers" or "registers" in sources
    }
    sizes = {name: sum(sources[each].shape[1] for each in parts) for name, parts in fits.items()}
    return {"images": count, "r2": scores, "unique": unique, "sizes": sizes}


def clutter_told(table: Table) -> dict[str, Any]:
    """D7: the mean of each share, and how it goes with each measure of clutter."""
    found: dict[str, Any] = {}
    for other in ("registers", "skip"):
        shares = patch_against(table, other)
        known = shares.isfinite()
        if score := mean_of(shares):
            correlations = {
                name: rank_correlation(shares[known], table.clutter[known, at]) for at, name in enumerate(MEASURES)
            }
            told = {name: each.plain() if each else None for name, each in correlations.items()}
            found[other] = {
                "mean": score.plain(),
                "spread": float(shares[known].std(correction=0)),
                "correlation": told,
            }
    return found


def headlines(table: Table, cka: dict[str, Any], shots: dict[str, Any] | None) -> dict[str, Score]:
    """The figures of the last layer that have an interval, the share of attention on patches first."""
    found = {f"attention_{group}": mean_of(column(table, f"share_{group}"), "%") for group in GROUPS}
    found |= {f"cosine_{group}": mean_of(column(table, f"cosine_{group}")) for group in GROUPS}
    for name in (*GROUPS, "skip"):
        for kind, suffix in (("plain", ""), ("debiased", "_debiased")):
            told = cka["last"].get(name, {}).get(kind)
            if told is not None and told["interval"] is not None:
                low, high = told["interval"]
                found[f"cka_{name}{suffix}"] = Score(told["value"], low, high, unit="")
    for name, score in (shots or {}).items():
        point, kind, top = name.split("/")
        if point == "branch" and top == "top1":
            found[f"oneshot_{kind}"] = Score(score["value"], score["low"], score["high"])
    return {name: score for name, score in found.items() if score is not None}
