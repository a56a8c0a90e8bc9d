"""Block masks: exact counts, shapes of blocks, independence of who asks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from dinoreg.config import ConfigError
from dinoreg.data.counter import Purpose, generator
from dinoreg.data.masks import (
    TRIES,
    MaskConfig,
    block_counts,
    block_shapes,
    block_size,
    candidates,
    draw_mask,
    draw_masks,
    unpack,
)

GRIDS = [(1, 1), (1, 7), (2, 1), (2, 2), (4, 4), (7, 3), (14, 14), (16, 16), (16, 40)]


def blocks_of(rng, grid, count, number, min_block=4, min_aspect=0.3) -> np.ndarray:
    """Masks (number, h, w) of `count` cells each."""
    shapes, drawn = block_shapes(grid, min_block, min_aspect), candidates(rng, 1000)
    masks = unpack([draw_mask(drawn, shapes, count) for _ in range(number)], grid[0] * grid[1])
    return masks.reshape(number, *grid)


def reference_mask(rng, grid, count, min_block=4, min_aspect=0.3) -> np.ndarray:
    """A mask (h, w) by the algorithm as it is written, cell by cell and without tables."""
    height, width = grid
    mask = np.zeros(grid, dtype=bool)
    failed = 0
    while mask.sum() < count and failed < TRIES:
        left = count - mask.sum()
        area = rng.uniform(min_block, max(min_block, min(left, height * width // 2)))
        aspect = min_aspect ** rng.uniform(-1, 1)
        h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        failed += 1
        if 0 < h < height and 0 < w < width:
            top, side = rng.integers(height - h + 1), rng.integers(width - w + 1)
            tried = mask.copy()
            tried[top : top + h, side : side + w] = True
            if mask.sum() < tried.sum() <= count:
                mask, failed = tried, 0
    free = rng.permutation(np.flatnonzero(~mask))
    mask.flat[free[: count - mask.sum()]] = True
    return mask


def statistics_of(masks: np.ndarray) -> np.ndarray:
    """(number, 4 + w + h): components, the largest of them, pairs of neighbours and their squares; sums by line."""
    labelled = [ndimage.label(mask) for mask in masks]
    largest = [np.bincount(labels.ravel())[1:].max(initial=0) for labels, _ in labelled]
    pairs = (masks[:, 1:] & masks[:, :-1]).sum((1, 2)) + (masks[:, :, 1:] & masks[:, :, :-1]).sum((1, 2))
    columns = np.stack([[found for _, found in labelled], largest, pairs, pairs**2], axis=1)
    return np.concatenate([columns, masks.sum(1), masks.sum(2)], axis=1).astype(float)


@pytest.mark.parametrize("min_block", [1, 4, 1000])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_count_is_met_exactly(grid, min_block) -> None:
    cells = grid[0] * grid[1]
    for count in range(cells + 1) if cells < 60 else [*range(0, cells, 7), cells]:
        mask = blocks_of(generator(0, Purpose.MASK, count), grid, count, 2, min_block)
        assert (mask.sum((1, 2)) == count).all()


@pytest.mark.parametrize(
    ("grid", "count", "min_block", "min_aspect"),
    [
        ((14, 14), 58, 4, 0.3),
        ((16, 16), 125, 4, 0.3),
        ((16, 16), 27, 16, 0.5),
        ((7, 4), 9, 4, 0.3),
        ((4, 4), 7, 1, 0.1),
        ((6, 9), 3, 4, 0.3),
        ((8, 8), 12, 4, 1.0),
    ],
)
def test_masks_are_those_of_the_algorithm(grid, count, min_block, min_aspect) -> None:
    """Means over many masks agree with the plain algorithm's to within what chance allows."""
    rng, number = np.random.default_rng(0), 1500
    ours = statistics_of(blocks_of(rng, grid, count, number, min_block, min_aspect))
    plain = statistics_of(np.stack([reference_mask(rng, grid, count, min_block, min_aspect) for _ in range(number)]))
    error = np.sqrt((ours.var(0) + plain.var(0)) / number)
    assert (np.abs(ours.mean(0) - plain.mean(0)) <= 4.5 * error + 1e-9).all()


@pytest.mark.parametrize("left", [3, 4, 5, 9, 30, 98, 196])
def test_shapes_have_the_shares_that_the_algorithm_gives_them(left) -> None:
    grid, rng = (14, 14), np.random.default_rng(1)
    table, size = block_shapes(grid, 4, 0.3)[left]
    found = Counter((board.bit_count(), places) for board, places, _ in table[:size])
    area = 4 + rng.random(200_000) * (max(4, min(left, 98)) - 4)
    root = np.exp(rng.uniform(-0.5, 0.5, 200_000) * -np.log(0.3))
    sides = np.stack([np.rint(np.sqrt(area) * root), np.rint(np.sqrt(area) / root)], axis=1).astype(int)
    expected = Counter((h * w, (15 - h) * (15 - w)) if max(h, w) < 14 else (0, 1) for h, w in sides.tolist())
    for shape in expected | found:
        assert abs(found[shape] / size - expected[shape] / 200_000) < 0.012  # for a shape and its mirror image


