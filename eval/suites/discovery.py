"""`discovery`: LOST finds one object an image, without labels, by how the patches of a network agree."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.parallel.precision import Precision, resolve_precision
from eval.backbone import Backbone
from eval.boxes.boxed import BoxedImages
from eval.boxes.opening import open_boxes
from eval.images import draw_evenly
from eval.inside.discovery.images import Sight, choose_short
from eval.inside.discovery.judging import Verdict, draw_tuning, standing_out
from eval.inside.discovery.lost import COMPANY
from eval.inside.discovery.photos import as_arrays, look_at
from eval.inside.discovery.search import Outcome, Search
from eval.inside.discovery.sweep import Scale, Sweep
from eval.inside.finding import counted
from eval.probe import all_alike
from eval.results import Result
from eval.suite import Context

# As multiples of the patches' mean squared length: from nothing to as much as patches could agree at the most. A bias
# above 0 would make more patches agree, and boxes grow until they are the whole image.
BIASES = [0.0, -0.01, -0.02, *(round(-0.05 * step, 2) for step in range(1, 20)), -0.97, -0.98, -0.99]
MOST_PATCHES = 6400  # COCO's largest images in patches of 8 pixels


@dataclass
class DiscoveryConfig:
    """LOST's, and the registers paper's bias on the Gram matrix. The first block and feature are the published ones."""

    blocks: list[int] = field(default_factory=lambda: [-1, -2, -3, -4])  # whose attention's features are tried
    features: list[str] = field(default_factory=lambda: ["k", "q", "v"])  # keys, queries, values
    biases: list[float] = field(default_factory=lambda: list(BIASES))  # that are tried, after none at all
    bias_unit: Literal["length", "absolute"] = "length"  # times the patches' mean squared length, or as they are
    unit_length: bool = False  # patches are scaled to length 1 first
    company: int = COMPANY  # patches of the lowest degrees among which the seed expands
    tune_share: float = 0.2  # of the images, on which block, feature and bias are chosen; the others judge the choice
    seed: int = 0  # of who is among them
    # Short side in pixels; -1 = as images are; 0 = the same, but twice the training size where that is below 128.
    image_size: int = 0
    max_patches: int = MOST_PATCHES  # an image is seen smaller where it would be more
    images: int = 0  # drawn from the set; 0 = all
    split: str = "trainval"  # the list of images, in Pascal VOC's layout
    no_hard: bool = False  # leave out objects marked truncated or difficult, and images without others
    names: str = ""  # a text file with the images that count, as COCO20k's
    photos: int = 6  # of the images that judge, whose maps are drawn
    batch: int = 16  # images of the same size that pass through the network together
    precision: Precision = "fp32"  # of the network
    max_bad_share: float = 0.01  # of the images may be unreadable; they are counted, named and left out

    @staticmethod
    def quick() -> list[str]:
        """The last block, and few images."""
        return ["blocks=[-1]", "images=200", "photos=4"]

    def check(self) -> None:
        """Raises ConfigError."""
        for key, least in (("company", 1), ("max_patches", 1), ("images", 0), ("photos", 0), ("batch", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"must be at least {least}", key)
        if self.image_size < -1:
            raise ConfigError("pixels, 0 or -1", "image_size")
        for key in ("blocks", "features"):
            if not (said := getattr(self, key)) or len(set(said)) < len(said):
                raise ConfigError("at least one, none twice", key)
        if set(self.features) - set("qkv"):
            raise ConfigError("of q, k and v", "features")
        if not 0 <= self.tune_share < 1:
            raise ConfigError("must be a share, from 0 to less than 1", "tune_share")
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError("must be a share, between 0 and 1", "max_bad_share")


def run(backbone: Backbone, cfg: DiscoveryConfig, context: Context) -> Result:
    """One box an image for every block, feature and bias, and how many are right."""
    if (channels := backbone.model.in_channels) != 3:
        raise ConfigError(f"the network takes images of {channels} channels, and these are RGB", "--weights")
    images = context.ranks.from_main(lambda: _open(cfg, context))
    blocks = _blocks(cfg, backbone.depth)
    short = choose_short(cfg.image_size, backbone.image_size)
    sight = Sight(backbone.patch_size, short, cfg.max_patches)
    precision: Precision = context.ranks.broadcast_object(resolve_precision(cfg.precision, context.device))
    sweep = Sweep(
        backbone, blocks, cfg.features, sight, company=cfg.company, unit_length=cfg.unit_length, precision=precision
    )
    search = Search(images, sweep, context, cfg.batch, cfg.max_bad_share)
    tried = list(dict.fromkeys([0.0, *cfg.biases]))
    scale = search.scale()
    lengths = scale.lengths if cfg.bias_unit == "length" else torch.ones_like(scale.lengths)
    biases = (lengths[..., None] * torch.tensor(tried, dtype=torch.float64)).float()
    outcome = search.through(biases, scale.cutoffs)
    verdict = Verdict(outcome, draw_tuning(len(images), cfg.tune_share, cfg.seed)[outcome.places])
    protocol = {
        **asdict(cfg),
        "blocks": blocks,
        "biases": tried,
        "short_side": short or "as it is",
        "precision": precision,
    }
    model = backbone.model.config
    protocol |= {"pos_antialias": model.pos_antialias, "pos_offset": model.pos_offset, "boxes": images.layout}
    details = _details(verdict, cfg, blocks, biases, tried, scale)
    arrays = _arrays(outcome, verdict)
    if context.ranks.is_main:
        photos = look_at(search, verdict, biases, cfg.photos)
        arrays |= as_arrays(photos)
        details["photos"] = [photo.about for photo in photos]
    notes = _notes(cfg, verdict, search, short, tried)
    return Result("discovery", verdict.scores(), protocol, _data(images, search), notes, details, arrays=arrays)


def _open(cfg: DiscoveryConfig, context: Context) -> BoxedImages:
    images = open_boxes(context.data, cfg.split, not cfg.no_hard, cfg.names)
    chosen = images.subset(draw_evenly(torch.zeros(len(images), dtype=torch.int64), cfg.images))
    if not any(len(entry.boxes) for entry in chosen.entries):
        raise ConfigError(f"none of the {len(chosen)} images has a box", "--data")
    return chosen


def _blocks(cfg: DiscoveryConfig, depth: int) -> list[int]:
    """Counted from 0; a shallow network has no more. Raises ConfigError where the first is not there."""
    if not -depth <= cfg.blocks[0] < depth:
        raise ConfigError(f"the network has {depth} blocks", "blocks")
    return list(dict.fromkeys(block % depth for block in cfg.blocks if -depth <= block < depth))


def _details(verdict: Verdict, cfg: DiscoveryConfig, blocks: list[int], biases: Tensor, tried: list[float],
             scale: Scale) -> dict[str, Any]:  # fmt: skip
    outcome, count = verdict.outcome, len(verdict.outcome.places)
    inside, seconds = outcome.seconds
    details: dict[str, Any] = {
        "images": count,
        "empty": int(outcome.empty.sum()),
        "patches": [int(outcome.patches.min()), int(np.median(outcome.patches)), int(outcome.patches.max())],
        "blocks": blocks,
        "features": list(cfg.features),
        "tried": tried,
        "bias_unit": cfg.bias_unit,
        "squared_lengths": scale.lengths.tolist(),
        "standing_out": standing_out(outcome, scale.cutoffs),
        "floors": {name: int(outcome.floors[:, at].sum()) for at, name in enumerate(("whole", "middle"))},
        "table": verdict.table(blocks, cfg.features),
        "chosen": None,
        "speed": {"seconds": round(seconds, 3), "share_computing": round(inside / max(seconds, 1e-9), 3)},
    }
    if verdict.can_choose:
        choice = verdict.best_of_all()
        right = verdict.right(choice)
        details["chosen"] = {
            "block": blocks[choice.block],
            "feature": cfg.features[choice.feature],
            "tried": tried[choice.bias],
            "bias": float(biases[choice.block, choice.feature, choice.bias]),
            "tuning": [int(right[verdict.tuning].sum()), int(verdict.tuning.sum())],
            "tested": [int(right[~verdict.tuning].sum()), int((~verdict.tuning).sum())],
        }
    return details


def _arrays(outcome: Outcome, verdict: Verdict) -> dict[str, Any]:
    """(L, F, S): images in which the box is right, of all and of those that choose; seeds outside; mean areas."""
    return {
        "right": outcome.right.sum(0),
        "right_tuning": outcome.right[verdict.tuning].sum(0),
        "outside": outcome.outside.sum(0),
        "areas": outcome.areas.mean(0),
    }


def _notes(cfg: DiscoveryConfig, verdict: Verdict, search: Search, short: int, tried: list[float]) -> list[str]:
    outcome = verdict.outcome
    notes = [f"boxes of all classes count alike ({search.images.layout})"]
    if short:
        why = (
            "" if cfg.image_size else ", as the network was trained on small ones: image_size=-1 shows them as they are"
        )
        notes.append(f"images are resized to a short side of {short} pixels{why}")
    if outcome.empty.any():
        notes.append(f"without any box: {counted(outcome.empty.sum(), 'image')}, where whatever is found is wrong")
    if outcome.resized.any():
        notes.append(
            f"of another size than the annotation says: {counted(outcome.resized.sum(), 'image')}, where boxes may be "
            "in the wrong place"
        )
    if verdict.can_choose:
        notes.append(
            f"corloc_tuned: block, feature and bias were chosen by the boxes of {int(verdict.tuning.sum())} images, "
            f"and the score is of the {int((~verdict.tuning).sum())} others; all other scores are of all images"
        )
        counts = outcome.right[verdict.tuning][..., : len(tried)].sum(0)
        notes += all_alike((100 * counts / verdict.tuning.sum()).ravel().tolist())
        if (best := tried[verdict.best_of_all().bias]) and best == min(tried):
            notes.append(f"the chosen bias, {best:g}, is the lowest that was tried: a lower one may be better")
    else:
        notes.append("no image was held out to choose a bias with: there is no tuned score")
    if search.bad:
        notes.append(f"{len(search.bad)} images could not be read and were left out")
    return notes


def _data(images: BoxedImages, search: Search) -> dict[str, Any]:
    context = search.context
    return {
        "name": Path(str(context.data)).name,
        "path": str(context.data),
        "hash": context.ranks.from_main(images.digest)[:16],
        "train": 0,
        "test": len(images),
        "boxes": sum(len(entry.boxes) for entry in images.entries),
        "bad": search.bad,
    }
