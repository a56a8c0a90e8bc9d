"""From a configuration to the parts of a run that the machine has a say in."""

from __future__ import annotations

import logging
import math

import torch
from torch import nn

from dinoreg.data.loader import BatchLoader, build_loader
from dinoreg.data.masks import MaskConfig
from dinoreg.data.sources import Sources
from dinoreg.models.float8 import use_float8
from dinoreg.models.vit import VisionTransformer
from dinoreg.models.weights import initialise
from dinoreg.objectives.self_distillation import SelfDistillation
from dinoreg.parallel.mesh import Ranks
from dinoreg.parallel.precision import resolve_precision
from dinoreg.parallel.shard import parallelize
from dinoreg.train.about import About
from dinoreg.train.recipe import RunConfig

logger = logging.getLogger("dinoreg")


def build_objective(cfg: RunConfig, ranks: Ranks, from_weights: bool = True) -> SelfDistillation:
    """Student, teacher and heads, initialised, then spread over the ranks.

    Every rank fills the same weights from the seed, so the result does not depend on how many there are. Memory is
    filled with NaN first: a parameter that nothing initialises makes the first loss NaN instead of a silent zero.
    from_weights: start from `model.init_from`, if given; not needed where a checkpoint will overwrite everything.
    """
    with torch.device("meta"):
        objective = SelfDistillation(
            cfg.objective, cfg.model, ranks, attention=cfg.efficiency.attention, compile=cfg.efficiency.compile
        )
    objective.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in objective.state_dict().values():
            if tensor.is_floating_point():
                tensor.fill_(math.nan)
    torch.manual_seed(cfg.seed)
    objective.init_weights()
    if cfg.model.init_from and from_weights:
        backbone: VisionTransformer = objective.student["backbone"]  # type: ignore[assignment]
        report = initialise(backbone, cfg.model.init_from, cfg.model.init_from_trusted)
        objective.teacher["backbone"].load_state_dict(objective.student["backbone"].state_dict())
        if ranks.is_main:
            logger.info(str(report))
    _check_filled(objective)
    precision = resolve_precision(cfg.train.precision, ranks.device)
    if cfg.efficiency.fp8:
        use_float8(objective, precision, ranks.device)
    parallelize(objective.student, objective.teacher, cfg.efficiency, precision, ranks)
    return objective.to(ranks.device)


def _check_filled(module: nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise RuntimeError(f"{name} was not initialised; its module's init_weights() has to fill it")


def open_loader(cfg: RunConfig, sources: Sources, ranks: Ranks, start: About, total: int) -> BatchLoader:
    """The loader of this rank for the steps after those of `start` in a run of `total` steps."""
    side = cfg.crops.global_size // cfg.model.patch_size
    return build_loader(
        sources,
        cfg.data,
        cfg.crops,
        cfg.photometric,
        cfg.masks if cfg.objective.ibot.weight > 0 else MaskConfig(probability=0.0),
        grid=(side, side),
        channels=cfg.model.in_channels,
        batch_size=cfg.train.batch_size,
        seed=cfg.seed,
        rank=ranks.rank,
        world=ranks.world,
        start_step=start.step,
        steps=total,
        local_world=ranks.local_world,
        stream_position=start.streams,
        agree=ranks.agree,
    )
