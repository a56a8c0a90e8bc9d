"""The lengths of all tokens in all layers, and which patches are beyond the cutoff."""

from __future__ import annotations

import torch
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.models.vit import VisionTransformer
from eval.inside.artifacts.bins import BINS, LOWEST, histogram
from eval.inside.artifacts.neighbours import How, cosine_histograms, neighbour_cosines, on_border
from eval.inside.artifacts.tally import Tally, by_group
from eval.inside.look import Batch
from eval.inside.walk import walk

BRANCHES = ("attention", "feed-forward")  # after which the residual stream is looked at, in this order


def token_norms(model: VisionTransformer, images: Tensor) -> Tensor:
    """L2 norms before any final norm, of the residual stream after each branch of each layer.

    images (B, C, H, W) -> fp32 (depth, 2, B, 1 + R + N), in the order of BRANCHES. Raises ConfigError where they are no
    numbers.
    """
    norms = torch.stack(
        [
            torch.stack([part.float().norm(dim=-1) for part in (step.attended, step.leaving)])
            for step in walk(model, images)
        ]
    )
    return finite(norms)


def finite(values: Tensor) -> Tensor:
    """The same. Raises ConfigError where some are no numbers, for then nothing that is told of them is."""
    if not values.isfinite().all():
        raise ConfigError("the network's tokens are no finite numbers", "--weights")
    return values


def patch_norms_at(model: VisionTransformer, images: Tensor, layer: int) -> Tensor:
    """Those of patches as they leave one layer, of which no later one is computed: fp32 (B, N).

    Raises ConfigError where they are no numbers.
    """
    for step in walk(model, images):
        if step.index == layer:
            return finite(step.leaving[:, 1 + model.num_registers :].float().norm(dim=-1))
    raise IndexError(f"no layer {layer} in a network of {model.depth}")


def norm_histogram(model: VisionTransformer, batch: Batch, layer: int) -> Tally:
    """Of the patches as they leave one layer: `norms` int64 (BINS,)."""
    norms = patch_norms_at(model, batch.images, layer)
    return Tally({"norms": histogram(norms.reshape(1, -1))[0]})


def look_at_norms(
    model: VisionTransformer, batch: Batch, layer: int, cutoff: float, how: How, border: bool, embedded: bool
) -> Tally:
    """Everything about norms that is added up. A patch is an outlier where it leaves `layer` longer than `cutoff`.

    how, border: which pairs of neighbours count, see `cosine_histograms`; border: also patches on the border. embedded:
    neighbours are compared after positions were added.
    sums: layers, outlier_layers int64 (depth, 2, BINS): histograms of all patches, and of the outliers; entering int64
    (2, BINS): of both as they enter the first layer; types int64 (1 + R, BINS): of CLS and each register as they leave
    `layer`; type_moments float64 (depth, 1 + R, 2): sums of their norms and of the squares as they leave each layer;
    places int64 (GROUPS, N): outliers by position; place_norms float64 (N,): sums of norms by position; seen int64
    (GROUPS,): images; cosines int64 (GROUPS, 2, COSINES).
    rows: place; share: of the image's patches that are outliers; ratio: its largest norm by its median; edge (B, 2):
    outliers on the border and inside.
    """
    norms = token_norms(model, batch.images)
    first = 1 + model.num_registers
    special, patches = norms[..., :first], norms[..., first:]
    at_layer = patches[layer, 1]
    outliers = at_layer > cutoff
    side = (batch.images.shape[-2] // model.patch_size, batch.images.shape[-1] // model.patch_size)
    edge = on_border(side, norms.device)
    double = special[:, 1].double()
    entering = next(iter(walk(model, batch.images))).entering[:, first:].float().norm(dim=-1)
    sums = {
        "layers": histogram(patches.flatten(0, 1).flatten(1)).view(-1, 2, BINS),
        "outlier_layers": histogram(patches[..., outliers].flatten(0, 1)).view(-1, 2, BINS),
        "entering": torch.cat([histogram(each[None]) for each in (entering.flatten(), entering[outliers])]),
        "types": histogram(special[layer, 1].T),
        "type_moments": torch.stack([double.sum(1), double.square().sum(1)], dim=-1),
        "places": by_group(outliers.long(), batch.places),
        "place_norms": at_layer.double().sum(0),
        "seen": by_group(torch.ones(len(batch), dtype=torch.int64), batch.places),
        "cosines": by_group(_cosines(model, batch, outliers, edge, how, border, embedded, side), batch.places),
    }
    rows = {
        "place": batch.places,
        "share": outliers.double().mean(1),
        "ratio": at_layer.amax(1).double() / at_layer.median(1).values.double().clamp(min=2.0**LOWEST),
        "edge": torch.stack([(outliers & edge).sum(1), (outliers & ~edge).sum(1)], dim=1),
    }
    return Tally(sums, rows)


def _cosines(
    model: VisionTransformer, batch: Batch, outliers: Tensor, edge: Tensor, how: How, border: bool, embedded: bool,
    side: tuple[int, int],
) -> Tensor:  # fmt: skip
    """int64 (B, 2, COSINES)."""
    if embedded:
        x, packing, _ = model.embed([batch.images])
        tokens = packing.split(x)[0][:, 1 + model.num_registers :]
    else:
        tokens = model.patch_embed(batch.images)
    cosines = neighbour_cosines(tokens, side)
    if not border:
        cosines[:, edge] = torch.nan
    return cosine_histograms(cosines, outliers, how)


def output_tokens(model: VisionTransformer, images: Tensor, layer: int, cutoff: float) -> tuple[Tensor, Tensor]:
    """All tokens as they leave the last layer, before the final norm, (B, 1 + R + N, D), and who is an outlier (B, N).

    An outlier leaves `layer` longer than `cutoff`.
    """
    for step in walk(model, images):
        if step.index == layer:
            outliers = step.leaving[:, 1 + model.num_registers :].float().norm(dim=-1) > cutoff
    return step.leaving, outliers
