"""The objective on two processes equals one: with gradients averaged by hand, and sharded by FSDP."""

from __future__ import annotations

from typing import Any

import torch
from distributed import run_ranks
from tiny import split_crops, tiny_config, tiny_crops, tiny_objective
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinoreg.objectives.self_distillation import SelfDistillation
from dinoreg.parallel.mesh import Ranks
from dinoreg.parallel.shard import EfficiencyConfig, parallelize

IMAGES = 16
LAYOUTS: list[tuple[dict[str, Any], int]] = [  # options of the objective, parts on each rank
    ({}, 1),
    ({}, 2),
    ({"group": 8, "separate_head": False}, 2),
    ({"group": 4, "centering": "centering"}, 1),
    ({"dino": 0}, 1),
]
Result = tuple[dict[str, Tensor], list[Tensor]]


def step(objective: SelfDistillation, ranks: Ranks, parts: int, seed: int = 0) -> dict[str, Tensor]:
    """Forward and backward of this rank's share; metrics averaged over ranks. A quarter of the images is unmasked."""
    crops = tiny_crops(IMAGES, seed=seed)
    crops.masks[IMAGES * 3 // 4 :] = False
    share = split_crops(crops, ranks.world)[ranks.rank]
    metrics, _ = objective.forward_backward(split_crops(share, parts), teacher_temperature=0.05, seed=0)
    return {name: ranks.sum_(value.clone()) / ranks.world for name, value in metrics.items()}


def averaged(ranks: Ranks, layouts: list[tuple[dict[str, Any], int]]) -> list[Result]:
    results = []
    for options, parts in layouts:
        objective = tiny_objective(tiny_config(**options), ranks)
        metrics = step(objective, ranks, parts)
        gradients = [ranks.sum_(p.grad.clone()) / ranks.world for p in objective.student.parameters()]  # type: ignore[union-attr]
        results.append((metrics, gradients + list(objective.targets.buffers())))
    return results


def test_two_processes_equal_one() -> None:
    expected = averaged(Ranks.alone(), [(options, 1) for options, _ in LAYOUTS])
    for results in run_ranks(averaged, 2, LAYOUTS):
        for (metrics, gradients), (expected_metrics, expected_gradients) in zip(results, expected, strict=True):
            torch.testing.assert_close(metrics, expected_metrics, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)


def whole(network: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach().clone() for p in network.parameters()]


def train_sharded(ranks: Ranks, cfg: EfficiencyConfig, parts: int) -> Result:
    """Three steps of plain gradient descent; last metrics, and student and teacher in the end."""
    objective = tiny_objective(tiny_config(), ranks)
    parallelize(objective.student, objective.teacher, cfg, "fp32", ranks)
    for number in range(3):
        metrics = step(objective, ranks, parts, seed=number)
        with torch.no_grad():
            for parameter in objective.student.parameters():
                assert parameter.grad is not None
                parameter.sub_(0.02 * parameter.grad)
                parameter.grad = None
        objective.update_teacher(0.7)
    return metrics, whole(objective.student) + whole(objective.teacher)


SHARDED = [
    (EfficiencyConfig(shard="full"), 1),
    (EfficiencyConfig(shard="full", reshard=False, activation_checkpointing="full"), 2),
    (EfficiencyConfig(shard="none"), 2),
]


def train_all(ranks: Ranks) -> list[Result]:
    return [train_sharded(ranks, cfg, parts) for cfg, parts in SHARDED]


def test_sharded_training_equals_one_process() -> None:
    """Several steps, since a teacher whose gathered weights are not freed would go on with those of the first."""
    metrics, parameters = train_sharded(Ranks.alone(), EfficiencyConfig(), 1)
    for results in run_ranks(train_all, 2):
        for sharded_metrics, sharded_parameters in results:
            torch.testing.assert_close(sharded_metrics, metrics, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(sharded_parameters, parameters, rtol=1e-4, atol=1e-5)
