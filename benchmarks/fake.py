"""A training step on tensors that have shapes and no memory: dinoreg's own, or the plain one beside it.

So can a laptop count what a large GPU would hold (benchmarks.memory) and do (benchmarks.roofline). One process, bf16;
photometrics are not in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from benchmarks.plain import PlainStep
from benchmarks.step import values_of
from dinoreg.config import load
from dinoreg.data.batch import Crops
from dinoreg.data.masks import draw_masks
from dinoreg.models.float8 import use_float8
from dinoreg.objectives.self_distillation import SelfDistillation
from dinoreg.parallel.mesh import Ranks
from dinoreg.parallel.shard import parallelize
from dinoreg.train.guard import Guard
from dinoreg.train.optimizer import Optimizer
from dinoreg.train.recipe import RunConfig

STEPS = 2  # the optimizer's moments are there from the second on


def load_recipe(recipe: str, words: list[str]) -> RunConfig:
    """A recipe as a single GPU would train it. Raises ConfigError."""
    return load(
        RunConfig, recipe, ["data.sources=[synthetic]", "objective.koleo.group=0", "train.precision=bf16", *words]
    )


@contextmanager
def fake_step(cfg: RunConfig, side: str, ranks: Ranks) -> Iterator[Callable[[], Any]]:
    """One update, to be called while the context lasts. side: "plain", or what dinoreg's step recomputes."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    masks = _masks(cfg)
    masked_index = masks.flatten().nonzero()[:, 0]
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        crops = _crops(cfg, fake.from_tensor(masks), fake.from_tensor(masked_index))
        yield _plain(cfg, ranks, crops) if side == "plain" else _ours(cfg, side, ranks, crops)


def _ours(cfg: RunConfig, side: str, ranks: Ranks, crops: Crops) -> Callable[[], Any]:
    objective = _objective(cfg, ranks)
    if cfg.efficiency.fp8:
        use_float8(objective, "bf16", ranks.device)
    efficiency = replace(cfg.efficiency, activation_checkpointing=side)  # type: ignore[arg-type]
    with unset_fake_temporarily():  # the mesh of processes is a real tensor, whose values are read
        parallelize(objective.student, objective.teacher, efficiency, "bf16", ranks)
    guard, optimizer, values = Guard(ranks), Optimizer(objective.student, cfg.optim), values_of(cfg)

    def step() -> None:
        optimizer.set_values(values)
        metrics, _ = objective.forward_backward([crops], teacher_temperature=values.teacher_temperature, seed=0)
        skip = guard(metrics | optimizer.clip())
        optimizer.step(skip)
        objective.update_teacher(values.teacher_momentum, skip)

    return step


def _plain(cfg: RunConfig, ranks: Ranks, crops: Crops) -> Callable[[], Any]:
    plain, values = PlainStep(cfg, _objective(cfg, ranks)), values_of(cfg)
    return lambda: plain.step(crops, values)


def _objective(cfg: RunConfig, ranks: Ranks) -> SelfDistillation:
    """Without values: nothing has any."""
    return SelfDistillation(cfg.objective, cfg.model, ranks, attention="sdpa")


def _masks(cfg: RunConfig) -> torch.Tensor:
    side, images = cfg.crops.global_size // cfg.model.patch_size, cfg.train.batch_size
    return torch.from_numpy(draw_masks(cfg.masks, (side, side), images, cfg.seed, 0, images))


def _crops(cfg: RunConfig, masks: torch.Tensor, index: torch.Tensor) -> Crops:
    images, channels, crops = cfg.train.batch_size, cfg.model.in_channels, cfg.crops
    large = torch.empty(images, 2, channels, crops.global_size, crops.global_size)
    small = torch.empty(images, crops.local_count, channels, crops.local_size, crops.local_size)
    return Crops(large, small, masks, index)
