"""`knockout`: what CLS depends on, found by taking it away, and whether its attention map tells as much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.models.maps import attention_rows
from eval.backbone import Backbone
from eval.images import Part, Viewed
from eval.inside.frozen import Frozen, freeze
from eval.inside.knockout.alignment import alignment, named
from eval.inside.knockout.edges import (
    CUT,
    MEAN,
    SHUFFLE,
    SWAP,
    Moments,
    Pass,
    Run,
    Usual,
    choose_donors,
    knocked_out,
    moments,
    plan,
    spread_layers,
)
from eval.inside.knockout.masking import area, deletion, insertion, leave_one_out, random_orders, rank_correlation
from eval.inside.look import Batch, Look, LookConfig
from eval.metrics import RESAMPLES, mean_score, share_interval
from eval.results import Result, Score
from eval.suite import Context

STUDENT = (np.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # of 1, 2, ...
NAMES = {"CLS<-PATCH": "patches", "CLS<-CLS": "cls", "CLS<-REG": "registers", "PATCH<-REG": "registers_for_patches"}


@dataclass
class KnockoutConfig(LookConfig):
    """Everything is measured on the same images; a classifier of class tokens is trained once and held fixed."""

    layers: int = 8  # blocks in which a knock-out begins, evenly spread, the first and the last among them; 0 = all
    window: int = 1  # blocks in a row in which it acts
    donors: int = 128  # other images whose tokens are given in exchange
    probe: Literal["logreg", "knn"] = "logreg"  # classifier of class tokens, where labelled
    masked_images: int = 100  # whose patches are greyed step by step; 0 = none
    steps: int = 10  # of greying
    orders: int = 3  # random ones, which are averaged
    left_out_images: int = 8  # whose patches are greyed one at a time; 0 = none

    @staticmethod
    def quick() -> list[str]:
        return ["images=64", "train_images=1000", "layers=3", "masked_images=16", "left_out_images=2"]

    def check(self) -> None:
        """Raises ConfigError."""
        super().check()
        for key, least in (
            ("layers", 0), ("window", 1), ("donors", 2), ("masked_images", 0), ("steps", 2), ("orders", 1),
            ("left_out_images", 0),
        ):  # fmt: skip
            if getattr(self, key) < least:
                raise ConfigError(f"must be at least {least}", key)


def run(backbone: Backbone, cfg: KnockoutConfig, context: Context) -> Result:
    """One pass for the usual tokens, one for all knock-outs, and some over fewer images."""
    look = Look(backbone, cfg, context)
    if len(look.part) < 2:
        raise ConfigError("exchanging tokens takes two images at least", "images")
    frozen = freeze(look, cfg.probe)
    layers = spread_layers(backbone.depth, cfg.layers)
    runs = plan(backbone.depth, backbone.num_registers, layers, cfg.window)
    found = _knock_out(look, cfg, frozen, runs)
    masking, masking_scores = _mask(look, cfg)
    aligned, aligned_scores = _align(look, frozen)
    rows = _told(runs, found)
    scores = {**_scores(runs, found, backbone.depth), **masking_scores, **aligned_scores}
    return look.result(
        "knockout",
        scores,
        arrays=_photos(look, frozen),
        runs=rows,
        layers=layers,
        depth=backbone.depth,
        swap=_swap(runs, found),
        masking=masking,
        alignment=aligned,
        probe=frozen.kind if frozen else None,
        top1=None if found.right is None else 100 * float(found.right.double().mean()),
        images_seen=len(found.cosine),
        tokens=len(found.cosine) * look.grid[0] * look.grid[1],
    )


@dataclass
class Found:
    """What the knock-outs did, in the order of the images.

    cosine: (n, runs), of CLS with the plain one. labels: (n,). What the frozen classifier says, None without one:
    predicted (n, runs), plain and donor (n,).
    """

    cosine: Tensor
    predicted: Tensor | None
    plain: Tensor | None
    donor: Tensor | None
    labels: Tensor

    @property
    def right(self) -> Tensor | None:
        return None if self.plain is None else self.plain == self.labels

    def drop(self) -> Tensor | None:
        """(n, runs), by how much an image adds less to the accuracy, in points."""
        if self.predicted is None or self.right is None:
            return None
        right = self.predicted == self.labels[:, None]
        return 100 * (self.right[:, None].double() - right.double())


def _knock_out(look: Look, cfg: KnockoutConfig, frozen: Frozen | None, runs: Sequence[Run]) -> Found:
    model, device = look.backbone.model, look.context.device
    usual = _usual(look).to(device)
    bank = _bank(look, cfg.donors)

    def measure(batch: Batch) -> tuple[Tensor, ...]:
        chosen = choose_donors(bank.places, bank.labels, batch.places, batch.labels)
        plain, donors = Pass.of(model, batch.images), Pass.of(model, look.prepare(bank.pixels[chosen]))
        first, other = (model.norm(each.tokens(-1)[:, 0]).float() for each in (plain, donors))
        changed = [knocked_out(model, plain, donors, usual, each, batch.places) for each in runs]
        cosine = torch.stack([torch.cosine_similarity(cls, first, dim=1) for cls in changed], dim=1)
        if frozen is None:
            return batch.places, cosine.cpu(), batch.labels
        named = [frozen.predict(each).cpu() for each in (first, other, *changed)]
        return batch.places, cosine.cpu(), batch.labels, torch.stack(named, dim=1)

    pieces = _gathered(look, measure, "knock-outs")
    cosine, labels = pieces[1], pieces[2]
    if frozen is None:
        return Found(cosine, None, None, None, labels)
    return Found(cosine, pieces[3][:, 2:], pieces[3][:, 0], pieces[3][:, 1], labels)


def _gathered(look: Look, measure: Any, what: str, part: Part | None = None) -> list[Tensor]:
    """The columns of all ranks in the order of the images; the first is their places."""
    mine = list(look.through(measure, what, part))
    every = [piece for share in look.context.ranks.gather_objects(mine) for piece in share]
    columns = [torch.cat(each) for each in zip(*every, strict=True)]
    order = columns[0].argsort()
    return [column[order] for column in columns]


def _usual(look: Look) -> Usual:
    total: Moments | None = None
    for each in look.through(lambda batch: moments(look.backbone.model, batch.images), "what tokens usually are"):
        total = each if total is None else total + each
    parts = [each for each in look.context.ranks.gather_objects(total) if each is not None]
    return sum(parts[1:], parts[0]).usual()


@dataclass
class Bank:
    """Images that give tokens. pixels: uint8 (K, 3, S, S); places among those looked at, and labels if any: (K,)."""

    pixels: Tensor
    places: Tensor
    labels: Tensor | None


def _bank(look: Look, most: int) -> Bank:
    """Evenly spaced among those looked at; the same on all ranks."""
    part = look.part
    viewed = Viewed(part, look.view)
    places = np.unique(np.linspace(0, len(part) - 1, min(most, len(part))).round().astype(int)).tolist()
    seen = [(place, *viewed[place]) for place in places]
    good = [(place, pixels) for place, pixels, fine in seen if fine]
    if len(good) < 2:
        raise ConfigError("fewer than two of the images can be read", "--data")
    at = torch.tensor([place for place, _ in good])
    return Bank(torch.stack([pixels for _, pixels in good]), at, part.labels[at] if look.labelled else None)


def _told(runs: Sequence[Run], found: Found) -> list[dict[str, Any]]:
    """Of each run: mean cosine, and drop of accuracy where labelled, with intervals."""
    cosines = _intervals(found.cosine)
    drop = found.drop()
    drops = [None] * len(runs) if drop is None else _intervals(drop)
    return [
        {**run.plain(), "cosine": cosine, "drop": drop} for run, cosine, drop in zip(runs, cosines, drops, strict=True)
    ]  # fmt: skip


def _intervals(values: Tensor) -> list[dict[str, float]]:
    """Means of columns (n, V) with the bootstrap's intervals over images, the same draws for all."""
    count, rows = len(values), values.double().numpy()
    rng = np.random.default_rng(0)
    drawn = np.stack([rows[rng.integers(count, size=count)].mean(0) for _ in range(RESAMPLES)])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return [
        {"value": float(mean), "low": float(a), "high": float(b)}
        for mean, a, b in zip(rows.mean(0), low, high, strict=True)
    ]


