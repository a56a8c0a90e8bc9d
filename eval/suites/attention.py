"""`attention`: where CLS and the registers look, and how much of it is spent on artifacts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.parallel.mesh import Ranks
from eval.backbone import Backbone
from eval.inside.artifacts.clouds import Cutoff, check_rule
from eval.inside.artifacts.cutoff import decide_cutoff
from eval.inside.attention.looking import (
    CLS_COSINE,
    CLS_DIVERGENCE,
    COSINE,
    DIVERGENCE,
    ENTROPY,
    HEAD_ENTROPY,
    LOG_PEAK,
    ON_PATCHES,
    OUTLIER_MASS,
    Attended,
    Noted,
    attend,
    note,
)
from eval.inside.attention.measures import central_patch, lie_of
from eval.inside.look import Batch, Look
from eval.inside.maps import MapConfig, choose_map_size, of_each_photo
from eval.inside.rows import in_order
from eval.metrics import bootstrap, mean_score
from eval.results import Result, Score
from eval.suite import Context
from eval.suites.artifacts import choose_layer

FIGURE_9 = (0, 6, 8, 12)  # the registers whose maps the paper shows, of more than 12
FEW = 5  # registers that all have their maps drawn


@dataclass
class AttentionConfig(MapConfig):
    """The last block's attention to the patches, averaged over heads and by head."""

    registers: list[int] = field(default_factory=list)  # whose maps are drawn; none named = all, or some of many
    cutoff: str = "valley"  # norm beyond which a patch is an outlier: as for `artifacts`
    cutoff_images: int = 256  # on which the cutoff is found
    outlier_layer: int = -1  # block after which norms are taken; large networks may hide outliers in the last one

    @staticmethod
    def quick() -> list[str]:
        """Fewer images."""
        return ["images=200", "cutoff_images=100"]

    def check(self) -> None:
        """Raises ConfigError."""
        super().check()
        check_rule(self.cutoff)
        if self.cutoff_images < 1:
            raise ConfigError("must be at least 1", "cutoff_images")


@dataclass
class Seen:
    """Of all images. tokens: (n, Q, 5); pairs: (n, 4); outliers: (n,); the others are means over images: heads
    (heads, 4), similarities (2, Q - 1, Q - 1), average (Q, N). See `Noted`."""

    tokens: Tensor
    pairs: Tensor
    outliers: Tensor
    heads: Tensor
    similarities: Tensor
    average: Tensor


def run(backbone: Backbone, cfg: AttentionConfig, context: Context) -> Result:
    """The cutoff first, from some of the images; then all of them in one pass; then the photos' maps."""
    look = Look(backbone, cfg, context)
    if math.prod(look.grid) < 2:
        raise ConfigError("the images are one patch, over which nothing can be spread", "image_size")
    layer, map_size = choose_layer(backbone, cfg.layer), choose_map_size(look, cfg.map_size)
    shown = choose_registers(backbone.num_registers, cfg.registers)
    norm_layer = _outlier_layer(backbone, cfg)
    cutoff, found_on = decide_cutoff(look, cfg.cutoff, cfg.cutoff_images, norm_layer)
    context.say(f"attention: {cutoff.how}")
    seen = see(look, layer, norm_layer, cutoff.number())
    photos, names, maps = of_each_photo(
        look, map_size, lambda image: _cpu(attend(backbone.model, image, layer, norm_layer))
    )
    details = {
        "layer": layer,
        "depth": backbone.depth,
        "images": len(seen.tokens),
        "patches": seen.average.shape[1],
        "grid": list(look.grid),
        "cutoff": {"value": cutoff.value, "rule": cutoff.rule, "how": cutoff.how, "layer": norm_layer, **found_on},
        "outliers": {
            "tokens": int(seen.outliers.sum()),
            "share": _share(seen),
            "images": int((seen.outliers > 0).sum()),
        },
        "tokens": tell_tokens(seen, look.grid),
        "heads": tell_heads(seen),
        "pairs": {"cosine": seen.similarities[0].tolist(), "jensen_shannon": seen.similarities[1].tolist()},
        "shown": shown,
        "photos": names,
        "map_size": map_size,
    }
    arrays = {"photos": photos, "average": seen.average.unflatten(1, look.grid), **_maps(maps, shown, look, map_size)}
    if maps:
        norms = torch.cat([each.norms for each in maps])
        arrays["photo_outliers"] = (norms > cutoff.number()).unflatten(1, _grid(look, map_size))
    return look.result("attention", scores_of(seen), _notes(cutoff, look, map_size), arrays, **details)


