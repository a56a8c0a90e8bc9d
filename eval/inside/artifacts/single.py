"""One token as the description of the whole image: CLS, a patch, an outlier, a register (registers paper, table 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinoreg.models.vit import VisionTransformer
from dinoreg.parallel.mesh import Ranks
from eval.images import hold_out
from eval.inside.artifacts.draws import draw_each, generator_of
from eval.inside.artifacts.norms import output_tokens
from eval.inside.artifacts.summary import share_score
from eval.inside.artifacts.tally import Tally
from eval.inside.look import Batch
from eval.logistic import Linear, fit_logistic
from eval.results import Score

FEWEST = 20  # images with an outlier, in training and in test, from which single outliers are classified


def draw_single(
    model: VisionTransformer, batch: Batch, layer: int, cutoff: float, draws: int, seed: int, normed: bool
) -> Tally:
    """A row an image: place, label, has (an outlier), tokens fp16 (1 + R + 2 draws, D).

    tokens: CLS, registers, then `draws` normal patches, then as many outliers, each drawn from all of its kind; zeros
    where the image has none of it.
    """
    tokens, outliers = output_tokens(model, batch.images, layer, cutoff)
    tokens, first = (model.norm(tokens) if normed else tokens), 1 + model.num_registers
    kept = tokens.new_zeros(len(batch), first + 2 * draws, tokens.shape[-1], dtype=torch.float16)
    kept[:, :first] = tokens[:, :first].half()
    masks = outliers.cpu()
    for at, (place, mask) in enumerate(zip(batch.places.tolist(), masks, strict=True)):
        generator = generator_of(seed, place)
        for number, among in enumerate((~mask, mask)):
            if among.any():
                chosen = first + draw_each(among, draws, generator)
                start = first + number * draws
                kept[at, start : start + draws] = tokens[at, chosen.to(tokens.device)].half()
    rows = {"place": batch.places, "label": batch.labels, "has": masks.any(1), "tokens": kept.cpu()}
    return Tally(rows=rows)


@dataclass(frozen=True)
class Fitting:
    """How a logistic regression is fitted: as in `eval.suites.logreg`, C chosen on a part of the training images."""

    grid: Sequence[float]
    iterations: int
    tolerance: float
    heldout: float
    seed: int


@dataclass(frozen=True)
class Column:
    """A kind of token: its places among the kept ones, one for each draw."""

    name: str
    places: Sequence[int]


def columns_of(registers: int, draws: int, outliers: bool) -> list[Column]:
    """CLS, normal patch, outlier where there are some, each register."""
    first = 1 + registers
    found = [Column("CLS", [0]), Column("normal", range(first, first + draws))]
    if outliers:
        found.append(Column("outlier", range(first + draws, first + 2 * draws)))
    return found + [Column(f"register {at}", [1 + at]) for at in range(registers)]


def classify(
    train: dict[str, Tensor], test: dict[str, Tensor], registers: int, draws: int, fitting: Fitting, ranks: Ranks
) -> tuple[dict[str, Any], dict[str, Score]]:
    """Top-1 accuracy of each column; columns are dealt out to the ranks. train, test: rows of `draw_single`.

    Images without an outlier count in no column, unless so few have one that the column of outliers is left out.
    """
    outliers = min(int(train["has"].sum()), int(test["has"].sum())) >= FEWEST
    kept = [{name: rows[name][rows["has"]] for name in rows} if outliers else rows for rows in (train, test)]
    classes = 1 + int(max(rows["label"].max() for rows in kept))
    columns = columns_of(registers, draws, outliers)
    mine = {
        column.name: _measure(kept[0], kept[1], column, classes, fitting, ranks.device)
        for column in columns[ranks.rank :: ranks.world]
    }
    found = {name: each for share in ranks.gather_objects(mine) for name, each in share.items()}
    details: dict[str, Any] = {
        "train": len(kept[0]["label"]),
        "test": len(kept[1]["label"]),
        "skipped_train": len(train["label"]) - len(kept[0]["label"]),
        "skipped_test": len(test["label"]) - len(kept[1]["label"]),
        "classes": classes,
        "draws": draws,
        "columns": {},
    }
    scores = {}
    for column in columns:
        right, C = found[column.name]
        details["columns"][column.name] = tell_column(right, kept[1]["label"], C)
        scores[f"single_{column.name.lower().replace(' ', '_')}_top1"] = share_score(right.mean(0))
    return details, scores


def tell_column(right: Tensor, labels: Tensor, C: float) -> dict[str, Any]:
    """right: whether each draw was classified rightly, float (draws, n). std: over draws, None where there is one."""
    each = 100 * right.double().mean(1)
    by_class = [100 * right[:, labels == label].double().mean() for label in labels.unique()]
    return {
        "top1": float(each.mean()),
        "std": float(each.std()) if len(each) > 1 else None,
        "mean_per_class": float(torch.stack(by_class).mean()),
        "C": C,
    }


def _measure(
    train: dict[str, Tensor],
    test: dict[str, Tensor],
    column: Column,
    classes: int,
    fitting: Fitting,
    device: torch.device,
) -> tuple[Tensor, float]:
    """Whether each test image is classified rightly in each draw, float (draws, n), and C, chosen in the first draw."""
    labels, truth = train["label"].to(device), test["label"].to(device)
    C, right = 0.0, []
    for place in column.places:
        known, asked = (rows["tokens"][:, place].to(device).float() for rows in (train, test))
        if not C:
            C = choose_c(known, labels, classes, fitting)
        right.append((_fit(known, labels, C, classes, fitting).predict(asked) == truth).float().cpu())
    return torch.stack(right), C


def choose_c(known: Tensor, labels: Tensor, classes: int, fitting: Fitting) -> float:
    """The smallest of those values that are best on the images held out."""
    if len(fitting.grid) == 1:
        return fitting.grid[0]
    held, kept = (
        torch.from_numpy(part).to(known.device) for part in hold_out(len(labels), fitting.heldout, fitting.seed)
    )
    best, most, fit = fitting.grid[0], -1.0, None
    for C in fitting.grid:
        fit = _fit(known[kept], labels[kept], C, classes, fitting, fit)
        reached = float((fit.predict(known[held]) == labels[held]).double().mean())
        if reached > most:
            best, most = C, reached
    return best


def _fit(
    known: Tensor, labels: Tensor, C: float, classes: int, fitting: Fitting, start: Linear | None = None
) -> Linear:
    return fit_logistic(known, labels, C, classes, max_iter=fitting.iterations, tol=fitting.tolerance, start=start)
