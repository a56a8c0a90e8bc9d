"""`decoupling`: what CLS is made of, patches, registers or itself (Lappe and Giese 2025, arXiv 2505.05892)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoreg.config import ConfigError
from eval.backbone import Backbone
from eval.compute import autocast
from eval.inside.decoupling.measure import ROW, Measured, measure, part_names
from eval.inside.decoupling.oneshot import build_prototypes, draw_shots
from eval.inside.decoupling.split import Choices
from eval.inside.decoupling.summary import ckas, clutter_told, headlines, one_shot, patch_against, rebuild
from eval.inside.decoupling.tally import Table, Tally, by_layer, choose_blocks
from eval.inside.look import Batch, Look, LookConfig
from eval.results import Result
from eval.suite import Context

GREY = 128
KEPT = 5000  # images whose rows are kept for figures


@dataclass
class DecouplingConfig(LookConfig):
    """Where the paper says nothing, the default is what it most likely did, or what needs least."""

    images: int = 5000  # plain CKA of things that have nothing in common falls with their number
    renormalise: bool = False  # where one group is kept, its weights are scaled so that they sum to 1 in each head
    own: bool = True  # all that attention adds has in it what CLS reads from itself
    bias: bool = False  # what attention adds, and each part of it, has the output bias
    layers: list[int] = field(default_factory=list)  # blocks whose CKA is measured, the last too; empty = all that fit
    moments_gib: float = 9.0  # memory for the covariances of blocks, on the device; ViT-g takes this for all of its 40
    draws: int = 5  # training images a class in turn, for the one-shot classification
    ridge_images: int = 5000  # about how many, drawn evenly, the ridge regressions see

    @staticmethod
    def quick() -> list[str]:
        return ["images=1000", "train_images=2000", "ridge_images=1000"]

    def check(self) -> None:
        """Raises ConfigError."""
        super().check()
        for key in ("draws", "ridge_images"):
            if getattr(self, key) < 1:
                raise ConfigError("must be at least 1", key)
        if not self.moments_gib > 0:
            raise ConfigError("must be positive", "moments_gib")


def run(backbone: Backbone, cfg: DecouplingConfig, context: Context) -> Result:
    """All ranks measure their share; what is solved and summed up at the end, the main one does."""
    look = Look(backbone, cfg, context)
    choices = Choices(cfg.renormalise, cfg.own, cfg.bias)
    blocks = _blocks(backbone, cfg, choices)
    photos, names = look.photos()
    first = photos if len(photos) else torch.full((1, 3, look.size, look.size), GREY, dtype=torch.uint8)
    start = _measured_at_once(look, first, choices, blocks)
    prototypes = _prototypes(look, cfg, choices)
    tally = Tally(backbone.model, choices, blocks, start, max(1, len(look.part) // cfg.ridge_images))
    for found in look.through(lambda batch: measure(backbone.model, batch, choices, blocks, prototypes), "images"):
        tally.add(found)
    table = tally.reduce(context.ranks)
    told = context.ranks.from_main(lambda: _told(table, tally, look, prototypes))
    arrays = {**_arrays(table, tally), **(_photo_arrays(start, photos, look) if len(photos) else {})}
    notes = _notes(prototypes)
    scores = headlines(table, told["cka"], told["one_shot"])
    return look.result("decoupling", scores, notes, arrays, **told, photos=names)


def _blocks(backbone: Backbone, cfg: DecouplingConfig, choices: Choices) -> list[int]:
    parts = len(part_names(choices, backbone.num_registers))
    try:
        return choose_blocks(backbone.depth, cfg.layers, cfg.moments_gib * 2**30, parts, backbone.embed_dim)
    except IndexError as error:
        raise ConfigError(f"the network has {backbone.depth} blocks, and not all of {cfg.layers}", "layers") from error


def _measured_at_once(look: Look, pixels: Tensor, choices: Choices, blocks: list[int]) -> Measured:
    """The few images whose maps are drawn."""
    count = torch.arange(len(pixels))
    with torch.no_grad(), autocast(look.context.device, look.precision):
        batch = Batch(pixels.to(look.context.device), look.prepare(pixels), count, torch.zeros_like(count))
        return measure(look.backbone.model, batch, choices, blocks)


def _prototypes(look: Look, cfg: DecouplingConfig, choices: Choices) -> Tensor | None:
    """Whole outputs of the drawn training images, by draw and class; None without labels."""
    if look.train is None:
        return None
    shots = draw_shots(look.train.labels, cfg.draws, look.num_classes)
    rows = np.unique(shots[shots >= 0])
    model = look.backbone.model
    mine: dict[int, Tensor] = {}

    def whole(batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.places, measure(model, batch, choices, []).points[:, :, 0].float().cpu()

    for places, outputs in look.through(whole, "one shot", look.train.subset(rows)):
        mine |= dict(zip(rows[places.numpy()].tolist(), outputs, strict=True))
    found = {place: each for share in look.context.ranks.gather_objects(mine) for place, each in share.items()}
    return build_prototypes(found, shots, torch.zeros(3, look.backbone.embed_dim, device=look.context.device))


def _notes(prototypes: Tensor | None) -> list[str]:
    if prototypes is None:
        return ["without labels there is no one-shot classification"]
    lacking = int((~prototypes.flatten(2).any(-1)).all(0).sum())
    said = f"{lacking} of {prototypes.shape[1]} classes have no training image, and are not found by one image a class"
    return [said] if lacking else []


def _told(table: Table, tally: Tally, look: Look, prototypes: Tensor | None) -> dict[str, Any]:
    """The details."""
    model = look.backbone.model
    return {
        "images": len(table.places),
        "registers": model.num_registers,
        "patches": look.grid[0] * look.grid[1],
        "depth": model.depth,
        "layers": by_layer(table.rows, ROW),
        "cka": ckas(tally),
        "longest": tally.registers.told(),
        "one_shot": None if prototypes is None else one_shot(table, tally.kinds),
        "shots": None if prototypes is None else list(prototypes.shape[:2]),
        "rebuilt": rebuild(table, look.context.device),
        "clutter": clutter_told(table),
    }


def _arrays(table: Table, tally: Tally) -> dict[str, Any]:
    """What figures are drawn from: of at most KEPT images, evenly spaced."""
    step = max(1, -(-len(table.places) // KEPT))
    found = {
        "last": table.rows[::step, -1],
        "clutter": table.clutter[::step],
        "patch_against_registers": patch_against(table, "registers")[::step],
        "patch_against_skip": patch_against(table, "skip")[::step],
        "heads": table.heads.mean(0),
        "lengths": table.lengths[::step],
    }
    return found | ({"profile": tally.registers.profile()} if table.lengths.shape[1] else {})


def _photo_arrays(start: Measured, photos: Tensor, look: Look) -> dict[str, Any]:
    """Images uint8 (n, S, S, 3) and the attention of CLS on their patches (n, h, w)."""
    return {
        "photos": photos.permute(0, 2, 3, 1),
        "maps": start.attention.unflatten(1, look.grid).cpu(),
        "photo_rows": start.rows[:, -1],
    }
