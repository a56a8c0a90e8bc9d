"""Figures and intervals against slow computations and theory."""

from __future__ import annotations

import math
import random

import pytest
import torch

from eval.metrics import accuracy_by_class, accuracy_score, bootstrap, mean_score, share_interval


def test_accuracy_is_that_of_a_slow_count() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(4, (200,), generator=generator)
    guesses = torch.rand(200, 4, generator=generator).argsort(1)
    pairs = list(zip(guesses.tolist(), truth.tolist(), strict=True))
    for count in (1, 2, 4):
        expected = 100 * sum(label in guess[:count] for guess, label in pairs) / 200
        assert accuracy_score(guesses[:, :count], truth).value == pytest.approx(expected)
    assert accuracy_score(guesses[:, 0], truth) == accuracy_score(guesses[:, :1], truth)
    for number, value in enumerate(accuracy_by_class(guesses[:, 0], truth, 4)):
        own = [guess[0] == label for guess, label in pairs if label == number]
        assert value == pytest.approx(100 * sum(own) / len(own), abs=1e-3)


def test_the_interval_of_a_share_is_the_binomial_one() -> None:
    right = torch.arange(2000) % 10 < 7
    score = mean_score(100.0 * right)
    half = 1.96 * 100 * (0.7 * 0.3 / 2000) ** 0.5
    assert score.value == pytest.approx(70)
    assert score.low == pytest.approx(70 - half, abs=0.15)
    assert score.high == pytest.approx(70 + half, abs=0.15)


def test_the_interval_of_a_ratio_of_sums_is_that_of_slow_resampling() -> None:
    """As of an IoU: sums of intersections over sums of unions."""
    generator = torch.Generator().manual_seed(1)
    union = torch.rand(80, generator=generator) * 100 + 1
    inside = union * torch.rand(80, generator=generator)
    low, high = bootstrap(torch.stack([inside, union], 1), lambda sums: sums[:, 0] / sums[:, 1], resamples=4000)
    rng, slow = random.Random(0), []
    for _ in range(4000):
        drawn = [rng.randrange(80) for _ in range(80)]
        slow.append(sum(float(inside[i]) for i in drawn) / sum(float(union[i]) for i in drawn))
    slow.sort()
    assert low == pytest.approx(slow[100], abs=0.01)
    assert high == pytest.approx(slow[3900], abs=0.01)


def test_sums_of_any_shape_reach_the_statistic() -> None:
    seen: list[torch.Size] = []

    def statistic(sums: torch.Tensor) -> torch.Tensor:
        seen.append(sums.shape)
        return sums.sum((1, 2))

    low, high = bootstrap(torch.ones(10, 3, 2), statistic, resamples=50)
    assert low == high == 60  # ten images each time, of six ones each
    assert seen == [torch.Size([50, 3, 2])]


def test_intervals_are_the_same_each_time_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(2))
    first = mean_score(values)
    assert mean_score(values) == first
    monkeypatch.setattr("eval.metrics.AT_ONCE", 50 * 7)
    assert mean_score(values) == first


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(3)
    covered = 0
    for _ in range(100):
        score = mean_score((torch.rand(150, generator=generator) < 0.6).double())
        covered += score.low <= 0.6 <= score.high
    assert 88 <= covered <= 100


@pytest.mark.parametrize("truth", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("count", [30, 100, 500])
def test_the_interval_of_an_accuracy_covers_the_truth_with_few_images_too(count: int, truth: float) -> None:
    """Summed over all numbers of right images, in fp64: no draw of chance. A bootstrap's covers 60 % of 30 at 97 %."""
    covered = 0.0
    for found in range(count + 1):
        chance = math.comb(count, found) * truth**found * (1 - truth) ** (count - found)
        low, high = share_interval(found, count)
        covered += chance * (low <= 100 * truth <= high)
    assert 0.92 < covered < 0.99


def test_an_accuracy_of_100_percent_is_not_certain() -> None:
    score = accuracy_score(torch.ones(20, dtype=torch.long), torch.ones(20, dtype=torch.long))
    assert (score.value, score.high) == (100, 100) and 80 < score.low < 90
    right = torch.arange(4000) % 4 == 0
    score, same = accuracy_score(right, torch.ones(4000)), mean_score(100.0 * right)
    assert (score.low, score.high) == pytest.approx((same.low, same.high), abs=0.2)  # as a bootstrap's of many
