"""The schema of a run: every part's dataclass, put together, and what must hold between parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from dinoreg.config import ConfigError
from dinoreg.data.crops import CropConfig
from dinoreg.data.masks import MaskConfig, block_counts, block_size
from dinoreg.data.photometric import PhotometricConfig
from dinoreg.data.sources import DataConfig
from dinoreg.models.float8 import MULTIPLE
from dinoreg.models.vit import ModelConfig
from dinoreg.objectives.self_distillation import ObjectiveConfig
from dinoreg.parallel.precision import Precision
from dinoreg.parallel.shard import EfficiencyConfig
from dinoreg.parallel.watch import WatchConfig
from dinoreg.train.checkpoint import CheckpointConfig
from dinoreg.train.monitors import MonitorConfig
from dinoreg.train.optimizer import OptimConfig
from dinoreg.train.schedules import Schedules, parse_duration
from dinoreg.train.stopping import parse_time
from dinoreg.train.tracking import TrackingConfig


@dataclass
class LoopConfig:
    """Length and pace. Give exactly one of steps, epochs, images."""

    batch_size: int = 64  # source images a step, over all GPUs and all accumulated parts
    accumulate: int = 1  # parts in which each rank runs its share of the batch; losses still see the whole batch
    steps: int | None = None
    epochs: float | None = None  # true passes over the data
    images: float | None = None
    precision: Precision = "auto"  # of the arithmetic; weights are kept in fp32. auto: bf16 where the device has it
    log_every: int = 10  # steps; the device is only waited for at these
    time_limit: str | None = None  # such as 3h50m: then the run saves and stops, to be started again
    go_on_from: str | None = None  # another run, or one of its checkpoints, to go on from under these options
    max_skipped: int = 10  # steps in a row without a finite loss or gradient, after which the run gives up

    def check(self) -> None:
        given = [key for key in ("steps", "epochs", "images") if getattr(self, key) is not None]
        if not given:
            raise ConfigError("give the length of the run: steps, epochs or images", key="steps")
        if len(given) > 1:
            raise ConfigError(f"give one of {' and '.join(given)}, and set the other to null", key=given[0])
        for key in ("batch_size", "accumulate", "log_every", "max_skipped"):
            if getattr(self, key) < 1:
                raise ConfigError(f"must be at least 1, not {getattr(self, key)}", key=key)
        if getattr(self, given[0]) <= 0:
            raise ConfigError(f"must be more than 0, not {getattr(self, given[0])}", key=given[0])
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"{self.accumulate} parts do not divide train.batch_size {self.batch_size}", key="accumulate"
            )
        if self.time_limit is not None:
            try:
                parse_time(self.time_limit)
            except ConfigError as error:
                raise ConfigError(error.message, key="time_limit") from None


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
    watch: WatchConfig = field(default_factory=WatchConfig)

    def check(self) -> None:
        """What must hold between parts; each part has checked itself."""
        _check_bounds(self)
        _check_images(self)
        _check_objective(self)
        _check_efficiency(self)
        _check_lengths(self)


# What a run may be continued with in another way, because no image and no weight depends on it (beyond rounding).
FREE = (
    *("run_dir", "efficiency.", "checkpoint.", "monitor.", "tracking.", "watch."),
    *("train.accumulate", "train.log_every", "train.time_limit", "train.max_skipped", "train.go_on_from"),
    *("data.workers", "data.prefetch", "data.timeout", "data.max_bad_share", "data.stream_buffer", "data.sources"),
)


def is_free(key: str) -> bool:
    """Whether an option may change when a run goes on. Of data.sources the images are compared instead of the paths."""
    return key.startswith(FREE)


def check_world(config: RunConfig, world: int) -> None:
    """What must hold between a configuration and the number of processes. Raises ConfigError."""
    batch, parts = config.train.batch_size, world * config.train.accumulate
    if batch % parts:
        raise ConfigError(
            f"{batch} images are not divided by {world} processes x train.accumulate {config.train.accumulate}; "
            f"the nearest batch is {max(1, round(batch / parts)) * parts}",
            key="train.batch_size",
        )


# Bounds, both ends allowed unless a number is said to be left out.
_SHARES = (
    "objective.targets.center_momentum",
    "objective.teacher.momentum",
    "objective.teacher.momentum_end",
)
_POSITIVE = (
    "objective.targets.temperature",
    "objective.targets.temperature_start",
    "objective.targets.student_temperature",
    "optim.lr",
    "optim.layer_decay",
)
_AT_LEAST = {
    "seed": 0,
    "model.layerscale": 0,
    "objective.dino.weight": 0,
    "objective.ibot.weight": 0,
    "objective.koleo.weight": 0,
    "objective.koleo.group": 0,
    "objective.targets.sinkhorn_iterations": 1,
    "optim.lr_end": 0,
    "optim.lr_reference_batch": 1,
    "optim.weight_decay": 0,
    "optim.weight_decay_end": 0,
    "optim.patch_embed_lr": 0,
}
_DURATIONS = ("optim.warmup", "optim.freeze_last_layer", "objective.targets.temperature_warmup")


def _get(config: RunConfig, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


def _check_bounds(config: RunConfig) -> None:
    for key in _SHARES:
        if not 0 <= _get(config, key) <= 1:
            raise ConfigError(f"must be between 0 and 1, not {_get(config, key)}", key=key)
    for key in _POSITIVE:
        if not _get(config, key) > 0:
            raise ConfigError(f"must be more than 0, not {_get(config, key)}", key=key)
    for key, least in _AT_LEAST.items():
        if _get(config, key) < least:
            raise ConfigError(f"must be at least {least}, not {_get(config, key)}", key=key)
    if config.seed >= 2**63:
        raise ConfigError(f"must be less than 2**63, not {config.seed}", key="seed")
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        raise ConfigError(f"must both be at least 0 and less than 1, not {list(config.optim.betas)}", key="optim.betas")


def _check_images(config: RunConfig) -> None:
    patch = config.model.patch_size
    sizes = {"crops.global_size": config.crops.global_size}
    if config.crops.local_count:
        sizes["crops.local_size"] = config.crops.local_size
    for key, size in sizes.items():
        if size % patch:
            below = size // patch * patch
            raise ConfigError(
                f"{size} pixels are not a multiple of model.patch_size {patch}; "
                f"the nearest are {f'{below} and ' if below else ''}{below + patch}",
                key=key,
            )
    for key in ("mean", "std"):
        values, channels = getattr(config.photometric, key), config.model.in_channels
        if len(values) != channels:
            raise ConfigError(f"has {len(values)} values for model.in_channels {channels}", key=f"photometric.{key}")


def _check_objective(config: RunConfig) -> None:
    objective, batch = config.objective, config.train.batch_size
    if not objective.dino.weight and not objective.ibot.weight:
        raise ConfigError("nothing to learn: objective.ibot.weight is 0 too", key="objective.dino.weight")
    if objective.ibot.weight and not config.masks.probability:
        raise ConfigError("iBOT needs masks; for none set objective.ibot.weight=0", key="masks.probability")
    patches = (config.crops.global_size // config.model.patch_size) ** 2
    if objective.ibot.weight and not block_counts(config.masks, block_size(batch), patches).any():
        raise ConfigError(
            f"never masks a patch, with masks.probability {config.masks.probability}, crops of {patches} patches and "
            f"batches of {batch}; raise one of them, or set objective.ibot.weight=0",
            key="masks.ratio",
        )
    if objective.koleo.weight and objective.koleo.group:
        group = objective.koleo.group
        if group < 2:
            raise ConfigError("1 image has no neighbours; or set objective.koleo.weight=0", key="objective.koleo.group")
        if batch % group:
            raise ConfigError(f"{group} does not divide train.batch_size {batch}", key="objective.koleo.group")


def _check_efficiency(config: RunConfig) -> None:
    dim, hidden = config.model.size.embed_dim, config.model.ffn_hidden
    if config.efficiency.fp8 and (dim % MULTIPLE or hidden % MULTIPLE):
        raise ConfigError(
            f"widths must be multiples of {MULTIPLE}: model.embed_dim is {dim}, model.ffn_width {hidden}",
            key="efficiency.fp8",
        )


def _check_lengths(config: RunConfig) -> None:
    """Lengths that can be compared without knowing how many images there are; the others are when a run starts."""
    units = {"epoch"} if config.train.epochs is not None else set()
    for key in _DURATIONS:
        try:
            units.add(parse_duration(_get(config, key))[1])
        except ConfigError as error:
            raise ConfigError(error.message, key=key) from None
    if "epoch" not in units:
        Schedules(config, num_samples=None)