def test_a_shape_fits_wherever_it_is_put() -> None:
    table, size = block_shapes((5, 7), 1, 0.3)[35]
    for board, places, shifts in {id(shape): shape for shape in table[:size]}.values():
        seen = unpack([board << shift for shift in shifts[:places]], 35).reshape(-1, 5, 7)
        for mask in seen:
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert mask.sum() == board.bit_count() == len(rows) * len(columns)
            assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all() if board else not mask.any()
        assert len(np.unique(seen, axis=0)) == places  # and all of them differ


def test_masks_are_blocks_and_not_dust() -> None:
    """A masked cell has far more masked neighbours than the same share of cells at random would give it."""
    masks = blocks_of(generator(1, Purpose.MASK, 0), (14, 14), 58, 200)
    pairs = (masks[:, 1:] & masks[:, :-1]).sum() + (masks[:, :, 1:] & masks[:, :, :-1]).sum()
    assert 2 * pairs / (4 * 58 * 200) > 0.7  # at random: 0.28


def test_all_places_are_masked_equally_often() -> None:
    """Over many masks no place is left out; few blocks reach the corners, as with BEiT's."""
    mean = blocks_of(generator(2, Purpose.MASK, 0), (12, 12), 43, 2000).mean(0)
    assert abs(mean.mean() - 43 / 144) < 1e-9
    assert 0.03 < mean.min() < mean.max() < 0.6
    np.testing.assert_allclose(mean, mean[::-1, ::-1], atol=0.07)


def reference_counts(images: int, patches: int, probability: float, low: float, high: float) -> list[int]:
    masked = int(2 * images * probability)
    width = (high - low) / max(masked, 1)
    middles = [low + (i + 0.5) * width for i in range(masked)]
    return [0] * (2 * images - masked) + [int(patches * middle) for middle in middles]


@pytest.mark.parametrize(("images", "probability"), [(32, 0.5), (8, 0.5), (1, 0.5), (3, 0.3), (4, 1.0), (4, 0.0)])
def test_counts_of_a_block(images, probability) -> None:
    counts = block_counts(MaskConfig(probability=probability), images, 196)
    assert counts.tolist() == reference_counts(images, 196, probability, 0.1, 0.5)


def test_each_block_has_the_same_counts_in_another_order() -> None:
    cfg = MaskConfig()
    masks = draw_masks(cfg, (8, 8), 64, seed=0, start=0, count=96)
    blocks = masks.sum(2).reshape(3, 64)
    assert block_size(64) == 32
    for block in blocks:
        assert sorted(block) == block_counts(cfg, 32, 64).tolist()
    assert (blocks[0] != blocks[1]).any()


def test_who_asks_does_not_matter() -> None:
    """Any range of samples gets what a single reader of everything gets, aligned to blocks or not."""
    cfg = MaskConfig()
    whole = draw_masks(cfg, (6, 5), 48, seed=3, start=0, count=144)
    for start, count in ((0, 1), (5, 11), (15, 2), (47, 50), (96, 48)):
        assert np.array_equal(
            draw_masks(cfg, (6, 5), 48, seed=3, start=start, count=count), whole[start : start + count]
        )
    assert not np.array_equal(draw_masks(cfg, (6, 5), 48, seed=4, start=0, count=144), whole)


@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (2, 3), (9, 5)])
def test_masks_of_any_share_are_drawn_on_any_grid(grid) -> None:
    cells = grid[0] * grid[1]
    for ratio, min_block, min_aspect in (((0.9, 0.999), 4, 0.3), ((0.0, 0.999), 50, 1.0), ((0.5, 0.5), 1, 1e-6)):
        cfg = MaskConfig(1.0, ratio, min_block, min_aspect)
        masks = draw_masks(cfg, grid, 8, seed=0, start=10**12, count=8)
        assert sorted(masks.sum(2).ravel()) == block_counts(cfg, 8, cells).tolist()


def test_no_masks_when_the_probability_is_zero() -> None:
    assert not draw_masks(MaskConfig(probability=0.0), (4, 4), 6, 0, 0, 6).any()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"probability": 1.5}, "probability"),
        ({"ratio": (0.5, 0.1)}, "ratio"),
        ({"ratio": (0.5, 1.0)}, "ratio"),
        ({"min_block": 0}, "min_block"),
        ({"min_aspect": 0.0}, "min_aspect"),
    ],
)
def test_impossible_values_are_refused(change, key) -> None:
    with pytest.raises(ConfigError) as caught:
        MaskConfig(**change).check()
    assert caught.value.key == key
