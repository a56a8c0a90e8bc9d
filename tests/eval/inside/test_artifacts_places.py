"""Neighbours and positions of outliers, against slow references and known patterns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import as_images, mark, planted_network, planted_pixels, striped_network

from eval.inside.artifacts.neighbours import COSINES, auroc, cosine_histograms, neighbour_cosines, on_border
from eval.inside.artifacts.places import (
    border_ratio,
    edge_sums,
    look_both_ways,
    resampling,
    resampling_gradient,
    smaller_grid,
    stripes,
)
from eval.inside.look import Batch


def batch_of(pixels: np.ndarray) -> Batch:
    count = len(pixels)
    return Batch(
        torch.from_numpy(pixels).permute(0, 3, 1, 2), as_images(pixels), torch.arange(count), torch.zeros(count).long()
    )


def test_cosines_are_those_of_a_loop_over_patches() -> None:
    torch.manual_seed(0)
    tokens, (high, wide) = torch.randn(2, 12, 5), (3, 4)
    found = neighbour_cosines(tokens, (high, wide))
    grid = tokens.double().numpy().reshape(2, high, wide, 5)
    for image in range(2):
        for row in range(high):
            for column in range(wide):
                for at, (down, right) in enumerate(((-1, 0), (1, 0), (0, -1), (0, 1))):
                    value = float(found[image, row * wide + column, at])
                    r, c = row + down, column + right
                    if not (0 <= r < high and 0 <= c < wide):
                        assert np.isnan(value)
                        continue
                    a, b = grid[image, row, column], grid[image, r, c]
                    assert value == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)


def test_in_an_image_of_one_colour_all_patches_are_alike() -> None:
    model = planted_network()
    pixels = np.full((1, 32, 32, 3), 90, dtype=np.uint8)
    cosines = neighbour_cosines(model.patch_embed(as_images(pixels)), (8, 8))
    assert int(cosines.isnan().sum()) == 4 * 8
    torch.testing.assert_close(cosines.nan_to_num(1.0), torch.ones_like(cosines))


@pytest.mark.parametrize("how", ["mean", "pairs"])
def test_histograms_of_cosines_count_each_patch_or_each_pair(how: str) -> None:
    torch.manual_seed(1)
    cosines = neighbour_cosines(torch.randn(3, 16, 4), (4, 4))
    outliers = torch.rand(3, 16) < 0.3
    counts = cosine_histograms(cosines, outliers, how)  # type: ignore[arg-type]
    for image in range(3):
        for kind in (0, 1):
            chosen = cosines[image][outliers[image] == bool(kind)].double()
            values = chosen.nanmean(1) if how == "mean" else chosen[~chosen.isnan()]
            expected, _ = np.histogram(values.numpy(), COSINES, (-1, 1))
            np.testing.assert_array_equal(counts[image, kind].numpy(), expected)


def test_auroc_is_the_share_of_pairs() -> None:
    rng = np.random.default_rng(0)
    normal, outlier = rng.integers(0, 20, 300), rng.integers(5, 25, 40)
    counts = [torch.from_numpy(np.bincount(values, minlength=30)) for values in (normal, outlier)]
    above = (outlier[:, None] > normal) + 0.5 * (outlier[:, None] == normal)
    assert float(auroc(*counts)) == pytest.approx(above.mean())
    assert bool(auroc(counts[0], torch.zeros(30)).isnan())


def test_the_border_is_the_outermost_ring() -> None:
    assert int(on_border((5, 4)).sum()) == 5 * 4 - 3 * 2
    ones = edge_sums(torch.ones(20), (5, 4))
    assert float(border_ratio(ones, (5, 4))) == pytest.approx(1)
    twice = torch.where(on_border((5, 4)), 2.0, 1.0)
    assert float(border_ratio(edge_sums(twice, (5, 4)), (5, 4))) == pytest.approx(2)
    nothing_inside = border_ratio(torch.tensor([14.0, 0.0]), (5, 4))
    assert float(nothing_inside) == pytest.approx(1 / (0.5 / 6))


def test_stripes_are_told_from_noise_and_from_a_preference_for_the_border() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, (16, 16))
    columns = np.arange(16)
    border = 0.1 * ((columns - 7.5) / 7.5) ** 2
    striped = 0.1 * (columns % 2) + border + noise
    found = stripes(striped)
    assert found is not None
    assert found > 0.7
    assert abs(stripes(border + noise) or 0) < 0.5
    assert abs(stripes(striped, along=0) or 0) < 0.5  # of columns, not of rows
    assert stripes(striped, lag=1) == pytest.approx(-0.9, abs=0.15)
    assert stripes(np.ones((16, 16))) is None
    assert stripes(np.ones((4, 4)) * [0, 1, 0, 1]) is None


def test_without_antialiasing_a_few_positions_get_all_of_the_gradient() -> None:
    """Figure 11: 16 x 16 resampled to 7 x 7."""
    smooth, striped = (resampling_gradient((16, 16), (7, 7), antialias) for antialias in (True, False))
    assert smooth.sum() == pytest.approx(49, rel=1e-4)
    assert striped.sum() == pytest.approx(49, rel=1e-4)
    assert striped.std() / smooth.std() > 10
    assert (striped.min(), striped.max(), striped.std()) == pytest.approx((-0.144, 0.978, 0.304), abs=0.002)
    assert (smooth.min(), smooth.max(), smooth.std()) == pytest.approx((0.130, 0.242, 0.022), abs=0.002)


def test_a_size_at_which_positions_are_resampled() -> None:
    assert smaller_grid(native=37, used=16) == 16
    assert smaller_grid(native=37, used=37) == 16
    assert smaller_grid(native=8, used=8) == 3
    assert smaller_grid(native=1, used=1) == 1


def test_the_network_is_as_it_was_after_a_look_both_ways() -> None:
    model = planted_network(image_size=64)  # a native grid of 16 x 16
    batch = batch_of(planted_pixels(mark(3, 0.05)))
    before = model.config.pos_antialias, model.config.pos_offset
    found = look_both_ways(model, batch, 8, 3, 60.0)
    assert (model.config.pos_antialias, model.config.pos_offset) == before
    assert int(found.sums["seen"]) == 3
    assert not torch.equal(found.sums["place_norms"][0], found.sums["place_norms"][1])
    with pytest.raises(KeyError), resampling(model, False, 0.1):
        raise KeyError
    assert (model.config.pos_antialias, model.config.pos_offset) == before


def test_columns_that_only_aliasing_marks_are_outliers_without_antialiasing_alone() -> None:
    batch = batch_of(planted_pixels(mark(4, 0.0)))
    places = look_both_ways(striped_network(), batch, 7, 3, 60.0).sums["places"].view(2, 7, 7)
    assert not places[0].any()
    # Column i is read at (i + 1/2) 16/7 - 1/2 of the native grid: the sixth at 12.1, which is marked, none of the first
    # four near one that is.
    assert (places[1][:, 5] == 4).all()
    assert not places[1][:, :4].any()


def test_both_ways_are_the_network_with_its_option_set() -> None:
    model = planted_network(image_size=64)
    batch = batch_of(planted_pixels(mark(3, 0.05)))
    found = look_both_ways(model, batch, 8, 3, 60.0).sums["place_norms"]
    for at, antialias in enumerate((True, False)):
        model.config.pos_antialias = antialias
        norms = model.forward_features(batch.images).prenorm[:, 1:].double().norm(dim=-1).sum(0)
        torch.testing.assert_close(found[at], norms, rtol=1e-5, atol=1e-4)