def _scores(runs: Sequence[Run], found: Found, depth: int) -> dict[str, Score]:
    """Of the cuts in the last block and in all blocks."""
    scores: dict[str, Score] = {}
    drop = found.drop()
    for span, said in (((depth - 1, depth - 1), "last"), ((0, depth - 1), "all")):
        for edge, name in NAMES.items():
            run = Run(edge, CUT, *span)
            if run in runs:
                at = runs.index(run)
                scores[f"cosine_without_{name}_{said}"] = mean_score(found.cosine[:, at])
                if drop is not None:
                    scores[f"drop_without_{name}_{said}"] = mean_score(drop[:, at], "points", "lower")
    return scores


def _swap(runs: Sequence[Run], found: Found) -> list[dict[str, Any]]:
    """By block: whose class is named after registers were exchanged; of images that were given another class than
    their donors. donor_by_mean: the donor's, after registers that know of no image; more: how much less that is."""
    if found.predicted is None or found.plain is None or found.donor is None:
        return []
    told = []
    counted = found.plain != found.donor
    for at, run in enumerate(runs):
        if run.edge != SWAP or run.way != SHUFFLE:
            continue
        named = found.predicted[counted, at]
        mean = found.predicted[counted, runs.index(replace(run, way=MEAN))]
        given, chance = named == found.donor[counted], mean == found.donor[counted]
        told.append(
            {
                "layer": run.first,
                "images": int(counted.sum()),
                "receiver": _share(named == found.plain[counted]),
                "donor": _share(given),
                "donor_by_mean": _share(chance),
                "more": _intervals(100 * (given.double() - chance.double())[:, None])[0] if len(given) else None,
            }
        )
    return told


