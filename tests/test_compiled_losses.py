"""What the losses do to pieces of logits, by torch.compile and without: the same numbers, code written once."""

from __future__ import annotations

import shutil

import pytest
import torch
from test_losses import STUDENT_T, normal
from torch import Tensor
from torch._dynamo.utils import counters

from dinoreg import chunks
from dinoreg.losses.distillation import cross_entropy, softmax_rows, table_rows
from dinoreg.losses.sinkhorn import sinkhorn_offset
from dinoreg.parallel.mesh import Ranks

PROTOTYPES = 640
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")


def step(rows: int, temperature: float, compile: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Offset, targets, cross-entropies and their gradient; half of the rows have targets from a table."""
    teacher, student = (4 * normal(rows, PROTOTYPES, seed=rows + s).to(torch.bfloat16) for s in (0, 1))
    offset = sinkhorn_offset([teacher, teacher[:0]], temperature, 3, Ranks.alone(), compile)
    assigned = softmax_rows(teacher, offset, temperature, compile)
    table, student = assigned(0, rows), torch.cat([student, student.flip(0)]).requires_grad_()
    used = student.clone()
    used.retain_grad()
    entropies = cross_entropy(used, [(rows, assigned), (rows, table_rows(table))], STUDENT_T, compile)
    entropies.square().sum().backward()
    assert used.grad is not None
    return offset, table, entropies.detach(), used.grad.float()


def test_compiled_losses_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """For any number of rows and any temperature, whose changes must not have code written anew."""
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", {"cpu": 8 * PROTOTYPES})
    graphs = []
    for rows, temperature in [(24, 0.04), (21, 0.043), (17, 0.05), (29, 0.06), (30, 0.061), (11, 0.07)]:
        for one, other in zip(step(rows, temperature, True), step(rows, temperature, False), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[-1] == graphs[2], "no new code after pieces of 1 row, of no row and of several were seen"


def test_where_nothing_is_learnt_logits_stay() -> None:
    logits, target = normal(3, PROTOTYPES), normal(3, PROTOTYPES, seed=1).softmax(-1)
    before = logits.clone()
    cross_entropy(logits, [(3, table_rows(target))], STUDENT_T, compile=True)
    assert torch.equal(logits, before)
