"""Histograms of norms, and whether they are one cloud or two, on samples whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dinoreg.config import ConfigError
from eval.inside.artifacts.bins import (
    BINS,
    centres,
    edges,
    histogram,
    moments,
    quantiles,
    share_above,
)  # fmt: skip
from eval.inside.artifacts.clouds import check_rule, find_cutoff, fit_clouds

Sample = NDArray[np.float64]


def counted(norms: Sample) -> NDArray[np.int64]:
    return histogram(torch.from_numpy(norms).float()[None])[0].numpy()


def bulk(count: int, norm: float, spread: float, seed: int = 0) -> Sample:
    """Norms whose logarithms are normal."""
    return norm * np.exp(spread * np.random.default_rng(seed).normal(size=count))


def test_a_histogram_is_numpys_and_each_row_has_its_own() -> None:
    norms = np.stack([bulk(4000, 3.0, 1.5), bulk(4000, 400.0, 0.2)]).astype(np.float32)
    found = histogram(torch.from_numpy(norms))
    assert found.shape == (2, BINS)
    for row, expected in zip(found.numpy(), norms.astype(np.float64), strict=True):
        reference, _ = np.histogram(expected, edges())
        assert np.abs(row - reference).sum() <= 8  # a norm at an edge falls to one side in fp32, to the other in fp64
        assert row.sum() == 4000


def test_norms_beyond_the_bins_are_counted_in_the_last_ones() -> None:
    found = histogram(torch.tensor([[0.0, 1e-9, 1e30]]))[0]
    assert found[0] == 2
    assert found[-1] == 1
    assert found.sum() == 3


def test_quantiles_shares_and_moments_are_the_samples_within_a_bin() -> None:
    norms = bulk(20000, 50.0, 0.4)
    counts = counted(norms)
    for share, value in zip((0.01, 0.5, 0.99, 1.0), quantiles(counts, [0.01, 0.5, 0.99, 1.0]), strict=True):
        assert value == pytest.approx(np.quantile(norms, share), rel=0.011)
    for cutoff in (20.0, 50.0, 90.0, 1e4, 1e-4):
        assert share_above(counts, cutoff) == pytest.approx((norms > cutoff).mean(), abs=0.001)
    assert moments(counts) == pytest.approx((norms.mean(), norms.std()), rel=0.002)


def test_of_no_tokens_nothing_is_known() -> None:
    empty = np.zeros(BINS, dtype=np.int64)
    assert quantiles(empty, [0.5]) == [None]
    assert share_above(empty, 3.0) is None
    assert share_above(counted(bulk(10, 5, 0.1)), None) == 0


ONE = {
    "normal": bulk(30000, 40, 0.25),
    "narrow": bulk(30000, 12, 0.01),
    "few": bulk(200, 40, 0.25),
    "skewed to the right": 10 + np.random.default_rng(1).gamma(2.0, 15.0, 30000),
    "skewed to the left": 200 - np.random.default_rng(2).gamma(2.0, 15.0, 30000).clip(max=190),
    "heavy tails": 40 * np.exp(0.2 * np.random.default_rng(3).standard_t(3, 30000)),
    "flat": np.random.default_rng(4).uniform(20, 60, 30000),
    "heaped at the end": np.minimum(bulk(30000, 5, 0.45), 13.0 * (1 + 0.02 * np.random.default_rng(5).random(30000))),
    "all alike": np.full(30000, 7.0),
}


@pytest.mark.parametrize("kind", ONE)
def test_one_cloud_has_no_outliers_however_it_is_shaped(kind: str) -> None:
    counts = counted(ONE[kind])
    assert not fit_clouds(counts).two
    cutoff = find_cutoff(counts, "valley")
    assert cutoff.value is None
    assert cutoff.number() == np.inf
    assert "one cloud" in cutoff.how


@pytest.mark.parametrize("rate", [0.0237, 0.2, 0.002])
@pytest.mark.parametrize(("times", "spread"), [(10, 0.25), (3, 0.15)])
def test_a_second_cloud_is_found_with_its_share(rate: float, times: float, spread: float) -> None:
    """As in DINOv2 ViT-g, 2.37 % are ten times as long; in DeiT-III about three times."""
    many = round(30000 * rate)
    low, high = bulk(30000 - many, 40, spread), bulk(many, 40 * times, spread, seed=1)
    counts = counted(np.concatenate([low, high]))
    clouds = fit_clouds(counts)
    assert clouds.two
    assert clouds.shares[1] == pytest.approx(rate, rel=0.2)
    assert clouds.centres == pytest.approx((40, 40 * times), rel=0.1)
    cutoff = find_cutoff(counts, "valley").value
    assert cutoff is not None
    assert np.quantile(low, 0.998) < cutoff < np.quantile(high, 0.02)


def test_a_skewed_bulk_does_not_hide_a_second_cloud() -> None:
    rng = np.random.default_rng(5)
    norms = np.concatenate([10 + rng.gamma(2.0, 8.0, 29300), bulk(700, 400, 0.2)])
    cutoff = find_cutoff(counted(norms), "valley").value
    assert cutoff is not None
    assert 100 < cutoff < 300


def test_where_the_main_cloud_is_the_upper_one_outliers_are_still_above_it() -> None:
    norms = np.concatenate([bulk(6000, 5, 0.05), bulk(23000, 40, 0.1), bulk(1000, 500, 0.1)])
    cutoff = find_cutoff(counted(norms), "valley").value
    assert cutoff is not None
    assert 60 < cutoff < 400
    without = find_cutoff(counted(norms[:29000]), "valley")
    assert without.value is None


def test_two_clouds_that_are_nearly_as_long_are_no_outliers() -> None:
    counts = counted(np.concatenate([bulk(29000, 40, 0.01), bulk(1000, 44, 0.01)]))
    assert fit_clouds(counts).two
    cutoff = find_cutoff(counts, "valley")
    assert cutoff.value is None
    assert "less than" in cutoff.how


def test_a_few_accidents_are_no_cloud() -> None:
    assert find_cutoff(counted(np.concatenate([bulk(30000, 40, 0.2), np.full(5, 900.0)])), "valley").value is None


def test_other_rules_say_what_they_are() -> None:
    norms = bulk(20000, 50.0, 0.3)
    counts = counted(norms)
    assert find_cutoff(counts, "3std").value == pytest.approx(norms.mean() + 3 * norms.std(), rel=0.005)
    assert find_cutoff(counts, "q0.98").value == pytest.approx(np.quantile(norms, 0.98), rel=0.011)
    fixed = find_cutoff(counts, "150")
    assert (fixed.value, fixed.rule) == (150, "fixed")
    assert "3 standard deviations" in find_cutoff(counts, "3std").how


def test_the_fit_climbs_to_a_mixture_that_no_shift_of_its_numbers_improves() -> None:
    """Against the likelihood of the same mixture in float64 on the sample itself."""
    norms = np.concatenate([bulk(5000, 40, 0.3), bulk(500, 300, 0.2, seed=1)])
    clouds = fit_clouds(counted(norms))

    def likelihood(means: Sample, spreads: Sample, share: float) -> float:
        x = np.log(norms)[:, None]
        each = np.exp(-0.5 * ((x - means) / spreads) ** 2) / spreads * np.array([1 - share, share])
        return float(np.log(each.sum(1)).mean())

    means, spreads, share = np.log(clouds.centres), np.array(clouds.spreads), clouds.shares[1]
    reached = likelihood(means, spreads, share)
    for change in (0.05, -0.05):
        assert likelihood(means + [change, 0], spreads, share) < reached
        assert likelihood(means + [0, change], spreads, share) < reached
        assert likelihood(means, spreads * (1 + change), share) < reached
        assert likelihood(means, spreads, share * (1 + 4 * change)) < reached


@pytest.mark.parametrize("rule", ["valley", "3std", "q0.98"])
def test_where_all_norms_are_the_same_nothing_stands_out(rule: str) -> None:
    for norm in (20.0, 20.02, 37.123, 1e-9, 0.0):  # not even by the width of a bin, in the middle of which 20 may lie
        assert find_cutoff(counted(np.full(500, norm)), rule).value is None


@pytest.mark.parametrize("rule", ["ridge", "q2", "q0", "-3", "0", "nan", "qx", "inf"])
def test_rules_that_make_no_sense_are_refused(rule: str) -> None:
    with pytest.raises(ConfigError, match="cutoff: is a number, valley, 3std, or a quantile"):
        check_rule(rule)


def test_bins_are_of_equal_ratio() -> None:
    ratio = edges()[1:] / edges()[:-1]
    assert ratio.min() == pytest.approx(ratio.max()) == pytest.approx(2 ** (1 / 64))
    assert ((edges()[:-1] < centres()) & (centres() < edges()[1:])).all()
