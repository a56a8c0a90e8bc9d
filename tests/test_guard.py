"""A step that is not finite leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import tiny_config, tiny_crops, tiny_objective

from dinoreg.objectives.self_distillation import SelfDistillation
from dinoreg.parallel.mesh import Ranks
from dinoreg.parallel.shard import EfficiencyConfig, parallelize
from dinoreg.train.guard import Guard
from dinoreg.train.optimizer import OptimConfig, Optimizer
from dinoreg.train.schedules import StepValues

VALUES = StepValues(lr=0.01, last_layer_lr=0.01, weight_decay=0.1, teacher_momentum=0.9, teacher_temperature=0.05)


def state_of(objective: SelfDistillation, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Everything that a step may change, copied; shards as they lie on this rank."""
    found = dict(objective.state_dict())
    for number, state in enumerate(optimizer.adamw.state.values()):
        found |= {f"{number}.{name}": value for name, value in state.items()}
    return {name: _local(value).clone() for name, value in found.items()}


def _local(value: Any) -> torch.Tensor:
    return value.to_local() if hasattr(value, "to_local") else value


def step(objective: SelfDistillation, optimizer: Optimizer, guard: Guard, seed: int, poison: float | None) -> None:
    optimizer.set_values(VALUES)
    metrics, _ = objective.forward_backward([tiny_crops(4, seed=seed)], teacher_temperature=0.05, seed=seed)
    if poison is not None:
        gradients = [_local(p.grad) for p in objective.student.parameters() if p.grad is not None]
        next(gradient for gradient in gradients if gradient.numel()).view(-1)[0] = poison
    metrics |= optimizer.clip()
    skip = guard(metrics)
    optimizer.step(skip)
    objective.update_teacher(VALUES.teacher_momentum, skip)


def parts(centering: str, ranks: Ranks | None = None) -> tuple[SelfDistillation, Optimizer, Guard]:
    objective = tiny_objective(tiny_config(centering=centering), ranks)
    objective.student["backbone"].depth = 2  # type: ignore[assignment]
    return objective, Optimizer(objective.student, OptimConfig()), Guard(ranks or Ranks.alone())


@pytest.mark.parametrize("centering", ["sinkhorn", "centering"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(poison: float, centering: str) -> None:
    objective, optimizer, guard = parts(centering)
    step(objective, optimizer, guard, 0, None)
    before = state_of(objective, optimizer)
    step(objective, optimizer, guard, 1, poison)
    after = state_of(objective, optimizer)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: value.item() for name, value in guard.counts().items()} == {"skipped/total": 1, "skipped/in_row": 1}
    step(objective, optimizer, guard, 2, None)
    assert any(not torch.equal(value, before[name]) for name, value in state_of(objective, optimizer).items())
    assert guard.counts()["skipped/in_row"] == 0 and guard.counts()["skipped/total"] == 1


def test_a_run_with_a_skipped_step_is_the_run_without_it() -> None:
    poisoned, healthy = parts("centering"), parts("centering")
    for seed, poison in ((0, None), (7, torch.nan), (1, None), (8, torch.inf), (2, None)):
        step(*poisoned, seed, poison)
        if poison is None:
            step(*healthy, seed, None)
    ours, theirs = state_of(*poisoned[:2]), state_of(*healthy[:2])
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_loss_that_is_not_finite_is_judged_too() -> None:
    guard = Guard(Ranks.alone())
    fine = {"loss/total": torch.tensor(1.0), "grad_norm/backbone": torch.tensor(2.0), "loss/ibot": torch.tensor(3.0)}
    assert guard(fine) == 0
    assert guard(fine | {"loss/total": torch.tensor(torch.inf)}) == 1
    assert guard(fine | {"grad_norm/backbone": torch.tensor(torch.nan)}) == 1


def _one_rank_is_poisoned(ranks: Ranks, shard: str) -> list[Any]:
    objective, optimizer, guard = parts("centering", ranks)
    parallelize(objective.student, objective.teacher, EfficiencyConfig(shard=shard), "fp32", ranks)  # type: ignore[arg-type]
    optimizer = Optimizer(objective.student, OptimConfig())
    step(objective, optimizer, guard, ranks.rank, None)
    before = state_of(objective, optimizer)
    step(objective, optimizer, guard, 10 + ranks.rank, torch.nan if ranks.rank == 1 else None)
    after = state_of(objective, optimizer)
    unchanged = all(torch.equal(after[name], before[name]) for name in before)
    step(objective, optimizer, guard, 20 + ranks.rank, None)
    finite = all(value.isfinite().all().item() for value in state_of(objective, optimizer).values())
    return [unchanged, finite, guard.counts()["skipped/total"].item()]


@pytest.mark.parametrize("shard", ["full", "none"])
def test_all_ranks_skip_what_one_of_them_cannot_take(shard: str) -> None:
    assert run_ranks(_one_rank_is_poisoned, 2, shard) == [[True, True, 1.0]] * 2