def choose_registers(there: int, asked: Sequence[int]) -> list[int]:
    """Whose maps are drawn. Raises ConfigError where the network has registers, but not one of these."""
    if not there:
        return []  # it is shown beside one that has them
    if wrong := [number for number in asked if not 0 <= number < there]:
        raise ConfigError(f"the network has {there} registers, counted from 0: none is {wrong[0]}", "registers")
    if asked or there <= FEW:
        return list(asked) or list(range(there))
    return list(FIGURE_9) if there > max(FIGURE_9) else [at * there // 4 for at in range(4)]


def see(look: Look, layer: int, norm_layer: int, cutoff: float) -> Seen:
    """What is noted of all images. For all ranks together."""
    model = look.backbone.model

    def measure(batch: Batch) -> tuple[Tensor, Noted]:
        found = attend(model, batch.images, layer, norm_layer)
        return batch.places, note(found.weights, found.norms > cutoff)

    sums: dict[str, Tensor] = {}

    def rows() -> Iterator[tuple[Tensor, Tensor]]:
        for places, noted in look.through(measure, "attention"):
            for name, value in (
                ("heads", noted.heads.double().sum(0)), ("similarities", noted.similarities), ("average", noted.average)
            ):  # fmt: skip
                sums[name] = sums[name] + value if name in sums else value
            outliers = noted.outliers[:, None].to(noted.pairs)
            yield places, torch.cat([noted.tokens.flatten(1), noted.pairs, outliers], dim=1)

    found = in_order(look.context.ranks, rows())
    tokens = found[:, :-5].unflatten(1, (-1, OUTLIER_MASS + 1))
    means = {name: value / len(found) for name, value in _add_up(look.context.ranks, sums).items()}
    return Seen(tokens, found[:, -5:-1], found[:, -1], **means)


def _add_up(ranks: Ranks, sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Over ranks, of which one may have had no image."""
    shares = ranks.gather_objects({name: value.cpu() for name, value in sums.items()})
    names = next(share for share in shares if share)
    return {name: torch.stack([share[name] for share in shares if share]).sum(0) for name in names}


def scores_of(seen: Seen) -> dict[str, Score]:
    """Of the class token's map, with intervals over images; then of the registers' maps."""
    even = math.log(seen.average.shape[1])
    cls = seen.tokens[:, 0].double()
    peak = mean_score(cls[:, LOG_PEAK])
    found = {
        "cls_entropy": mean_score(100 * cls[:, ENTROPY] / even, "%"),
        "cls_peak": Score(math.exp(peak.value), math.exp(peak.low), math.exp(peak.high), "x median", "lower"),
        "cls_on_patches": mean_score(100 * cls[:, ON_PATCHES], "%"),
    }
    if seen.outliers.any():
        found["cls_outlier_mass"] = mean_score(100 * cls[:, OUTLIER_MASS], "%", "lower")
        found["cls_outlier_excess"] = _excess(cls[:, OUTLIER_MASS], seen)
    for name, column, least in (
        ("cls_registers_cosine", CLS_COSINE, 2),
        ("registers_cosine", COSINE, 3),
        ("cls_registers_divergence", CLS_DIVERGENCE, 2),
        ("registers_divergence", DIVERGENCE, 3),
    ):
        if seen.similarities.shape[1] >= least:
            found[name] = mean_score(seen.pairs[:, column])
    return found


def _excess(mass: Tensor, seen: Seen) -> Score:
    """How many times its share of the patches the outliers get."""
    share = seen.outliers.double() / seen.average.shape[1]
    low, high = bootstrap(torch.stack([mass, share], 1), lambda sums: sums[:, 0] / sums[:, 1].clamp(min=1e-12))
    return Score(float(mass.sum() / share.sum()), low, high, "x", "lower")


def tell_tokens(seen: Seen, grid: tuple[int, int]) -> list[dict[str, Any]]:
    """Of CLS, of each register and of the patch in the middle, means over images."""
    count = seen.tokens.shape[1]
    names = ["CLS", *(f"register {number}" for number in range(count - 2)), "central patch"]
    even = math.log(seen.average.shape[1])
    means = seen.tokens.double().mean(0)
    middle = ((grid[0] - 1) / 2, (grid[1] - 1) / 2)
    told = []
    for at, name in enumerate(names):
        origin = central_patch(grid) if at == count - 1 else middle
        lie = lie_of(seen.average[at].unflatten(0, grid), origin)._asdict()
        told.append(
            {
                "name": name,
                "on_patches": float(means[at, ON_PATCHES]),
                "entropy": float(means[at, ENTROPY]),
                "entropy_share": float(means[at, ENTROPY]) / even if even else None,
                "head_entropy_share": float(means[at, HEAD_ENTROPY]) / even if even else None,
                "peak": math.exp(float(means[at, LOG_PEAK])),
                "outlier_mass": _or_none(float(means[at, OUTLIER_MASS]), seen),
                **{key: None if math.isnan(value) else value for key, value in lie.items()},
            }
        )
    return told


def tell_heads(seen: Seen) -> list[dict[str, Any]]:
    """Of each head of CLS, means over images."""
    even = math.log(seen.average.shape[1])
    return [
        {
            "on_patches": on_patches,
            "entropy_share": entropy / even if even else None,
            "peak": math.exp(peak),
            "outlier_mass": _or_none(mass, seen),
        }
        for on_patches, entropy, peak, mass in seen.heads.tolist()
    ]


def _or_none(mass: float, seen: Seen) -> float | None:
    """Nothing is spent on outliers where there are none, which says nothing."""
    return mass if seen.outliers.any() else None


def _share(seen: Seen) -> float:
    return float(seen.outliers.double().mean()) / seen.average.shape[1]


def _outlier_layer(backbone: Backbone, cfg: AttentionConfig) -> int:
    try:
        return choose_layer(backbone, cfg.outlier_layer)
    except ConfigError as error:
        raise ConfigError(error.message, "outlier_layer") from None


def _grid(look: Look, size: int) -> tuple[int, int]:
    return (size // look.backbone.patch_size,) * 2


def _cpu(found: Attended) -> Attended:
    return Attended(found.weights.cpu(), found.norms.cpu())


def _maps(maps: Sequence[Attended], shown: Sequence[int], look: Look, size: int) -> dict[str, Tensor]:
    """photo_maps: (photos, 1 + shown registers, h, w), mean over heads; photo_heads: (photos, heads, h, w) of CLS."""
    if not maps:
        return {}
    weights = torch.cat([each.weights for each in maps]).unflatten(-1, _grid(look, size))
    chosen = weights.mean(1)[:, [0, *(1 + number for number in shown)]]
    return {"photo_maps": chosen, "photo_heads": weights[:, :, 0]}


def _notes(cutoff: Cutoff, look: Look, map_size: int) -> list[str]:
    value = "no cutoff" if cutoff.value is None else f"cutoff {cutoff.value:.4g}"
    said = [f"{value}: {cutoff.how}"]
    if map_size != look.size:
        said.append(f"measured at {look.size} pixels, maps of photos computed at {map_size}")
    return said
