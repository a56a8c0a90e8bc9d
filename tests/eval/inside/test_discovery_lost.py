"""LOST against a slow one, patch by patch, and what offsets do to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from objects import toy_features
from torch import Tensor

from dinoreg.models.vit import ModelConfig, build_vit
from eval.backbone import Backbone
from eval.boxes.opening import open_boxes
from eval.inside.discovery.corloc import corloc, floors, hits, in_pixels, ious
from eval.inside.discovery.images import Sight, Sized
from eval.inside.discovery.lost import boxes_around, expand, gram
from eval.inside.discovery.rules import centre, minus_mean, unit
from eval.inside.discovery.sweep import Sweep
from eval.suite import Place

COUNT = 20  # images


def slow_lost(
    features: NDArray[np.float64], grid: tuple[int, int], bias: float, company: int
) -> tuple[list[int], int, NDArray[np.float64], list[int], bool]:
    """Degrees, seed, expansion, box and whether the seed was outside, of one image (N, D), in plain Python."""
    count = len(features)
    products = [[float(features[p] @ features[q]) + bias for q in range(count)] for p in range(count)]
    degrees = [sum(products[p][q] > 0 for q in range(count) if q != p) for p in range(count)]
    order = sorted(range(count), key=lambda p: (degrees[p], p))
    seed = order[0]
    members = [p for p in order[:company] if products[p][seed] > 0]
    expansion = [sum(products[s][q] for s in members) for q in range(count)]
    reached, edge = set(), [seed] if expansion[seed] > 0 else []
    while edge:
        place = edge.pop()
        row, column = divmod(place, grid[1])
        reached.add(place)
        for down, across in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            near = down * grid[1] + across
            if 0 <= down < grid[0] and 0 <= across < grid[1] and near not in reached and expansion[near] > 0:
                edge.append(near)
    rows, columns = zip(*(divmod(place, grid[1]) for place in reached or {seed}), strict=True)
    return degrees, seed, np.array(expansion), [min(columns), min(rows), max(columns) + 1, max(rows) + 1], not reached


def fast_boxes(features: Tensor, biases: Tensor, side: int) -> NDArray[np.int64]:
    """Boxes (B, S, 4) of square grids."""
    maps = expand(gram(features), biases)
    return boxes_around(maps.masks, maps.seeds, (side, side))[0]


def found(features: Tensor, biases: Tensor, truth: NDArray[np.int64], side: int = 28) -> list[float]:
    """Percent of images in which the box is right, by bias."""
    boxes = fast_boxes(features, biases, side).astype(np.float32)
    right = np.array([hits(each, box[None].astype(np.float32)) for each, box in zip(boxes, truth, strict=True)])
    return (100 * right.mean(0)).tolist()


@pytest.mark.parametrize("company", [1, 10, 100])
def test_equal_to_a_slow_one_on_random_features(company: int) -> None:
    torch.manual_seed(0)
    grid = (7, 9)
    # Smooth, so that parts connect; with an offset, so that biases matter.
    coarse = torch.randn(4, 8, 4, 5, dtype=torch.float64)
    features = torch.nn.functional.interpolate(coarse, size=grid, mode="bicubic").flatten(2).mT + 0.3
    biases = torch.tensor([0.0, -0.5, -2.0, 1.0, -50.0], dtype=torch.float64).expand(4, 5)
    maps = expand(gram(features), biases, company)
    boxes, outside = boxes_around(maps.masks, maps.seeds, grid)
    for image in range(4):
        for at, bias in enumerate(biases[0].tolist()):
            degrees, seed, expansion, box, lost = slow_lost(features[image].numpy(), grid, bias, company)
            assert maps.degrees[image, at].tolist() == degrees
            assert int(maps.seeds[image, at]) == seed
            np.testing.assert_allclose(maps.expansion[image, at].numpy(), expansion, atol=1e-9)
            assert boxes[image, at].tolist() == box
            assert outside[image, at] == lost
    assert outside.any() and not outside.all()


def test_equal_to_a_slow_one_on_features_of_a_photo(shared_data: Path) -> None:
    backbone = Backbone(build_vit(ModelConfig(embed_dim=64, depth=2, num_heads=2, patch_size=8, image_size=32)))
    torch.manual_seed(0)
    backbone.model.init_weights()
    sweep = Sweep(backbone, [1], ["k", "q", "v"], Sight(8, 96, 400), company=100, unit_length=False, precision="fp32")
    for place in (0, 1):
        pixels = Sized(open_boxes(Place(shared_data / "boxes_raccoon")), sweep.sight)[place][0]
        grid = sweep.sight.grid((pixels.shape[1], pixels.shape[2]))
        for each in sweep.features(pixels[None]):
            features = centre(each.patches.double())
            maps = expand(gram(features), torch.zeros(1, 1).double())
            degrees, seed, _, box, _ = slow_lost(features[0].numpy(), grid, 0.0, 100)
            assert maps.degrees[0, 0].tolist() == degrees and int(maps.seeds) == seed
            assert boxes_around(maps.masks, maps.seeds, grid)[0].tolist() == [[box]]


def test_single_precision_finds_the_same_boxes() -> None:
    features, _ = toy_features(20, offset=4.0)
    biases = torch.tensor([0.0, -8.0, -16.0, -20.0], dtype=torch.float64).expand(20, 4)
    same = (fast_boxes(features, biases, 28) == fast_boxes(features.float(), biases.float(), 28)).all(-1)
    assert same.mean() > 0.95


def test_a_planted_object_is_found_and_an_offset_hides_it_until_a_rule_repairs_that() -> None:
    biases = torch.tensor([0.0, -8.0, -16.0, -24.0], dtype=torch.float64).expand(COUNT, 4)
    by_rule = {"none": [], "centred": [], "mean": []}
    for offset in (0.0, 2.0, 4.0, 8.0):
        features, truth = toy_features(COUNT, offset=offset)
        by_rule["none"] += found(features, biases[:, :1], truth)
        by_rule["centred"] += found(centre(features), biases[:, :1], truth)
        by_rule["mean"] += found(features, minus_mean(gram(features)), truth)
    assert by_rule["none"] == [100, 100, 0, 0]
    assert by_rule["centred"] == [100] * 4
    assert min(by_rule["mean"][:3]) > 90 and by_rule["mean"][3] > 50


def test_a_bias_must_fit_the_offset_and_the_length_of_the_features() -> None:
    biases = torch.tensor([0.0, -8.0, -16.0, -24.0], dtype=torch.float64).expand(COUNT, 4)
    shifted, truth = toy_features(COUNT, offset=4.0)
    assert found(shifted, biases, truth) == [0, 100, 100, 0]
    assert found(toy_features(COUNT)[0], biases[:, 2:3], truth) == [0]
    assert found(unit(shifted), torch.tensor([[0.0, -0.3, -0.8]]).double().expand(COUNT, 3), truth) == [0, 100, 100]


def test_equal_degrees_go_to_the_first_patch_and_constant_features_to_one_box() -> None:
    features = torch.ones(1, 12, 5)
    maps = expand(gram(features), torch.tensor([[0.0, -100.0]]))
    assert maps.seeds.tolist() == [[0, 0]]
    boxes, outside = boxes_around(maps.masks, maps.seeds, (3, 4))
    # All agree with all: the whole image. No two agree: the seed alone, which is not even in its mask.
    assert boxes.tolist() == [[[0, 0, 4, 3], [0, 0, 1, 1]]] and outside.tolist() == [[False, True]]
    assert expand(gram(features), torch.zeros(1, 1), company=3).expansion[0, 0].tolist() == [15.0] * 12


def test_one_patch_and_features_of_zero() -> None:
    for features, expected in ((torch.ones(1, 1, 3), False), (torch.zeros(1, 6, 3), True)):
        products = gram(features)
        maps = expand(products, torch.cat([torch.zeros(1, 1), minus_mean(products)], dim=1))
        boxes, outside = boxes_around(maps.masks, maps.seeds, (1, features.shape[1]))
        assert boxes.tolist() == [[[0, 0, 1, 1]] * 2] and outside[0, 0] == expected


def test_parts_of_different_biases_and_diagonal_neighbours_do_not_connect() -> None:
    masks = torch.tensor([[1, 0, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0]], dtype=torch.bool)  # grids of 2 x 3
    boxes, outside = boxes_around(masks, torch.tensor([4, 3]), (2, 3))
    assert boxes.tolist() == [[1, 1, 3, 2], [0, 1, 1, 2]] and not outside.any()


def test_overlaps_and_boxes_in_pixels() -> None:
    square = np.array([[0, 0, 10, 10]], dtype=np.float32)
    others = np.array([[0, 0, 10, 5], [5, 0, 15, 10], [20, 20, 30, 30]], dtype=np.float32)
    np.testing.assert_allclose(ious(square, others), [[0.5, 1 / 3, 0]], rtol=1e-6)
    assert hits(square[0], others[:1])  # a half is enough
    assert not hits(square[0], others[1:]) and not hits(square[0], others[:0])
    # 50 x 30 pixels in patches of 16: the last ones stick out; and seen at half of its size.
    box = np.array([1, 0, 4, 2])
    assert in_pixels(box, 16, (30, 50), (30, 50)).tolist() == [16, 0, 50, 30]
    assert in_pixels(box, 16, (30, 50), (60, 100)).tolist() == [32, 0, 100, 60]
    assert floors((100, 200)).tolist() == [[0, 0, 200, 100], [20, 10, 180, 90]]


def test_corloc_has_wilsons_interval() -> None:
    score = corloc(np.array([True] * 10))
    assert (score.value, score.high) == (100, 100) and 70 < score.low < 75
