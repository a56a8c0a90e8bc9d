"""The schema of a run: every part's dataclass, put together, and what must hold between parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dinoreg.data.crops import CropConfig
from dinoreg.data.loader import DataConfig
from dinoreg.data.masks import MaskConfig
from dinoreg.data.photometric import PhotometricConfig
from dinoreg.models.vit import ModelConfig
from dinoreg.objectives.self_distillation import ObjectiveConfig
from dinoreg.parallel.shard import EfficiencyConfig
from dinoreg.train.checkpoint import CheckpointConfig
from dinoreg.train.monitors import MonitorConfig
from dinoreg.train.optimizer import OptimConfig
from dinoreg.train.tracking import TrackingConfig


@dataclass
class LoopConfig:
    """Length and pace. Give exactly one of steps, epochs, images."""

    batch_size: int = 64  # source images a step, over all GPUs and all accumulated parts
    accumulate: int = 1  # parts in which each rank runs its share of the batch; results do not change
    steps: int | None = None
    epochs: float | None = None  # true passes over the data
    images: float | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    log_every: int = 10  # steps; the device is only waited for at these


@dataclass
class RunConfig:
    """One run of `dinoreg train`."""

    run_dir: str = "runs/unnamed"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    photometric: PhotometricConfig = field(default_factory=PhotometricConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
