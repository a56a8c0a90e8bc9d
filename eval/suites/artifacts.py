"""`artifacts`: patches whose tokens stand out, which they are, since which layer, and what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.models.vit import VisionTransformer
from dinoreg.models.weights import load_backbone
from eval.backbone import Backbone
from eval.images import Part
from eval.inside.artifacts.clouds import Cutoff, check_rule
from eval.inside.artifacts.cutoff import decide_cutoff, evenly
from eval.inside.artifacts.neighbours import How
from eval.inside.artifacts.norms import look_at_norms, norm_histogram, patch_norms_at
from eval.inside.artifacts.places import look_both_ways, resampling_gradient, smaller_grid
from eval.inside.artifacts.probes import (
    TRAINED,
    Mix,
    ProbeTask,
    chance,
    draw_tokens,
    equal_sizes,
    probe_pixels,
    probe_position,
    score_probes,
)
from eval.inside.artifacts.single import Fitting, classify, draw_single
from eval.inside.artifacts.summary import tell_layers, tell_map, tell_neighbours, tell_norms, tell_places, tell_types
from eval.inside.artifacts.tally import add_up
from eval.inside.artifacts.training import find_steps, tell_step
from eval.inside.look import Look, LookConfig
from eval.results import Result, Score
from eval.suite import Context


@dataclass
class ArtifactsConfig(LookConfig):
    """Of "Vision Transformers Need Registers", section 2 and appendix A; what it leaves open is an option here."""

    layer: int = -1  # after which outliers are told; large networks may hide them in the last one, -1
    cutoff: str = "valley"  # or 3std (mean + 3 standard deviations), a quantile as q0.98, or a norm such as 150
    cutoff_images: int = 256  # on which the cutoff is found, before all images are looked at with it
    neighbours: How = "mean"  # cosine of a patch to its neighbours: their mean, or once for each of them (pairs)
    neighbours_border: bool = True  # patches on the border count, with the neighbours they have
    neighbours_embedded: bool = False  # compared after positions were added to the patch embedding
    normed: bool = True  # tokens that are probed and classified pass the final norm
    seed: int = 0  # of all tokens that are drawn at random
    probe_images: int = 1000  # half of them train the probes of position and pixels; 0 = no such probes
    probe_tokens: int = 32  # of an image, at most
    probe_mix: Mix = "natural"  # training tokens as they come, or as many outliers as normal ones (balanced)
    probe_equal: bool = False  # as many normal patches as outliers are tested
    probe_c: float = 0.1  # strength of the position probe, whose penalty is |W|^2 / 2C
    probe_iterations: int = 200  # of L-BFGS, at most
    probe_ridge: float = 1e-3  # penalty of the pixel probe
    draws: int = 5  # of a random token an image, for single tokens that are classified; 0 = none are
    c_low: float = -6.0  # exponents of the smallest and the largest C for single tokens
    c_high: float = 5.0
    c_steps: int = 12  # values between them: every fourth of DINOv2's 45
    c_iterations: int = 1000  # of L-BFGS, at most
    tol: float = 1e-6
    heldout: float = 0.1  # share of the training images on which C is chosen
    step_images: int = 64  # that each earlier checkpoint of the run is shown; 0 = none
    most_steps: int = 40  # checkpoints of the run, evenly spaced
    resampled_images: int = 200  # that are looked at with and without antialiased positions; 0 = none

    @staticmethod
    def quick() -> list[str]:
        """Fewer images, values of C and draws."""
        return [
            "images=200", "train_images=1000", "cutoff_images=100", "probe_images=200", "draws=2",
            "c_low=-2", "c_high=2", "c_steps=3", "c_iterations=100", "tol=1e-4",
            "step_images=32", "most_steps=10", "resampled_images=50",
        ]  # fmt: skip

    def check(self) -> None:
        """Raises ConfigError."""
        super().check()
        check_rule(self.cutoff)
        for key in ("cutoff_images", "probe_tokens", "probe_iterations", "c_steps", "c_iterations", "most_steps"):
            if getattr(self, key) < 1:
                raise ConfigError("must be at least 1", key)
        for key in ("probe_images", "draws", "step_images", "resampled_images", "tol"):
            if getattr(self, key) < 0:
                raise ConfigError("cannot be negative", key)
        for key in ("probe_c", "probe_ridge"):
            if not getattr(self, key) > 0:
                raise ConfigError("must be positive", key)
        if not -30 <= self.c_low <= self.c_high <= 30:
            raise ConfigError("exponents of 10 between -30 and 30, the lower one first", "c_low")
        if not 0 < self.heldout < 1:
            raise ConfigError("must be a share, between 0 and 1", "heldout")

    def fitting(self) -> Fitting:
        """Of single tokens."""
        grid = [float(c) for c in np.logspace(self.c_low, self.c_high, self.c_steps)]
        return Fitting(grid, self.c_iterations, self.tol, self.heldout, self.seed)


@dataclass
class Findings:
    """What the parts of the experiment add to its result."""

    details: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Measuring:
    """One network, its images, and who is an outlier."""

    look: Look
    cfg: ArtifactsConfig
    layer: int
    cutoff: Cutoff
    found: Findings

    def some(self, most: int) -> Part:
        """At most so many of the images, evenly spaced."""
        return evenly(self.look.part, most)


def run(backbone: Backbone, cfg: ArtifactsConfig, context: Context) -> Result:
    """The cutoff first, from some of the images; then all of them, with each token's norm against it; then the rest."""
    look = Look(backbone, cfg, context)
    layer = choose_layer(backbone, cfg.layer)
    cutoff, found_on = decide_cutoff(look, cfg.cutoff, cfg.cutoff_images, layer)
    context.say(f"artifacts: {cutoff.how}")
    told = {"value": cutoff.value, "rule": cutoff.rule, "how": cutoff.how, **found_on}
    value = "no cutoff" if cutoff.value is None else f"cutoff {cutoff.value:.4g}"
    found = Findings({"layer": layer, "cutoff": told}, notes=[f"{value}: {cutoff.how}"])
    measuring = Measuring(look, cfg, layer, cutoff, found)
    for part in (measure_norms, draw_maps, measure_probes, measure_single, measure_steps, measure_resampling):
        part(measuring)
    return look.result("artifacts", found.scores, found.notes, found.arrays, **found.details)


