"""Block masks: exact counts, shapes of blocks, independence of who asks."""

from __future__ import annotations

import numpy as np
import pytest

from dinoreg.config import ConfigError
from dinoreg.data.counter import Purpose, generator
from dinoreg.data.masks import MaskConfig, block_counts, block_size, draw_mask, draw_masks

GRIDS = [(1, 1), (1, 7), (2, 2), (4, 4), (7, 3), (14, 14), (16, 16), (16, 40)]


@pytest.mark.parametrize("grid", GRIDS)
def test_every_count_is_met_exactly(grid) -> None:
    cells = grid[0] * grid[1]
    for count in range(cells + 1) if cells < 60 else range(0, cells + 1, 7):
        mask = draw_mask(generator(0, Purpose.MASK, count), grid, count)
        assert mask.shape == grid and mask.sum() == count


def test_masks_are_blocks_and_not_dust() -> None:
    """A masked cell has far more masked neighbours than the same share of cells at random would give it."""
    shares = []
    for number in range(200):
        mask = draw_mask(generator(1, Purpose.MASK, number), (14, 14), 58)
        pairs = (mask[1:] & mask[:-1]).sum() + (mask[:, 1:] & mask[:, :-1]).sum()
        shares.append(2 * pairs / (4 * 58))
    assert np.mean(shares) > 0.7  # at random: 0.28


def test_all_places_are_masked_equally_often() -> None:
    """Over many masks no place is left out; few blocks reach the corners, as with BEiT's."""
    mean = np.mean([draw_mask(generator(2, Purpose.MASK, i), (12, 12), 43) for i in range(2000)], axis=0)
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
