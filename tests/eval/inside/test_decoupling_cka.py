"""CKA from sums over images is what n x n kernels give, and is bounded by what chance gives."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from eval.inside.decoupling.cka import FOLDS, Cka, Moments, jackknife, total

PAIR = {"ab": ("a", "b")}
MIXED = {"a": ["a"], "b": ["b"], "sum": ["a", "b"]}


def normal(count: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(a: Tensor, b: Tensor, about: Tensor | None = None, batch: int = 7) -> Moments:
    parts = torch.stack([a, b], dim=1)
    found = Moments(["a", "b"], MIXED, torch.zeros(2, a.shape[1]) if about is None else about)
    for rows in parts.split(batch):
        found.add(rows)
    return found


def slow_cka(x: Tensor, y: Tensor) -> Cka:
    """From n x n kernels: Kornblith et al. (2019), and with the unbiased HSIC of Song et al. (2012, equation 5)."""
    n = len(x)
    centre = torch.eye(n).double() - 1 / n
    k, l = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    plain = (k * l).sum() / (k.norm() * l.norm())
    debiased = slow_hsic(x, y) / (slow_hsic(x, x) * slow_hsic(y, y)) ** 0.5
    return Cka(float(plain), debiased, None)


def slow_hsic(x: Tensor, y: Tensor) -> float:
    n, one = len(x), torch.ones(len(x)).double()
    k, l = x @ x.T, y @ y.T
    k.fill_diagonal_(0)
    l.fill_diagonal_(0)
    chained = 2 / (n - 2) * (one @ k @ l @ one)
    return float(
        (torch.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - chained) / (n * (n - 3))
    )


@pytest.mark.parametrize("count", [5, 30, 200])
def test_sums_give_what_kernels_of_all_pairs_give(count: int) -> None:
    a, b = normal(count, 12) + 3, normal(count, 12, 1) * 2
    b[:, :4] += a[:, :4]
    found = moments(a, b)
    for name, (x, y) in {"ab": (a, b), "as": (a, a + b), "bs": (b, a + b)}.items():
        names = {"a": "a", "b": "b", "s": "sum"}
        cka, slow = found.cka(names[name[0]], names[name[1]]), slow_cka(x, y)
        assert cka.plain == pytest.approx(slow.plain, rel=1e-10)
        assert cka.debiased == pytest.approx(slow.debiased, rel=1e-8)


def test_a_representation_is_alike_to_itself_turned_scaled_and_moved() -> None:
    a = normal(40, 6)
    turned = a @ torch.linalg.qr(normal(6, 6, 1)).Q * 3 + 5
    cka = moments(a, turned).cka("a", "b")
    assert cka.plain == pytest.approx(1, abs=1e-12)
    assert cka.debiased == pytest.approx(1, abs=1e-12)


def test_the_floor_is_the_mean_over_all_pairings() -> None:
    a, b = normal(5, 3) + 1, normal(5, 3, 1)
    every = [moments(a, b[list(order)]).cka("a", "b").plain for order in permutations(range(5))]
    assert moments(a, b).cka("a", "b").floor == pytest.approx(sum(every) / len(every), rel=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("dim", [10, 100])
def test_the_floor_of_independent_data_is_dimensions_by_images_and_dimensions(dim: int) -> None:
    """The facts measured .046 and .331 with 200 images."""
    cka = moments(normal(200, dim), normal(200, dim, 1)).cka("a", "b")
    assert cka.floor == pytest.approx(dim / (200 + dim), rel=0.03)
    assert cka.plain == pytest.approx(dim / (200 + dim), rel=0.2)
    assert abs(cka.debiased or 0) < 0.05


def test_nothing_is_said_of_what_does_not_vary() -> None:
    a, none = normal(50, 8), torch.zeros(50, 8).double()
    assert moments(a, none).cka("a", "b") == Cka(None, None, None)
    rounding = (torch.full((50, 8), 1000.0) * (1 + 3e-8 * torch.randn(50, 8))).double()
    assert moments(a, rounding, about=torch.full((2, 8), 1000.0)).cka("a", "b") == Cka(None, None, None)
    assert moments(a, none).cka("a", "sum").plain == pytest.approx(1)


def test_a_mean_a_million_times_as_long_changes_nothing() -> None:
    a, b = normal(3000, 16), normal(3000, 16, 1)
    b[:, :8] += a[:, :8]
    plain = moments(a, b, batch=500).cka("a", "b")
    far = moments(a + 1e6, b, about=torch.tensor([1e6, 0]).double()[:, None].expand(2, 16) + 0.3, batch=500).cka(
        "a", "b"
    )
    for kind in ("plain", "debiased", "floor"):
        assert getattr(far, kind) == pytest.approx(getattr(plain, kind), rel=1e-7)


def test_folds_add_up_and_one_can_be_left_out() -> None:
    a, b = normal(60, 4), normal(60, 4, 1)
    folds = [moments(a[at::3], b[at::3]) for at in range(3)]
    assert total(folds).cka("a", "b").debiased == pytest.approx(moments(a, b).cka("a", "b").debiased, rel=1e-10)
    kept = torch.arange(60) % 3 != 1
    left = total(folds).plus(folds[1], -1).cka("a", "b")
    assert left.plain == pytest.approx(moments(a[kept], b[kept]).cka("a", "b").plain, rel=1e-10)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    def drawn(seed: int, count: int) -> tuple[Tensor, Tensor]:
        a, b = normal(count, 4, seed), normal(count, 4, seed + 100_000)
        return a, b + 0.7 * a

    truth = moments(*drawn(99, 200_000), batch=10_000).cka("a", "b").debiased
    held = 0
    for seed in range(100):
        a, b = drawn(seed, 200)
        folds = [moments(a[at::FOLDS], b[at::FOLDS], batch=99) for at in range(FOLDS)]
        interval = jackknife(folds, PAIR)["ab"]["debiased"]
        assert interval is not None and truth is not None
        held += interval[0] < truth < interval[1]
    assert 88 <= held <= 100


def test_intervals_are_within_what_can_be_and_need_images_in_each_fold() -> None:
    a = normal(24, 4)
    b = a + 0.4 * normal(24, 4, 1)
    b[0] = a[0] + 8 * normal(1, 4, 2)  # on which nearly all depends
    found = jackknife([moments(a[at::FOLDS], b[at::FOLDS]) for at in range(FOLDS)], PAIR)["ab"]
    assert found["plain"] == (0, 1) and found["debiased"] is not None
    assert -1 <= found["debiased"][0] < found["debiased"][1] == 1
    few = jackknife([moments(a[at:5:FOLDS], b[at:5:FOLDS]) for at in range(FOLDS)], PAIR)["ab"]
    assert few == {"plain": None, "debiased": None}


def test_memory_is_that_of_the_pairs_of_parts() -> None:
    assert Moments.bytes(4, 1536) == 8 * 10 * 1536**2  # 189 MB a block of ViT-g
    found = moments(normal(4, 8), normal(4, 8))
    assert found._blocks.numel() * 8 == Moments.bytes(2, 8)
