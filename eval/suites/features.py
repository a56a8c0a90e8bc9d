"""`features`: what the strongest directions among patch tokens show, as maps (registers paper, figures 17 and 20)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.models.maps import principal_components
from eval.backbone import Backbone
from eval.inside.artifacts.bins import BINS, to_bins
from eval.inside.features.measures import (
    BEYOND,
    FIRST,
    FIRST_THREE,
    OF_NORM,
    SIGMAS,
    SMOOTH,
    Joint,
    Moments,
    joint_components,
    moments_of,
    note,
)
from eval.inside.look import Batch, Look
from eval.inside.maps import MapConfig, choose_map_size, of_each_photo
from eval.inside.rows import in_order
from eval.metrics import mean_score
from eval.results import Result, Score
from eval.suite import Context
from eval.suites.artifacts import choose_layer


@dataclass
class FeaturesConfig(MapConfig):
    """Patch tokens of the last block, after the final norm, as those get them who use the network."""

    norm: bool = True  # the final norm is applied; without it, long tokens are a direction of their own

    @staticmethod
    def quick() -> list[str]:
        """Fewer images."""
        return ["images=200"]


def run(backbone: Backbone, cfg: FeaturesConfig, context: Context) -> Result:
    """All images in one pass, each by itself and their sums; then the photos' maps."""
    look = Look(backbone, cfg, context)
    if math.prod(look.grid) < 4:
        raise ConfigError(f"a grid of {look.grid[0]} x {look.grid[1]} patches makes no map", "image_size")
    layer, map_size = choose_layer(backbone, cfg.layer), choose_map_size(look, cfg.map_size)
    rows, moments = measure_all(look, layer, cfg.norm)
    joint = joint_components(moments)
    photos, names, found = of_each_photo(
        look, map_size, lambda image: tokens_of(backbone, image, layer, cfg.norm)[0][0].float().cpu()
    )
    details = {
        "layer": layer,
        "depth": backbone.depth,
        "norm": cfg.norm,
        "images": len(rows),
        "patches": math.prod(look.grid),
        "width": backbone.embed_dim,
        "photos": names,
        "map_size": map_size,
        **_told(rows, joint),
    }
    arrays = {"photos": photos, "spectrum": joint.shares.cpu(), **_maps(found, map_size // backbone.patch_size)}
    notes = [] if map_size == look.size else [f"measured at {look.size} pixels, maps of photos computed at {map_size}"]
    return look.result("features", scores_of(rows), notes, arrays, **details)


def tokens_of(backbone: Backbone, images: Tensor, layer: int, norm: bool) -> tuple[Tensor, Tensor]:
    """Patch tokens (B, N, D) after a block, and their norms (B, N) before the final norm, which would hide them."""
    patches = backbone.layers(images, [layer], norm=False)[0].patches
    return (backbone.model.norm(patches) if norm else patches), patches.float().norm(dim=-1)


def measure_all(look: Look, layer: int, norm: bool) -> tuple[Tensor, Moments]:
    """What is noted of each image (n, 5), and the sums over all. For all ranks together."""

    def measure(batch: Batch) -> tuple[Tensor, Tensor, Moments]:
        tokens, norms = tokens_of(look.backbone, batch.images, layer, norm)
        return batch.places, note(tokens, norms, look.grid), moments_of(tokens, to_bins(norms), BINS)

    sums: list[Moments] = []

    def rows() -> Iterator[tuple[Tensor, Tensor]]:
        for places, noted, moments in look.through(measure, "components"):
            sums[:] = [sums[0] + moments] if sums else [moments]
            yield places, noted

    found = in_order(look.context.ranks, rows())
    shares = look.context.ranks.gather_objects([Moments(*(each.cpu() for each in sum_.tensors())) for sum_ in sums])
    first, *others = [moments for share in shares for moments in share]
    for moments in others:
        first = first + moments
    return found, first


def scores_of(rows: Tensor) -> dict[str, Score]:
    """Means over images, in percent, with intervals."""
    return {
        "first_component": mean_score(100 * rows[:, FIRST], "%"),
        "first_three_components": mean_score(100 * rows[:, FIRST_THREE], "%"),
        "first_beyond_3_sigma": mean_score(100 * rows[:, BEYOND], "%", "lower"),
        "first_explained_by_norm": mean_score(100 * rows[:, OF_NORM], "%", "lower"),
        "first_neighbour_correlation": mean_score(rows[:, SMOOTH]),
    }


def _told(rows: Tensor, joint: Joint) -> dict[str, Any]:
    return {
        "joint": {
            "first": float(joint.shares[0]),
            "first_three": float(joint.shares[:3].sum()),
            "of_place": joint.of_place,
            "of_norm": joint.of_norm,
        },
        "sigmas": SIGMAS,
    }


def _maps(tokens: list[Tensor], side: int) -> dict[str, Tensor]:
    """Scores of three components (photos, h, w, 3), of each photo by itself, and of all photos together."""
    if not tokens:
        return {}
    together = torch.stack(tokens)
    own = principal_components(together).scores
    joint = principal_components(together.flatten(0, 1)).scores.unflatten(0, together.shape[:2])
    return {
        name: scores.float().unflatten(1, (side, side)) for name, scores in (("own_maps", own), ("joint_maps", joint))
    }
