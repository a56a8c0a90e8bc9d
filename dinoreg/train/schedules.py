"""What changes during a run, as functions of the step alone.

Lengths are written in steps, images, true epochs or fractions of the run, and become steps here, once. Batch sizes
are global, so the number of GPUs appears in no formula: it cannot change what a run sees.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dinoreg.config import ConfigError

if TYPE_CHECKING:
    from dinoreg.train.optimizer import OptimConfig
    from dinoreg.train.recipe import LoopConfig, RunConfig

_WRITTEN = re.compile(r"\s*(\S+?)\s*(step|image|epoch)s?\s*")


@dataclass(frozen=True)
class StepValues:
    """Everything scheduled, at one step."""

    lr: float
    weight_decay: float
    last_layer_lr: float
    teacher_momentum: float
    teacher_temperature: float


@dataclass(frozen=True)
class Ramp:
    """`start` to `peak` in a line over `warmup` steps, then half a cosine to `end` at step `total`.

    The line reaches the peak at step warmup - 1, and the cosine begins there again, as in DINO's and DINOv2's
    schedules; a warm-up of a single step stays at `start`.
    """

    start: float
    peak: float
    end: float
    warmup: int
    total: int

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.start + (self.peak - self.start) * step / max(self.warmup - 1, 1)
        if step >= self.total:
            return self.end
        progress = (step - self.warmup) / (self.total - self.warmup)
        return self.end + 0.5 * (self.peak - self.end) * (1 + math.cos(math.pi * progress))


def parse_duration(duration: int | float | str) -> tuple[float, str]:
    """(amount, unit), unit one of step, image, epoch, run: '10 epochs' is (10, 'epoch') and 0.1 is (0.1, 'run')."""
    if not isinstance(duration, str):
        if not 0 <= duration <= 1:
            raise ConfigError(f"{duration} alone is a fraction of the run, 0 to 1; or give a unit: '{duration} steps'")
        return float(duration), "run"
    match = _WRITTEN.fullmatch(duration)
    try:
        amount, unit = (float(match[1]), match[2]) if match else (math.nan, "")
    except ValueError:
        amount = math.nan
    if not 0 <= amount < math.inf:
        raise ConfigError(f"'{duration}' is not '10 epochs', '5000 steps', '1e6 images' or a fraction of the run")
    return amount, unit


def to_steps(duration: int | float | str, *, total: int, batch_size: int, num_samples: int | None) -> int:
    """Steps that cover `duration`, rounded up. Raises ConfigError for epochs of a source of unknown length."""
    amount, unit = parse_duration(duration)
    if unit == "epoch":
        if num_samples is None:
            raise ConfigError("epochs need sources of known length, and a stream has none; give steps or images")
        amount *= num_samples / batch_size
    elif unit == "image":
        amount /= batch_size
    elif unit == "run":
        amount *= total
    return _round_up(amount)


def _round_up(amount: float) -> int:
    return math.ceil(amount - 1e-6)  # 0.1 * 30 is a little more than 3


def total_steps(train: LoopConfig, num_samples: int | None) -> int:
    """Steps of the whole run; exactly one of train.steps, train.epochs and train.images is set."""
    for key, value in (("steps", train.steps), ("epochs", train.epochs), ("images", train.images)):
        if value is not None:
            return max(1, _steps_of(f"{value} {key}", f"train.{key}", 0, train.batch_size, num_samples))
    raise ConfigError("give the length of the run: train.steps, train.epochs or train.images", key="train.steps")


def _steps_of(duration: int | float | str, key: str, total: int, batch_size: int, num_samples: int | None) -> int:
    try:
        return to_steps(duration, total=total, batch_size=batch_size, num_samples=num_samples)
    except ConfigError as error:
        raise ConfigError(error.message, key=key) from None


def peak_lr(optim: OptimConfig, batch_size: int) -> float:
    """The learning rate after scaling with the batch; `lr_end` is not scaled, as in DINO and DINOv2."""
    ratio = batch_size / optim.lr_reference_batch
    return optim.lr * {"sqrt": math.sqrt(ratio), "linear": ratio, "none": 1.0}[optim.lr_scaling]


class Schedules:
    """All schedules of a run. Raises ConfigError where a part is longer than the run."""

    def __init__(self, config: RunConfig, num_samples: int | None) -> None:
        self.config = config
        self.num_samples = num_samples
        self.total_steps = total = total_steps(config.train, num_samples)
        optim, targets, teacher = config.optim, config.objective.targets, config.objective.teacher
        self.lr_warmup = self._part(optim.warmup, "optim.warmup")
        self.frozen = self._part(optim.freeze_last_layer, "optim.freeze_last_layer")
        self.temperature_warmup = self._part(targets.temperature_warmup, "objective.targets.temperature_warmup")
        self.lr = Ramp(0.0, peak_lr(optim, config.train.batch_size), optim.lr_end, self.lr_warmup, total)
        self.weight_decay = Ramp(0.0, optim.weight_decay, optim.weight_decay_end, 0, total)
        self.momentum = Ramp(0.0, teacher.momentum, teacher.momentum_end, 0, total)
        self.temperature = Ramp(
            targets.temperature_start, targets.temperature, targets.temperature, self.temperature_warmup, total
        )

    def _part(self, duration: int | float | str, key: str) -> int:
        steps = _steps_of(duration, key, self.total_steps, self.config.train.batch_size, self.num_samples)
        if steps > self.total_steps:
            raise ConfigError(f"'{duration}' is {steps} steps, longer than the run's {self.total_steps}", key=key)
        return steps

    def at(self, step: int) -> StepValues:
        """Values for the step numbered from 0; after the last step they stay at their ends."""
        lr = self.lr(step)
        return StepValues(
            lr=lr,
            weight_decay=self.weight_decay(step),
            last_layer_lr=0.0 if step < self.frozen else lr,
            teacher_momentum=self.momentum(step),
            teacher_temperature=self.temperature(step),
        )

    def describe(self) -> str:
        """Every length as written and in steps: printed once, when a run starts."""
        return "\n".join(f"{name:<12} {text}" for name, text in self.lines())

    def lines(self) -> list[tuple[str, str]]:
        """(what, how much) pairs of the description."""
        optim, targets = self.config.optim, self.config.objective.targets
        batch = self.config.train.batch_size
        images = self.total_steps * batch
        passes = f" = {images / self.num_samples:.4g} epochs of {self.num_samples:,}" if self.num_samples else ""
        scaled = "" if self.lr.peak == optim.lr else f" ({optim.lr:g} at batch {optim.lr_reference_batch})"
        warming = _said(self.lr_warmup, optim.warmup)
        heating = _said(self.temperature_warmup, targets.temperature_warmup)
        return [
            ("length", f"{self.total_steps:,} steps x {batch:,} images = {images:,} images{passes}"),
            ("lr", f"0 to {self.lr.peak:.4g}{scaled} in {warming}, then cosine to {optim.lr_end:g}"),
            ("weight decay", _cosine(self.weight_decay)),
            ("momentum", f"{_cosine(self.momentum)} (of the teacher)"),
            ("temperature", f"{targets.temperature_start:g} to {targets.temperature:g} in {heating} (of the teacher)"),
            ("prototypes", f"still for {_said(self.frozen, optim.freeze_last_layer)}"),
        ]


def _said(steps: int, duration: int | float | str) -> str:
    as_written = duration if isinstance(duration, str) else f"{duration:.3g} of the run"
    return f"{steps:,} steps" if as_written == f"{steps} steps" else f"{steps:,} steps ({as_written})"


def _cosine(ramp: Ramp) -> str:
    return f"{ramp.peak:g}" if ramp.peak == ramp.end else f"{ramp.peak:g} to {ramp.end:g}, cosine"
