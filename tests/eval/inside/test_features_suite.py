"""Components of patch tokens: planted regions are found, and sums over batches hold what all tokens hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluating import run_suite, surroundings
from PIL import Image
from planted import GRID, PATCH, mark, planted_network, write_planted
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.models.maps import pca_rgb, principal_components
from dinoreg.models.vit import VisionTransformer
from eval.backbone import Backbone
from eval.inside.artifacts.bins import BINS, to_bins
from eval.inside.features.measures import (
    BEYOND,
    FIRST,
    FIRST_THREE,
    OF_NORM,
    SMOOTH,
    correlation,
    joint_components,
    moments_of,
    neighbour_correlation,
    note,
)
from eval.inside.features.shown import findings
from eval.inside.finding import Album, Seen
from eval.report.read import read_evaluation
from eval.results import Result, write_result
from eval.suites.features import tokens_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow_components(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """From the covariance matrix, in float64, without signs: whitened scores (n, count), shares (count,)."""
    x = tokens.double() - tokens.double().mean(0)
    values, vectors = np.linalg.eigh((x.T @ x / len(x)).numpy())
    order = values.argsort()[::-1][:count].copy()
    scores = x.numpy() @ vectors[:, order] / np.sqrt(values[order])
    return torch.from_numpy(scores), torch.from_numpy(values[order] / values.sum())


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (20, 20)])
def test_components_equal_those_of_the_covariance_matrix(shape: tuple[int, int]) -> None:
    tokens = normal(2, *shape).exp()
    found = principal_components(tokens)
    for each, scores, shares in zip(tokens, found.scores, found.shares, strict=True):
        expected, expected_shares = slow_components(each, 3)
        torch.testing.assert_close(shares, expected_shares)
        torch.testing.assert_close(scores.abs(), expected.abs(), rtol=1e-6, atol=1e-8)
        assert (scores.pow(3).mean(0) >= 0).all()
        torch.testing.assert_close(scores.square().mean(0), torch.ones(3).double())


def test_a_set_by_itself_and_in_a_batch_has_the_same_components() -> None:
    tokens = normal(3, 16, 8)
    together = principal_components(tokens)
    for at in range(3):
        torch.testing.assert_close(principal_components(tokens[at]).scores, together.scores[at])
    torch.testing.assert_close(
        pca_rgb(tokens[1], (4, 4)).flatten(0, 1).double(), 0.5 + together.scores[1].clamp(-2.3, 2.3) / 4.6,
        rtol=0, atol=1e-6,
    )  # fmt: skip


def test_three_planted_regions_are_three_levels_of_two_components() -> None:
    """The first component tells the far region from the others, the second those from one another."""
    region = torch.arange(36) % 3
    places = torch.zeros(3, 8).index_put((torch.tensor([1, 2]), torch.tensor([0, 1])), torch.tensor([3.0, 10.0]))
    found = principal_components(places[region] + 1e-3 * normal(36, 8))
    levels = torch.stack([found.scores[region == each].mean(0) for each in range(3)])
    spread = torch.stack([found.scores[region == each].std(0) for each in range(3)])
    assert spread[:, :2].max() < 0.01 and found.shares[:2].sum() > 0.9999
    assert levels[2, 0] > 1.3 and (levels[:2, 0] < -0.5).all()
    assert abs(levels[0, 1] - levels[1, 1]) > 2 and abs(levels[2, 1]) < 0.1


def test_joint_components_may_miss_what_an_image_by_itself_shows() -> None:
    """One image differs along one direction, the other, more strongly, along another."""
    images = torch.zeros(2, 10, 6)
    images[0, :, 0], images[1, :, 1] = torch.arange(10.0) - 4.5, 20 * (torch.arange(10.0) - 4.5)
    own = principal_components(images).scores[..., 0]
    joint = principal_components(images.flatten(0, 1)).scores[..., 0].unflatten(0, (2, 10))
    assert own.std(1, correction=0).tolist() == pytest.approx([1, 1])
    assert joint[0].std() < 1e-6 and joint[1].std() > 1.4


def test_what_is_noted_of_an_image() -> None:
    tokens = normal(2, 100, 4)
    tokens[0, :, 2] += 10 * torch.arange(100.0) // 10  # rows of a grid of 10 x 10
    tokens[1, 7, 3] = 1000.0
    noted = note(tokens, torch.stack([tokens[0, :, 2], torch.ones(100)]), (10, 10))
    assert noted[0, FIRST] > 0.95 and noted[0, SMOOTH] > 0.8 and noted[0, OF_NORM] > 0.99 and noted[0, BEYOND] == 0
    assert noted[1, BEYOND] == pytest.approx(0.01) and noted[1, OF_NORM] == 0 and noted[1, FIRST_THREE] > 0.99
    expected = np.corrcoef(tokens[0, :, 0].numpy(), tokens[0, :, 1].numpy())[0, 1]
    assert correlation(tokens[0, :, 0].double(), tokens[0, :, 1].double()).item() == pytest.approx(expected)


def test_neighbours_agree_on_a_slope_and_disagree_on_a_checkerboard() -> None:
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(6.0), indexing="ij")
    maps = torch.stack([rows, (rows + columns) % 2, normal(8, 6)]).double()
    slope, board, noise = neighbour_correlation(maps).tolist()
    assert slope > 0.9 and board == pytest.approx(-1, abs=1e-9) and abs(noise) < 0.3


def test_sums_over_batches_hold_the_components_of_all_tokens() -> None:
    tokens, norms = normal(7, 16, 5).exp(), normal(7, 16, seed=1).exp()
    parts = [moments_of(tokens[at : at + 3], to_bins(norms[at : at + 3]), BINS) for at in (0, 3, 6)]
    joint = joint_components(parts[0] + parts[1] + parts[2])
    scores, shares = slow_components(tokens.flatten(0, 1), 5)
    torch.testing.assert_close(joint.shares, shares)
    first = scores[:, 0].view(7, 16)
    between = first.mean(0).square().mean() / first.square().mean()  # the mean over all is 0
    adjusted = 1 - (1 - between) * (7 * 16 - 1) / (7 * 16 - 16)
    assert joint.of_place == pytest.approx(max(0.0, adjusted.item()), abs=1e-9)


def test_a_first_component_of_place_or_of_norm_is_told() -> None:
    place, noise = 5 * normal(1, 16, 4), normal(200, 16, 4, seed=1)
    joint = joint_components(moments_of(place + noise, to_bins(normal(200, 16).exp()), BINS))
    assert joint.of_place > 0.9 and joint.of_norm < 0.1
    norms = normal(200, 16, seed=2).exp()
    direction = torch.tensor([1.0, 0, 0, 0])
    joint = joint_components(moments_of(20 * norms[..., None] * direction + noise, to_bins(norms), BINS))
    assert joint.of_norm > 0.9 and joint.of_place < 0.1
    nothing = joint_components(moments_of(torch.ones(4, 16, 3), to_bins(torch.ones(4, 16)), BINS))
    assert (nothing.of_place, nothing.of_norm) == (0, 0) and nothing.shares.isfinite().all()


def regions(folder: Path) -> Path:
    """Images of three flat regions: two halves above one another, and a square in the middle."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        pixels = np.empty((GRID * PATCH, GRID * PATCH, 3))
        pixels[: GRID * PATCH // 2], pixels[GRID * PATCH // 2 :] = (40, 40, 200), (40, 200, 40)
        pixels[2 * PATCH : 6 * PATCH, 2 * PATCH : 6 * PATCH] = (230, 60, 40)
        noisy = np.clip(pixels + rng.normal(0, 3, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number}.png")
    return folder


def colour_blind_to_places() -> VisionTransformer:
    """A planted network whose tokens hold the colours of their patches and nothing of their places."""
    model = planted_network()
    assert model.pos_embed is not None
    model.pos_embed.zero_()
    model.found = "written by hand"
    return model


def measured(folder: Path, *words: str) -> tuple[Backbone, Result]:
    backbone = Backbone(colour_blind_to_places(), "planted")
    data = folder / "photos" if (folder / "photos").exists() else regions(folder / "photos")
    return backbone, run_suite("features", backbone, surroundings(folder, data), "zoom=1", *words)


def test_regions_of_a_photo_are_regions_of_its_map(tmp_path: Path) -> None:
    _, result = measured(tmp_path, "map_size=32")
    region = torch.zeros(GRID, GRID, dtype=torch.long)
    region[GRID // 2 :] = 1
    region[2:6, 2:6] = 2
    for name in ("own_maps", "joint_maps"):
        maps = torch.from_numpy(result.arrays[name])
        assert maps.shape == (5, GRID, GRID, 3)
        levels = torch.stack([maps[0][region == each].mean(0) for each in range(3)])
        within = torch.stack([maps[0][region == each].std(0) for each in range(3)])[:, :2].max()
        apart = min((levels[a, :2] - levels[b, :2]).norm().item() for a, b in ((0, 1), (0, 2), (1, 2)))
        assert apart > 1 and within < apart / 5
    assert result.scores["first_three_components"].value > 90
    assert result.scores["first_neighbour_correlation"].value > 0.5
    assert result.details["joint"]["first_three"] > 0.9 and result.details["images"] == 5


def test_without_the_final_norm_planted_outliers_are_the_first_component(tmp_path: Path) -> None:
    marked = mark(10, 0.05, seed=3)
    assert marked.any((1, 2)).all()
    context = surroundings(tmp_path, write_planted(tmp_path / "photos", marked))
    backbone = Backbone(planted_network(), "planted")
    result = run_suite("features", backbone, context, "zoom=1", "map_size=32", "norm=false", "photos=10")
    assert result.scores["first_explained_by_norm"].value > 99 and result.details["joint"]["of_norm"] > 0.99
    assert result.details["joint"]["of_place"] < 0.2
    for name in ("own_maps", "joint_maps"):
        first = result.arrays[name][..., 0]
        assert first[marked].min() > 1 > 0.5 > first[~marked].max()


def test_tokens_are_those_of_the_block_with_or_without_the_final_norm(tmp_path: Path) -> None:
    backbone, images = Backbone(colour_blind_to_places()), normal(2, 3, 32, 32)
    tokens, norms = tokens_of(backbone, images, 3, norm=True)
    features = backbone.model.forward_features(images)
    torch.testing.assert_close(tokens, features.patches)
    torch.testing.assert_close(norms, features.prenorm[:, 1:].norm(dim=-1))
    torch.testing.assert_close(tokens_of(backbone, images, 3, norm=False)[0], features.prenorm[:, 1:])
    with pytest.raises(ConfigError, match="image_size"):
        measured(tmp_path, "image_size=4")


def test_the_page_tells_what_is_seen(tmp_path: Path) -> None:
    backbone, result = measured(tmp_path, "photos=2")
    path = write_result(tmp_path / "one", result, backbone, "one", 0.0)
    (found,) = findings([Seen(name, read_evaluation(path)) for name in ("one", "other")], Album(tmp_path / "page"))
    assert found.number == "1.11" and len(found.rows) == 2 and all(len(row) == len(found.head) for row in found.rows)
    assert len(found.pictures) == 3 and all((tmp_path / "page" / each.png).is_file() for each in found.pictures)
    assert "5 images of 64 patches (320 in all)" in found.basis and "beyond 3 σ" in found.seen