def choose_layer(backbone: Backbone, asked: int) -> int:
    """The layer from 0 on. Raises ConfigError."""
    if not -backbone.depth <= asked < backbone.depth:
        raise ConfigError(f"the network has {backbone.depth} layers: no layer {asked}", "layer")
    return range(backbone.depth)[asked]


def _norms_of(at: Measuring, model: VisionTransformer, part: Part, what: str) -> Tensor:
    """The histogram of another network's norms."""
    measured = at.look.through(lambda batch: norm_histogram(model, batch, at.layer), what, part)
    return add_up(measured, at.look.context.ranks).sums["norms"]


def measure_norms(at: Measuring) -> None:
    """1.1 to 1.3, 1.6, and the positions of 1.12: everything that is counted over all images."""
    look, cfg, model = at.look, at.cfg, at.look.backbone.model
    options = (at.layer, at.cutoff.number(), cfg.neighbours, cfg.neighbours_border, cfg.neighbours_embedded)
    measured = look.through(lambda batch: look_at_norms(model, batch, *options), "norms of all tokens")
    tally = add_up(measured, look.context.ranks)
    at.found.details |= {"layers": tell_layers(tally), "types": tell_types(tally, at.layer)}
    for name, (told, scores) in {
        "norms": tell_norms(tally, at.layer),
        "neighbours": tell_neighbours(tally),
        "places": tell_places(tally, look.grid),
    }.items():
        at.found.details[name] = told
        at.found.scores |= scores
    kept = ("layers", "outlier_layers", "types", "type_moments", "place_norms")
    at.found.arrays |= {name: tally.sums[name] for name in kept}
    at.found.arrays |= {name: tally.sums[name].sum(0) for name in ("places", "cosines", "seen")}


def draw_maps(at: Measuring) -> None:
    """The maps of 1.1."""
    look = at.look
    pixels, _ = look.photos()
    with torch.no_grad():
        maps = [patch_norms_at(look.backbone.model, look.prepare(each[None]), at.layer).cpu() for each in pixels]
    at.found.arrays["photos"] = pixels
    at.found.arrays["photo_norms"] = torch.cat(maps).unflatten(1, look.grid) if maps else torch.empty(0, *look.grid)


