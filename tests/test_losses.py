"""Cross-entropies and centering against float64 references written straight from their formulas."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from distributed import run_ranks
from torch import Tensor

from dinoreg import chunks
from dinoreg.losses.centering import centering_offset, update_center_
from dinoreg.losses.distillation import (
    cross_entropy,
    masked_token_weights,
    pair_weights,
    softmax_rows,
    table_rows,
)
from dinoreg.objectives.targets import class_token_assignments
from dinoreg.parallel.mesh import Ranks

ALONE = Ranks.alone()
IMAGES, LOCALS, PROTOTYPES = 5, 3, 12
STUDENT_T, TEACHER_T = 0.1, 0.06


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def entropy_between(target: Tensor, logits: Tensor) -> Tensor:
    """H(target, softmax(logits / T)) of one row."""
    exponentials = (logits / STUDENT_T).exp()
    return -(target * (exponentials / exponentials.sum()).log()).sum()


def dino_reference(teacher: Tensor, offset: Tensor, student_global: Tensor, student_local: Tensor) -> Tensor:
    """Sum over all pairs of different crops, divided by their number; (b, crops, K) each."""
    targets = (teacher / TEACHER_T + offset).softmax(-1)
    student = torch.cat([student_global, student_local], dim=1)
    pairs = [(t, s) for t, s in product(range(2), range(student.shape[1])) if t != s]
    terms = [entropy_between(targets[image, t], student[image, s]) for image in range(len(teacher)) for t, s in pairs]
    return torch.stack(terms).sum() / (len(pairs) * len(teacher))


def dino_loss(teacher: Tensor, offset: Tensor, student_global: Tensor, student_local: Tensor) -> Tensor:
    targets = softmax_rows(teacher.flatten(0, 1), offset, TEACHER_T)(0, 2 * len(teacher))
    local_count = student_local.shape[1]
    assigned = class_token_assignments(targets, local_count)
    logits = torch.cat([student_global.flatten(0, 1), student_local.flatten(0, 1)])
    entropies = cross_entropy(logits, list(assigned.values()), STUDENT_T)
    means = [part.mean() for part in entropies.split([count for count, _ in assigned.values()])]
    return sum(w * mean for w, mean in zip(pair_weights(local_count), means, strict=False))  # type: ignore[return-value]


@pytest.mark.parametrize("local_count", [LOCALS, 0])
@pytest.mark.parametrize("rows_at_once", [1, 4, 1000])
def test_dino_is_the_mean_over_pairs(rows_at_once: int, local_count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", {"cpu": rows_at_once * PROTOTYPES})
    teacher, offset = normal(IMAGES, 2, PROTOTYPES).clamp(-1, 1), normal(PROTOTYPES, seed=1)
    student = [normal(IMAGES, n, PROTOTYPES, seed=2 + n).clamp(-1, 1) for n in (2, local_count)]
    leaves = [s.clone().requires_grad_() for s in student]
    loss = dino_loss(teacher, offset, *leaves)
    exact = [s.double().requires_grad_() for s in student]
    expected = dino_reference(teacher.double(), offset.double(), *exact)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    for gradient, reference in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, exact), strict=True
    ):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=1e-7)


def test_eight_local_crops_give_each_pair_one_eighteenth() -> None:
    global_share, local_share = pair_weights(8)
    assert global_share / 2 == pytest.approx(1 / 18)  # 2 pairs of global crops
    assert local_share / 16 == pytest.approx(1 / 18)
    assert pair_weights(0) == (1.0, 0.0)


def test_ibot_is_the_mean_over_crops_of_their_mean_over_masked_patches() -> None:
    patches = 9
    masks = torch.rand(IMAGES, 2, patches, generator=torch.Generator().manual_seed(3)) < 0.4
    masks[0, 1] = masks[3, 0] = False
    index = masks.flatten().nonzero()[:, 0]
    teacher = normal(IMAGES, 2, patches, PROTOTYPES).double().clamp(-1, 1)
    student = normal(IMAGES, 2, patches, PROTOTYPES, seed=1).double().clamp(-1, 1)
    offset = normal(PROTOTYPES, seed=2).double()
    crops = []
    for image, crop in product(range(IMAGES), range(2)):
        where = [p for p in range(patches) if masks[image, crop, p]]
        targets = (teacher[image, crop] / TEACHER_T + offset).softmax(-1)
        terms = [entropy_between(targets[p], student[image, crop, p]) for p in where]
        crops.append(sum(terms) / len(terms) if terms else torch.zeros(()).double())
    expected = sum(crops) / len(crops)

    rows = softmax_rows(teacher.flatten(0, 2)[index], offset, TEACHER_T)
    entropies = cross_entropy(student.flatten(0, 2)[index], [(len(index), rows)], STUDENT_T)
    weights = masked_token_weights(masks, index)
    torch.testing.assert_close((weights * entropies).sum() / (2 * IMAGES), expected, rtol=1e-6, atol=0)


def test_gradient_by_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", {"cpu": 2 * PROTOTYPES})
    teacher, table = normal(4, PROTOTYPES).double(), normal(2, PROTOTYPES, seed=1).double().softmax(-1)
    targets = [(4, softmax_rows(teacher, torch.zeros(PROTOTYPES).double(), 1.0)), (6, table_rows(table, 3))]
    logits, weights, step = normal(10, PROTOTYPES, seed=2).double(), normal(10, seed=3).double(), 1e-6

    def loss(z: Tensor) -> Tensor:
        return weights @ cross_entropy(z.clone(), targets, 0.7)  # a clone, for it is used up

    leaf = logits.clone().requires_grad_()
    loss(leaf).backward()
    shifts = step * torch.eye(logits.numel(), dtype=torch.float64).view(-1, *logits.shape)
    differences = torch.stack([loss(logits + shift) - loss(logits - shift) for shift in shifts]) / (2 * step)
    torch.testing.assert_close(leaf.grad, differences.view_as(logits), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_fp32(dtype: torch.dtype) -> None:
    """Logits of weight_g = 10, which in half precision exp() would not survive."""
    student, teacher = (10 * normal(6, 40, seed=s).clamp(-1, 1).to(dtype) for s in (0, 1))
    offset = normal(40, seed=2)
    leaf, wide = student.clone().requires_grad_(), student.float().requires_grad_()
    loss = cross_entropy(leaf, [(6, softmax_rows(teacher, offset, 0.04))], STUDENT_T)
    expected = cross_entropy(wide, [(6, softmax_rows(teacher.float(), offset, 0.04))], STUDENT_T)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    expected.sum().backward()
    assert leaf.grad is not None and wide.grad is not None
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(leaf.grad, wide.grad.to(dtype))


def test_plateau_is_the_logarithm_of_the_prototypes() -> None:
    """A student that says nothing pays ln K whatever the target."""
    target = normal(7, 50).softmax(-1)
    entropies = cross_entropy(torch.full((7, 50), 3.0), [(7, table_rows(target))], STUDENT_T)
    torch.testing.assert_close(entropies, torch.full((7,), math.log(50)))


def test_no_rows_give_a_zero_gradient() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    cross_entropy(logits, [(0, table_rows(torch.zeros(0, 5)))], STUDENT_T).sum().backward()
    assert logits.grad is not None and logits.grad.shape == (0, 5)


def test_rows_and_targets_must_agree() -> None:
    with pytest.raises(ValueError, match="targets for 3 rows, but logits for 4"):
        cross_entropy(torch.zeros(4, 5), [(3, table_rows(torch.zeros(3, 5)))], STUDENT_T)


def test_centering_is_the_formula() -> None:
    logits, center = normal(6, PROTOTYPES), normal(PROTOTYPES, seed=1)
    offset = centering_offset(center, TEACHER_T)
    expected = ((logits.double() - center.double()) / TEACHER_T).softmax(-1)
    torch.testing.assert_close(softmax_rows(logits, offset, TEACHER_T)(0, 6).double(), expected, rtol=1e-5, atol=1e-9)


def test_center_is_an_average_over_tokens_of_all_tiles() -> None:
    logits, start = normal(10, PROTOTYPES), normal(PROTOTYPES, seed=1)
    center = start.clone()
    update_center_(center, [logits[:7], lambda: logits[7:], logits[:0]], 0.9, ALONE)
    torch.testing.assert_close(center, 0.9 * start + 0.1 * logits.mean(0))


def test_center_stays_without_tokens() -> None:
    center = normal(PROTOTYPES)
    update_center_(center, [torch.zeros(0, PROTOTYPES)], 0.9, ALONE)
    torch.testing.assert_close(center, normal(PROTOTYPES), rtol=0, atol=0)


def centers_of_shares(ranks: Ranks, logits: Tensor, shares: list[int]) -> Tensor:
    center = torch.ones(PROTOTYPES)
    update_center_(center, [logits.split(shares)[ranks.rank]], 0.5, ranks)
    return center


def test_two_processes_equal_one() -> None:
    """Also when one has more tokens than the other."""
    logits = normal(10, PROTOTYPES)
    expected = 0.5 + 0.5 * logits.mean(0)
    for center in run_ranks(centers_of_shares, 2, logits, [8, 2]):
        torch.testing.assert_close(center, expected)
