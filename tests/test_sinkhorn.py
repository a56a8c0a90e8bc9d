"""Sinkhorn-Knopp in tiles, against the algorithm with its matrix written out in float64."""

from __future__ import annotations

import pytest
import torch
from distributed import run_ranks
from torch import Tensor

from dinoreg import chunks
from dinoreg.losses.sinkhorn import sinkhorn_offset
from dinoreg.parallel.mesh import Ranks

ALONE = Ranks.alone()


def reference(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """The assignments (B, K): rows, then columns of Q are made to sum to 1/K and 1/B, in turn."""
    samples, prototypes = logits.shape
    q = (logits.double() / temperature).exp().T  # (K, B)
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / prototypes
        q = q / q.sum(0, keepdim=True) / samples
    return (q * samples).T


def assignments(logits: Tensor, temperature: float, iterations: int = 3, parts: int = 1) -> Tensor:
    offset = sinkhorn_offset(logits.chunk(parts), temperature, iterations, ALONE)
    return (logits.double() / temperature + offset.double()).softmax(-1)


def cosines(samples: int, prototypes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(samples, prototypes, generator=generator) * 2 - 1


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
@pytest.mark.parametrize("temperature", [0.04, 0.07])
def test_equals_the_written_out_algorithm(temperature: float, iterations: int) -> None:
    logits = cosines(48, 100)
    expected = reference(logits, temperature, iterations)
    torch.testing.assert_close(assignments(logits, temperature, iterations), expected, rtol=3e-5, atol=1e-9)


def test_float64_is_exact() -> None:
    logits = cosines(20, 31).double()
    torch.testing.assert_close(assignments(logits, 0.05), reference(logits, 0.05, 3), rtol=1e-12, atol=0)


def test_many_iterations_use_every_prototype_alike() -> None:
    used = assignments(cosines(64, 16), 0.1, iterations=200).mean(0)
    torch.testing.assert_close(used, torch.full_like(used, 1 / 16), rtol=1e-4, atol=0)


def test_tiles_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = cosines(256, 40)
    whole = sinkhorn_offset([logits], 0.05, 3, ALONE)
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", {"cpu": 40 * 7})  # 7 rows, which do not divide 32
    tiles = [*logits.split(32), logits[:0]]
    torch.testing.assert_close(sinkhorn_offset(tiles, 0.05, 3, ALONE), whole, rtol=1e-5, atol=1e-5)
    calls = [lambda tile=tile: tile for tile in tiles]
    torch.testing.assert_close(sinkhorn_offset(calls, 0.05, 3, ALONE), whole, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow() -> None:
    """weight_g = 10 at the lowest temperature: exp(250) is beyond fp32, and the range of 500 beyond what it can sum."""
    logits = 10 * cosines(64, 50)
    expected = reference(logits, 0.04, 3)
    assert expected.isfinite().all()
    torch.testing.assert_close(assignments(logits, 0.04), expected, rtol=2e-3, atol=1e-6)
    assert sinkhorn_offset([1000 * logits], 0.04, 3, ALONE).isfinite().all()


def test_a_prototype_far_from_every_sample_keeps_its_share() -> None:
    logits = cosines(32, 8)
    logits[:, 3] -= 100  # at this temperature exp() of it is 0, even in float64
    used = assignments(logits, 0.04, iterations=300).mean(0)
    torch.testing.assert_close(used[3], torch.tensor(1 / 8, dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    logits = cosines(40, 60).to(dtype)
    offset = sinkhorn_offset([logits], 0.04, 3, ALONE)
    assert offset.dtype == torch.float32
    torch.testing.assert_close(offset, sinkhorn_offset([logits.float()], 0.04, 3, ALONE), rtol=1e-6, atol=1e-5)


def test_no_sample_anywhere_leaves_targets_finite() -> None:
    offset = sinkhorn_offset([torch.zeros(0, 5), torch.zeros(0, 5)], 0.04, 3, ALONE)
    torch.testing.assert_close(offset, torch.zeros(5))


def test_nan_is_not_hidden() -> None:
    logits = cosines(6, 5)
    logits[2, 3] = torch.nan
    assert sinkhorn_offset([logits], 0.04, 3, ALONE).isnan().any()


def offset_of_share(ranks: Ranks, logits: Tensor, counts: list[list[int]]) -> Tensor:
    first = sum(sum(share) for share in counts[: ranks.rank])
    share = logits[first : first + sum(counts[ranks.rank])]
    return sinkhorn_offset(share.split(counts[ranks.rank]), 0.04, 3, ranks)


def offsets_of_shares(ranks: Ranks, logits: Tensor) -> list[Tensor]:
    even, uneven, empty = [[10, 10], [10, 10]], [[3, 20], [7, 10]], [[20, 20], [0, 0]]
    return [offset_of_share(ranks, logits, counts) for counts in (even, uneven, empty)]


def test_two_processes_equal_one() -> None:
    logits = 3 * cosines(40, 64)
    expected = sinkhorn_offset([logits], 0.04, 3, ALONE)
    for offsets in run_ranks(offsets_of_shares, 2, logits):
        for offset in offsets:
            torch.testing.assert_close(offset, expected, rtol=1e-5, atol=2e-5)