def _share(true: Tensor) -> dict[str, float] | None:
    if not len(true):
        return None
    low, high = share_interval(int(true.sum()), len(true))
    return {"value": 100 * float(true.double().mean()), "low": low, "high": high}


def _mask(look: Look, cfg: KnockoutConfig) -> tuple[dict[str, Any], dict[str, Score]]:
    """Curves of greying, and correlations of the map with the effect of single patches."""
    told: dict[str, Any] = {"images": 0, "left_out": 0}
    scores: dict[str, Score] = {}
    if cfg.masked_images:
        part = _some(look.part, cfg.masked_images)
        curves = _gathered(look, lambda batch: _curves(look.backbone, batch, cfg), "patches greyed", part)[1]
        attended, least, drawn = (curves[:, at] for at in range(3))
        given = {
            "deletion": area(attended) - area(drawn), "insertion": area(insertion(least)) - area(insertion(drawn)),
        }  # fmt: skip
        told |= {
            "images": len(curves),
            "fractions": [step / cfg.steps for step in range(cfg.steps + 1)],
            "deletion": dict(zip(("attended", "least", "random"), map(_intervals, curves.unbind(1)), strict=True)),
            "areas": {
                "deletion": _intervals(torch.stack([area(attended), area(drawn)], 1)),
                "insertion": _intervals(torch.stack([area(insertion(least)), area(insertion(drawn))], 1)),
            },
        }  # fmt: skip
        scores |= {f"{name}_over_random": mean_score(values) for name, values in given.items()}
    if cfg.left_out_images:
        part = _some(look.part, cfg.left_out_images)
        found = _gathered(look, lambda batch: _left_out(look.backbone, batch, cfg), "patches left out", part)[1]
        known = found[~found.isnan()]
        told |= {"left_out": len(known), "correlations": known.tolist()}
        if len(known):
            scores["map_rank_correlation"] = correlation_score(known)
    return told, scores


def correlation_score(values: Tensor) -> Score:
    """The mean of one correlation an image (n,); by Student where images are too few to be resampled."""
    score, count = mean_score(values), len(values)
    if count > len(STUDENT):
        return score
    half = STUDENT[count - 1] * float(values.double().std()) / count**0.5 if count > 1 else 2.0
    return replace(score, low=max(-1.0, score.value - half), high=min(1.0, score.value + half))


