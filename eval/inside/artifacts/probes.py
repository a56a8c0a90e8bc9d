"""Does a token still know where its patch lies and what it looks like? Linear probes (registers paper, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.models.vit import VisionTransformer
from eval.inside.artifacts.draws import draw_some, generator_of
from eval.inside.artifacts.norms import output_tokens
from eval.inside.artifacts.summary import widened
from eval.inside.artifacts.tally import Tally
from eval.inside.look import Batch
from eval.logistic import fit_logistic
from eval.metrics import bootstrap
from eval.results import Score

TRAINED, NORMAL, OUTLIER = 0, 1, 2  # what a drawn token is for: training, or a test as one of these

Mix = Literal["natural", "balanced"]


@dataclass(frozen=True)
class ProbeTask:
    """How tokens are drawn. most: of an image, and of its outliers apart. normed: after the final norm."""

    layer: int
    cutoff: float
    most: int
    mix: Mix
    normed: bool
    seed: int


def draw_tokens(model: VisionTransformer, batch: Batch, task: ProbeTask) -> Tally:
    """A row a token: place, role, position int64, token fp16 (D,), pixels uint8 (3 p p,).

    Images of even places train. Of the others, normal patches and outliers are drawn apart, as many as there are up to
    `most`.
    """
    tokens, outliers = output_tokens(model, batch.images, task.layer, task.cutoff)
    tokens = (model.norm(tokens) if task.normed else tokens)[:, 1 + model.num_registers :]
    patches = F.unfold(batch.pixels.float(), model.patch_size, stride=model.patch_size).transpose(1, 2)
    rows: dict[str, list[Tensor]] = {name: [] for name in ("place", "role", "position", "token", "pixels")}
    for at, (place, mask) in enumerate(zip(batch.places.tolist(), outliers.cpu(), strict=True)):
        for role, chosen in choose_tokens(mask, place, task).items():
            rows["place"].append(torch.full_like(chosen, place))
            rows["role"].append(torch.full_like(chosen, role))
            rows["position"].append(chosen)
            rows["token"].append(tokens[at, chosen.to(tokens.device)].cpu())
            rows["pixels"].append(patches[at, chosen.to(tokens.device)].round().to(torch.uint8).cpu())
    joined = {name: torch.cat(each) for name, each in rows.items()}
    return Tally(rows=joined | {"token": joined["token"].half()})


def choose_tokens(outliers: Tensor, place: int, task: ProbeTask) -> dict[int, Tensor]:
    """Positions by role. outliers: bool (N,)."""
    generator = generator_of(task.seed, place)
    if place % 2:
        return {
            NORMAL: draw_some(~outliers, task.most, generator),
            OUTLIER: draw_some(outliers, task.most, generator),
        }
    if task.mix == "natural":
        return {TRAINED: draw_some(torch.ones_like(outliers), task.most, generator)}
    half = -(-task.most // 2)
    both = [draw_some(outliers, half, generator), draw_some(~outliers, half, generator)]
    return {TRAINED: torch.cat(both)}


def equal_sizes(rows: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """With as many tested normal patches as outliers, drawn from all; unchanged where there are no outliers."""
    normal, outliers = ((rows["role"] == role).nonzero()[:, 0] for role in (NORMAL, OUTLIER))
    fewest = min(len(normal), len(outliers))
    if not fewest:
        return rows
    drawn = [each[torch.randperm(len(each), generator=generator_of(seed, 0))[:fewest]] for each in (normal, outliers)]
    kept = torch.cat([(rows["role"] == TRAINED).nonzero()[:, 0], *drawn]).sort().values
    return {name: each[kept] for name, each in rows.items()}


def standardised(rows: dict[str, Tensor], device: torch.device) -> Tensor:
    """Tokens fp32 (T, D), each channel with the mean and the spread of training tokens taken off."""
    tokens = rows["token"].to(device).float()
    known = tokens[rows["role"].to(device) == TRAINED]
    return (tokens - known.mean(0)) / known.std(0, correction=0).clamp(min=1e-6)


def probe_position(
    rows: dict[str, Tensor], grid: tuple[int, int], C: float, iterations: int, device: torch.device
) -> dict[str, Tensor]:
    """Softmax over all positions: for each token whether it is right, and how many patches it is off (T,)."""
    x, trained = standardised(rows, device), (rows["role"] == TRAINED).to(device)
    truth = rows["position"].to(device)
    fit = fit_logistic(x[trained], truth[trained], C, grid[0] * grid[1], max_iter=iterations, tol=1e-5)
    guess = fit.predict(x)
    apart = torch.stack([guess // grid[1] - truth // grid[1], guess % grid[1] - truth % grid[1]]).float().norm(dim=0)
    return {"right": (guess == truth).float().cpu(), "distance": apart.cpu()}


def probe_pixels(rows: dict[str, Tensor], std: list[float], ridge: float, device: torch.device) -> dict[str, Tensor]:
    """Ridge regression of a patch's normalised pixels: L2 errors (T,) of the probe, and of the mean patch.

    std: of each channel, in units of [0, 1]. ridge: penalty by the number of training tokens.
    """
    x, trained = standardised(rows, device).double(), (rows["role"] == TRAINED).to(device)
    width = rows["pixels"].shape[1]
    scale = 255 * torch.tensor(std, dtype=torch.float64, device=device).repeat_interleave(width // len(std))
    truth = rows["pixels"].to(device).double() / scale
    mean = truth[trained].mean(0)
    weight = fit_ridge(x[trained], truth[trained] - mean, ridge)
    return {
        "error": (x @ weight + mean - truth).norm(dim=1).float().cpu(),
        "mean_error": (mean - truth).norm(dim=1).float().cpu(),
    }


def fit_ridge(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """The W (D, K) with the least |x W - y|^2 / n + ridge |W|^2. x (n, D) and y (n, K) have zero mean."""
    gram = x.T @ x / len(x)
    gram.diagonal().add_(ridge)
    return torch.linalg.solve(gram, x.T @ y / len(x))


def chance(grid: tuple[int, int]) -> dict[str, float]:
    """What guessing at random gets: share of right positions, and mean distance in patches."""
    rows, columns = (torch.arange(size).double() for size in grid)
    down = (rows[:, None] - rows).square().flatten()
    right = (columns[:, None] - columns).square().flatten()
    return {"top1": 1 / (grid[0] * grid[1]), "distance": float((down[:, None] + right).sqrt().mean())}


def score_probes(rows: dict[str, Tensor], found: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Score]]:
    """Of normal patches and of outliers apart, with intervals over images. Groups without tokens are left out."""
    units = {
        "right": ("position_top1", "%", "higher", 100.0),
        "distance": ("position_distance", "patches", "lower", 1.0),
        "error": ("pixel_error", "", "lower", 1.0),
        "mean_error": ("pixel_error_of_mean", "", "lower", 1.0),
    }
    details: dict[str, Any] = {}
    scores: dict[str, Score] = {}
    for group, role in (("normal", NORMAL), ("outlier", OUTLIER)):
        chosen = rows["role"] == role
        places, image = rows["place"][chosen].unique(return_inverse=True)
        details[group] = {"tokens": int(chosen.sum()), "images": len(places)}
        if not len(places):
            continue
        for name, (title, unit, better, factor) in units.items():
            value = factor * found[name][chosen].double()
            sums = torch.zeros(len(places), 2, dtype=torch.float64)
            sums.index_add_(0, image, torch.stack([value, torch.ones_like(value)], dim=1))
            mean = float(value.mean())
            details[group][title] = mean
            if name != "mean_error":
                low, high = bootstrap(sums, lambda total: total[:, 0] / total[:, 1])
                score = Score(mean, low, high, unit, better)
                scores[f"{title}_{group}"] = widened(score, len(places)) if unit == "%" else score
    return details, scores
