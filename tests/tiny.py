"""An objective and crops small enough for a test."""

from __future__ import annotations

from typing import Any

import torch

from dinoreg.data.batch import Crops
from dinoreg.models.heads import HeadConfig
from dinoreg.models.vit import ModelConfig
from dinoreg.objectives.self_distillation import DinoConfig, IbotConfig, KoleoConfig, ObjectiveConfig, SelfDistillation
from dinoreg.objectives.targets import TargetConfig
from dinoreg.parallel.mesh import Ranks

LOCALS = 3


def tiny_config(
    *,
    dino: float = 1.0,
    ibot: float = 1.0,
    koleo: float = 0.1,
    group: int = 0,
    separate_head: bool = True,
    centering: Any = "sinkhorn",
) -> ObjectiveConfig:
    return ObjectiveConfig(
        dino=DinoConfig(dino, HeadConfig(prototypes=64, hidden_dim=48, bottleneck_dim=16)),
        ibot=IbotConfig(ibot, separate_head, HeadConfig(prototypes=40, hidden_dim=32, bottleneck_dim=12)),
        koleo=KoleoConfig(koleo, group),
        targets=TargetConfig(centering=centering),
    )


def tiny_objective(
    cfg: ObjectiveConfig | None = None, ranks: Ranks | None = None, drop_path: float = 0.0, layerscale: float = 1.0
) -> SelfDistillation:
    """Weights with some life in them: of ordinary size, and a teacher that is not its student."""
    model = ModelConfig(
        embed_dim=32, depth=2, num_heads=2, patch_size=4, image_size=16, drop_path=drop_path, layerscale=layerscale
    )
    torch.manual_seed(0)
    objective = SelfDistillation(cfg or tiny_config(), model, ranks or Ranks.alone())
    objective.init_weights()
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return objective


def tiny_crops(images: int, *, local_count: int = LOCALS, seed: int = 0) -> Crops:
    """Noise, in which half of the global crops are masked, some of them more than others."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([0, 3, 0, 7]).repeat(images)[: 2 * images].view(images, 2, 1)
    masks = torch.rand(images, 2, 16, generator=generator).argsort(-1) < counts
    return make_crops(
        torch.randn(images, 2, 3, 16, 16, generator=generator),
        torch.randn(images, local_count, 3, 8, 8, generator=generator),
        masks,
    )


def make_crops(global_crops: torch.Tensor, local_crops: torch.Tensor, masks: torch.Tensor) -> Crops:
    return Crops(global_crops, local_crops, masks, masks.flatten().nonzero()[:, 0])


def split_crops(crops: Crops, parts: int) -> list[Crops]:
    columns = [tensor.chunk(parts) for tensor in (crops.global_crops, crops.local_crops, crops.masks)]
    return [make_crops(*pieces) for pieces in zip(*columns, strict=True)]
