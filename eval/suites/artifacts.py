"""`artifacts`: patches whose tokens stand out, which they are, since which layer, and what is in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoreg.config import ConfigError
from eval.backbone import Backbone
from eval.inside.artifacts.clouds import Cutoff, check_rule, find_cutoff
from eval.inside.artifacts.neighbours import How
from eval.inside.artifacts.norms import look_at_norms, norm_histogram, patch_norms_at
from eval.inside.artifacts.summary import tell_layers, tell_neighbours, tell_norms, tell_places, tell_types
from eval.inside.artifacts.tally import Tally, add_up
from eval.inside.look import Look, LookConfig
from eval.results import Result, Score
from eval.suite import Context


@dataclass
class ArtifactsConfig(LookConfig):
    """Of "Vision Transformers Need Registers", section 2 and appendix A; what it leaves open is an option here."""

    layer: int = (
        -1
    )  # after which outliers are told, counted as into a list; large networks may hide them in the last one
    cutoff: str = "valley"  # or 3std (mean + 3 standard deviations), a quantile as q0.98, or a norm such as 150
    cutoff_images: int = 256  # on which the cutoff is found, before all images are looked at with it
    neighbours: How = "mean"  # cosine of a patch to its neighbours: their mean, or once for each of them (pairs)
    neighbours_border: bool = True  # patches on the border count, with the neighbours they have
    neighbours_embedded: bool = False  # compared after positions were added to the patch embedding

    @staticmethod
    def quick() -> list[str]:
        """Fewer images."""
        return ["images=200", "train_images=1000", "cutoff_images=100"]

    def check(self) -> None:
        """Raises ConfigError."""
        super().check()
        check_rule(self.cutoff)
        if self.cutoff_images < 1:
            raise ConfigError("must be at least 1", "cutoff_images")


def run(backbone: Backbone, cfg: ArtifactsConfig, context: Context) -> Result:
    """The cutoff first, from some of the images; then all of them, with each token's norm against it."""
    look = Look(backbone, cfg, context)
    layer = choose_layer(backbone, cfg.layer)
    cutoff, found_on = decide_cutoff(look, cfg, layer)
    context.say(f"artifacts: {cutoff.how}")
    options = (layer, cutoff.number(), cfg.neighbours, cfg.neighbours_border, cfg.neighbours_embedded)
    measured = look.through(lambda batch: look_at_norms(backbone.model, batch, *options), "norms of all tokens")
    tally = add_up(measured, context.ranks)
    scores: dict[str, Score] = {}
    details: dict[str, Any] = {
        "layer": layer,
        "cutoff": {"value": cutoff.value, "rule": cutoff.rule, "how": cutoff.how, **found_on},
        "layers": tell_layers(tally),
        "types": tell_types(tally, layer),
    }
    for name, (told, scored) in {
        "norms": tell_norms(tally, layer, cutoff),
        "neighbours": tell_neighbours(tally),
        "places": tell_places(tally, look.grid),
    }.items():
        details[name] = told
        scores |= scored
    return look.result("artifacts", scores, _notes(cutoff), arrays_of(look, tally, layer), **details)


def choose_layer(backbone: Backbone, asked: int) -> int:
    """The layer from 0 on. Raises ConfigError."""
    if not -backbone.depth <= asked < backbone.depth:
        raise ConfigError(f"the network has {backbone.depth} layers: no layer {asked}", "layer")
    return range(backbone.depth)[asked]


def decide_cutoff(look: Look, cfg: ArtifactsConfig, layer: int) -> tuple[Cutoff, dict[str, int]]:
    """And the numbers of images and tokens on which it was found. For all ranks together."""
    model, part = look.backbone.model, look.part
    try:
        float(cfg.cutoff)
    except ValueError:
        places = np.unique(np.linspace(0, len(part) - 1, min(cfg.cutoff_images, len(part))).round().astype(int))
        measured = look.through(
            lambda batch: norm_histogram(model, batch, layer), "norms, for the cutoff", part.subset(places)
        )
        counts = add_up(measured, look.context.ranks).sums["norms"].numpy()
        return find_cutoff(counts, cfg.cutoff), {"images": len(places), "tokens": int(counts.sum())}
    return find_cutoff(np.zeros(0, dtype=np.int64), cfg.cutoff), {"images": 0, "tokens": 0}


def arrays_of(look: Look, tally: Tally, layer: int) -> dict[str, Tensor]:
    """What figures are drawn from."""
    pixels, _ = look.photos()
    maps = [patch_norms_at(look.backbone.model, look.prepare(each[None]), layer).cpu() for each in pixels]
    arrays = {name: tally.sums[name] for name in ("layers", "outlier_layers", "types", "type_moments", "place_norms")}
    arrays |= {name: tally.sums[name].sum(0) for name in ("places", "cosines", "seen")}
    arrays["photos"] = pixels
    arrays["photo_norms"] = torch.cat(maps).unflatten(1, look.grid) if maps else torch.empty(0, *look.grid)
    return arrays


def _notes(cutoff: Cutoff) -> list[str]:
    value = "no cutoff" if cutoff.value is None else f"cutoff {cutoff.value:.4g}"
    return [f"{value}: {cutoff.how}"]
