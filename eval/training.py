"""Training linear classifiers on features, from images or from the disk; goes on after a kill where it last saved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoreg.config import ConfigError
from eval.augment import Augmented, Order, numbers_of
from eval.compute import load
from eval.features import Features
from eval.forward import Forward
from eval.heads import Heads
from eval.images import Part
from eval.results import write_atomically
from eval.suite import Context

LEAST_TRIED = 100  # images before the share of bad ones is judged

Batch = tuple[dict[str, Tensor], Tensor]  # fp32 (B, D) by name, and labels (B,), negative where an image does not count


@dataclass(frozen=True)
class Schedule:
    """How long, and how often a killed training can go on. batch: images of all ranks."""

    steps: int
    batch: int
    seed: int
    save_every: int

    def factor(self, step: int) -> float:
        """What the learning rates are multiplied with: a cosine from 1 to 0."""
        return 0.5 * (1 + math.cos(math.pi * step / self.steps))


class Source(Protocol):
    """Where training batches come from; each rank gets its share."""

    def batches(self, start: int) -> Iterator[Batch]: ...


class FromFeatures:
    """The stored features of some rows."""

    def __init__(
        self, stored: Features, labels: Tensor, rows: NDArray[np.int64], schedule: Schedule, context: Context
    ) -> None:
        rows = rows[stored.good[rows]]
        self._order = Order(len(rows), schedule.seed)
        # In fp16, as they are stored: those of ImageNet then have room on a GPU.
        self._values = {name: torch.from_numpy(each[rows]).to(context.device) for name, each in stored.arrays.items()}
        self._labels = labels[torch.from_numpy(rows)].to(context.device)
        self.schedule, self.ranks = schedule, context.ranks

    def batches(self, start: int) -> Iterator[Batch]:
        """From step `start` on."""
        for numbers in numbers_of(start, self.schedule.steps, self.schedule.batch, self.ranks):
            places = torch.tensor([self._order.place(number) for number in numbers], device=self.ranks.device)
            yield {name: values[places].float() for name, values in self._values.items()}, self._labels[places]


class FromImages:
    """Random crops of images, put through the network. bad: places in the part of those that cannot be read."""

    def __init__(
        self, part: Part, size: int, forward: Forward, schedule: Schedule, context: Context, max_bad_share: float
    ) -> None:
        self.part, self.forward, self.schedule, self.context = part, forward, schedule, context
        self.images = Augmented(part, size, schedule.seed)
        self.max_bad_share = max_bad_share
        self.bad: set[int] = set()
        self._tried = self._failed = 0

    def batches(self, start: int) -> Iterator[Batch]:
        """From step `start` on. Raises ConfigError where too many images cannot be read."""
        numbers = numbers_of(start, self.schedule.steps, self.schedule.batch, self.context.ranks)
        for pixels, labels, places in load(self.images, numbers, self.context, 3 * self.images.size**2):
            self._judge(labels, places)
            yield self.forward(pixels), labels.to(self.context.device)

    def _judge(self, labels: Tensor, places: Tensor) -> None:
        bad = places[labels < 0].tolist()
        self.bad.update(bad)
        self._tried += len(labels)
        self._failed += len(bad)
        if bad and self._tried >= LEAST_TRIED and self._failed > self.max_bad_share * self._tried:
            row = int(self.part.rows[bad[0]])
            raise ConfigError(
                f"{self._failed} of {self._tried} images cannot be read, more than max_bad_share={self.max_bad_share}; "
                f"for example {self.part.images.name(row)} ({self.part.images.trouble(row)})",
                "--data",
            )


def train(heads: Heads, source: Source, schedule: Schedule, context: Context, identity: str) -> None:
    """Trains to the end of the schedule, from where a killed training of the same identity last saved."""
    path = context.cache / f"linear-{identity}.pt"
    start = _resume(heads, path, context)
    with context.progress("training", schedule.steps, start) as advance:
        for step, (features, labels) in enumerate(source.batches(start), start):
            heads.step(features, labels, schedule.factor(step), schedule.batch, context.ranks)
            if (step + 1) % schedule.save_every == 0 and context.ranks.is_main:
                state = {"step": step + 1, "heads": heads.state()}
                write_atomically(path, lambda file: torch.save(state, file))  # noqa: B023 (called at once)
            advance(1)
    context.ranks.barrier()


def _resume(heads: Heads, path: Path, context: Context) -> int:
    """The step to go on at, the classifiers being as they were then."""
    if not context.ranks.broadcast_object(path.is_file()):
        return 0
    try:
        state = torch.load(path, map_location=context.device, weights_only=True)
    except Exception as error:  # torch's reader takes any bytes for instructions, so what fails in it may be anything
        raise ConfigError(f"{path} is damaged: remove it, and the training begins anew", "--cache") from error
    heads.load(state["heads"])
    context.say(f"training: goes on after step {state['step']}")
    return int(state["step"])


def forget(context: Context, identity: str) -> None:
    """Once the result is there."""
    if context.ranks.is_main:
        (context.cache / f"linear-{identity}.pt").unlink(missing_ok=True)