def measure_probes(at: Measuring) -> None:
    """1.4"""
    look, cfg, backbone = at.look, at.cfg, at.look.backbone
    if not cfg.probe_images or len(look.part) < 2:
        return
    task = ProbeTask(at.layer, at.cutoff.number(), cfg.probe_tokens, cfg.probe_mix, cfg.normed, cfg.seed)
    part = at.some(cfg.probe_images)
    measured = look.through(lambda batch: draw_tokens(backbone.model, batch, task), "tokens for probes", part)
    rows = add_up(measured, look.context.ranks).rows
    rows = equal_sizes(rows, cfg.seed) if cfg.probe_equal else rows
    trained = rows["role"] == TRAINED
    if not trained.any():
        at.found.notes.append("no image to train probes on (1.4)")
        return
    device, std = look.context.device, backbone.normalisation[1]
    look.context.say(f"artifacts: probes of position and pixels on {len(rows['place']):,} tokens")
    found = look.context.ranks.from_main(
        lambda: (
            probe_position(rows, look.grid, cfg.probe_c, cfg.probe_iterations, device)
            | probe_pixels(rows, std, cfg.probe_ridge, device)
        )
    )
    told, scores = score_probes(rows, found)
    at.found.details["probes"] = {
        **told,
        "chance": chance(look.grid),
        "trained": {"tokens": int(trained.sum()), "images": len(rows["place"][trained].unique())},
    }
    at.found.scores |= scores


def measure_single(at: Measuring) -> None:
    """1.5, where the images have classes."""
    look, cfg = at.look, at.cfg
    if look.train is None or look.num_classes < 2 or not cfg.draws:
        if cfg.draws:
            at.found.notes.append("no classes: single tokens were not classified (1.5)")
        return
    model, options = look.backbone.model, (at.layer, at.cutoff.number(), cfg.draws, cfg.seed, cfg.normed)
    both: list[dict[str, Tensor]] = []
    for part, what in ((look.train, "single tokens of training images"), (look.part, "single tokens of test images")):
        measured = look.through(lambda batch: draw_single(model, batch, *options), what, part)
        both.append(add_up(measured, look.context.ranks).rows)
    look.context.say("artifacts: single tokens are classified")
    told, scores = classify(both[0], both[1], look.backbone.num_registers, cfg.draws, cfg.fitting(), look.context.ranks)
    at.found.details["single"] = told
    at.found.scores |= scores


def measure_steps(at: Measuring) -> None:
    """1.2, along the training of the run, where the weights are of one."""
    look, cfg = at.look, at.cfg
    steps = look.context.ranks.from_main(lambda: find_steps(look.context.weights, cfg.most_steps))
    if not steps or not cfg.step_images:
        return
    part, told, tables = at.some(cfg.step_images), [], []
    for step, path in steps:
        model = load_backbone(path).to(look.context.device).eval()
        counts = _norms_of(at, model, part, f"norms at step {step:,}")
        told.append(tell_step(step, counts.numpy(), at.cutoff.value, cfg.cutoff))
        tables.append(counts)
    at.found.details["steps"] = {"images": len(part), "tokens": int(tables[0].sum()), "told": told}
    at.found.arrays["steps"] = torch.stack(tables)


def measure_resampling(at: Measuring) -> None:
    """1.12, with and without antialiasing, at a size where positions are resampled."""
    look, cfg, model = at.look, at.cfg, at.look.backbone.model
    at.found.details["rotary"] = model.pos_embed is None
    if model.pos_embed is None:
        at.found.notes.append("positions are rotary: nothing is resampled (1.12)")
        return
    native, side = model.grid[0], smaller_grid(model.grid[0], look.grid[0])
    if not cfg.resampled_images or side == native:
        return
    part = at.some(cfg.resampled_images)
    options = (side, at.layer, at.cutoff.number())
    measured = look.through(lambda batch: look_both_ways(model, batch, *options), "with and without antialiasing", part)
    sums = add_up(measured, look.context.ranks).sums
    grids = model.grid, (side, side)
    at.found.arrays |= {"resampled_places": sums["places"], "resampled_norms": sums["place_norms"]}
    gradients = [resampling_gradient(*grids, antialias=antialias) for antialias in (True, False)]
    at.found.arrays["resampling_gradients"] = torch.from_numpy(np.stack(gradients))
    at.found.details["resampled"] = {
        "native": native,
        "side": side,
        "as_used": side == look.grid[0],
        "gradient_std": [float(each.std()) for each in gradients],
        "told": [tell_map(*pair, int(sums["seen"]), grids[1]) for pair in _pairs(sums)],
    }


def _pairs(sums: dict[str, Tensor]) -> Sequence[tuple[Tensor, Tensor]]:
    """Outliers and norms by position, with antialiasing and without."""
    return list(zip(sums["places"], sums["place_norms"], strict=True))