def _some(part: Part, most: int) -> Part:
    places = np.unique(np.linspace(0, len(part) - 1, min(most, len(part))).round().astype(int))
    return part.subset(places)


def _map(backbone: Backbone, images: Tensor) -> Tensor:
    """Attention (B, N) of CLS in the last block on patches, a mean over heads."""
    return attention_rows(backbone.model, images)[:, 0, :, 1 + backbone.num_registers :].mean(1)


def _curves(backbone: Backbone, batch: Batch, cfg: KnockoutConfig) -> tuple[Tensor, Tensor]:
    """(B, 3, steps + 1): the most attended first, the least attended first, at random."""
    order = _map(backbone, batch.images).argsort(dim=1, descending=True, stable=True)

    def curve(order: Tensor) -> Tensor:
        return deletion(lambda images: _cls(backbone, images), batch.images, order, cfg.steps, backbone.patch_size)

    drawn = [random_orders(batch.places, order.shape[1], draw).to(order.device) for draw in range(cfg.orders)]
    curves = [curve(order), curve(order.flip(1)), torch.stack([curve(each) for each in drawn]).mean(0)]
    return batch.places, torch.stack(curves, dim=1).cpu()


def _left_out(backbone: Backbone, batch: Batch, cfg: KnockoutConfig) -> tuple[Tensor, Tensor]:
    """(B,), not a number where a map is constant."""
    maps = _map(backbone, batch.images)
    effects = [
        leave_one_out(lambda images: _cls(backbone, images), image, backbone.patch_size, cfg.batch)
        for image in batch.images
    ]
    found = [rank_correlation(one, other) for one, other in zip(maps, effects, strict=True)]
    return batch.places, torch.tensor([np.nan if each is None else each for each in found])


def _cls(backbone: Backbone, images: Tensor) -> Tensor:
    return backbone.layers(images, [-1])[0].cls.float()


def _align(look: Look, frozen: Frozen | None) -> tuple[dict[str, Any], dict[str, Score]]:
    """Means over images: cosine of patches and CLS, and shares of patches given the image's class, or that of CLS."""

    def measure(batch: Batch) -> tuple[Tensor, Tensor]:
        cosine, patches, cls = alignment(look.backbone, batch.images)
        columns = [cosine.mean(1).cpu(), cosine.std(1, correction=0).cpu()]
        if frozen is not None:
            said = named(frozen, patches).cpu()
            columns += [(said == batch.labels[:, None]).float().mean(1)]
            columns += [(said == frozen.predict(cls).cpu()[:, None]).float().mean(1)]
        return batch.places, torch.stack(columns, dim=1)

    rows = _gathered(look, measure, "patches beside CLS")[1]
    scores = {"patch_cls_cosine": mean_score(rows[:, 0])}
    told: dict[str, Any] = {"cosine": _intervals(rows[:, :1])[0], "spread": float(rows[:, 1].mean())}
    if frozen is not None:
        scores["patches_naming_class"] = mean_score(100 * rows[:, 2], "%")
        told |= dict(zip(("class", "as_cls"), _intervals(100 * rows[:, 2:]), strict=True))
        told["chance"] = 100 / look.num_classes
    return told, scores


def _photos(look: Look, frozen: Frozen | None) -> dict[str, Tensor]:
    """Maps (P, h, w) of a few images: cosine of patches with CLS, attention, where patches are given CLS's class."""
    pixels, _ = look.photos()
    if not len(pixels):
        return {}
    images = look.prepare(pixels)
    with torch.no_grad():
        cosine, patches, cls = alignment(look.backbone, images)
        maps = {"cosine": cosine, "attention": _map(look.backbone, images)}
        if frozen is not None:
            maps["named"] = (named(frozen, patches) == frozen.predict(cls)[:, None]).float()
    return {"photos": pixels, **{name: each.unflatten(1, look.grid).float().cpu() for name, each in maps.items()}}
