"""KoLeo against its formula in float64, and on the batches that make its logarithm infinite."""

from __future__ import annotations

import math

import pytest
import torch
from distributed import run_ranks
from torch import Tensor

from dinoreg.losses.koleo import groups_straddle, koleo_loss
from dinoreg.objectives.spread import Spread, koleo_of_crops
from dinoreg.parallel.mesh import Ranks

ALONE = Ranks.alone()


def reference(features: Tensor, group: int) -> Tensor:
    """-mean log |x_i - x_nearest(i)|, one image after the other."""
    x = features.double()
    x = x / x.pow(2).sum(1, keepdim=True).sqrt()
    group = group or len(x)
    terms = []
    for i in range(len(x)):
        start = i // group * group
        distances = [(x[i] - x[j]).pow(2).sum().sqrt() for j in range(start, start + group) if j != i]
        terms.append(-torch.stack(distances).min().log())
    return torch.stack(terms).mean()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("group", [0, 12, 4, 2])
def test_value_and_gradient_equal_the_formula(group: int) -> None:
    features = normal(12, 7).requires_grad_()
    value = koleo_loss(features, group, ALONE)
    (gradient,) = torch.autograd.grad(value, features)
    exact = features.detach().double().requires_grad_()
    expected = reference(exact, group)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-6)


def test_scale_of_a_feature_does_not_matter() -> None:
    features, scales = normal(10, 5), 10 ** normal(10, 1, seed=1)
    torch.testing.assert_close(koleo_loss(features * scales, 0, ALONE), koleo_loss(features, 0, ALONE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "features",
    [normal(1, 6).expand(8, 6), torch.zeros(8, 6), torch.cat([normal(4, 6), normal(4, 6)]), normal(8, 6) * 1e-4],
    ids=["all the same", "all zero", "each one twice", "short"],
)
def test_value_and_gradient_stay_finite(features: Tensor, dtype: torch.dtype) -> None:
    leaf = features.to(dtype).clone().requires_grad_()
    value = koleo_loss(leaf, 0, ALONE)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert leaf.grad.abs().max() < 1e4


def test_rounding_between_identical_images_is_not_blown_up() -> None:
    """At a distance of 1e-7 the formula's gradient is 1e7 an image; here it is less than 1 / (2 EPS)."""
    leaf = (normal(1, 384) + 1e-7 * normal(16, 384, seed=1)).requires_grad_()
    koleo_loss(leaf, 0, ALONE).backward()
    assert leaf.grad is not None
    assert leaf.grad.norm() < 1e5


@pytest.mark.parametrize(("count", "group"), [(1, 0), (1, 1), (4, 1)])
def test_an_image_without_neighbours_has_no_loss(count: int, group: int) -> None:
    features = normal(count, 5).requires_grad_()
    value = koleo_loss(features, group, ALONE)
    value.backward()
    assert value.item() == 0
    assert features.grad is not None
    assert features.grad.abs().max() == 0


def test_groups_must_fill_the_batch() -> None:
    with pytest.raises(ValueError, match="groups of 5 images do not fill a batch of 8"):
        koleo_loss(normal(8, 3), 5, ALONE)


@pytest.mark.parametrize(
    ("share", "group", "pieces", "expected"),
    [(8, 8, 4, False), (8, 4, 4, False), (8, 0, 1, False), (8, 0, 4, True), (8, 16, 4, True), (6, 4, 2, True)],
)
def test_when_groups_cross_borders(share: int, group: int, pieces: int, expected: bool) -> None:
    assert groups_straddle(share, group, pieces) is expected


def test_crops_of_an_image_are_not_neighbours() -> None:
    cls = normal(6, 4).repeat_interleave(2, 0)  # both crops of an image alike
    torch.testing.assert_close(koleo_of_crops(cls, 0, ALONE), koleo_loss(cls[::2], 0, ALONE))


def test_gradient_taken_beforehand_equals_the_direct_one() -> None:
    cls = normal(12, 5).requires_grad_()
    direct = koleo_of_crops(cls, 0, ALONE)
    (expected,) = torch.autograd.grad(direct, cls)
    parts = cls.split(4)
    spread = Spread.of([part.detach() for part in parts], 0, ALONE)
    total = torch.stack([spread.follow(part, i) for i, part in enumerate(parts)]).mean()
    (gradient,) = torch.autograd.grad(total, cls)
    torch.testing.assert_close(total, direct)
    torch.testing.assert_close(gradient, expected)
    assert math.isfinite(total.item())


def share_of_koleo(ranks: Ranks, features: Tensor, groups: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Value and gradient (of the mean over ranks) of this rank's share."""
    out = []
    for group in groups:
        share = features.chunk(ranks.world)[ranks.rank].clone().requires_grad_()
        value = koleo_loss(share, group, ranks)
        (gradient,) = torch.autograd.grad(value, share)
        out.append((value.detach(), gradient / ranks.world))
    return out


def test_two_processes_equal_one() -> None:
    """Groups that are a rank's share, a part of it, the whole batch, and such as cross ranks."""
    features, groups = normal(24, 6), [12, 6, 0, 24, 8]
    first, second = run_ranks(share_of_koleo, 2, features, groups)
    for index, group in enumerate(groups):
        whole = features.clone().requires_grad_()
        expected = koleo_loss(whole, group, ALONE)
        (expected_gradient,) = torch.autograd.grad(expected, whole)
        (value_0, gradient_0), (value_1, gradient_1) = first[index], second[index]
        torch.testing.assert_close((value_0 + value_1) / 2, expected.detach(), msg=f"group {group}")
        torch.testing.assert_close(torch.cat([gradient_0, gradient_1]), expected_gradient, rtol=1e-5, atol=1e-6)
