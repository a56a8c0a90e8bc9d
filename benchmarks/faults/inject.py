"""Faults inside a process, as KIND:STEPS[:RANK].

    nan:5-7:1        the images of steps 5 to 7 are NaN on rank 1: so is the loss
    inf:5            a gradient of step 5 is infinite
    impatient:1      a server that is silent for a second is asked again, instead of after a minute
    left-out:5       nothing is learnt from step 5, the way a skipped step should leave no trace
    hang:5           step 5 takes for ever, and says so when it begins
    steady:1-99      these steps take PACE longer each, so that something else can happen meanwhile

Steps are counted from the start of the process. The product has no hooks for this: its methods are wrapped here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dinoreg.data.batch import Crops
from dinoreg.data.remote import Patience
from dinoreg.objectives.self_distillation import SelfDistillation
from dinoreg.train.optimizer import Optimizer

FOR_EVER, PACE = 600.0, 0.25  # seconds


@dataclass
class Fault:
    """Which steps of this process are hit, and how. step: the one under way."""

    kind: str
    first: int
    last: int
    step: int = 0

    def hits(self, kind: str) -> bool:
        return self.kind == kind and self.first <= self.step <= self.last


def parse(text: str) -> Fault:
    """KIND:FIRST[-LAST][:RANK]; on other ranks a fault that hits no step."""
    kind, steps, *rank = text.split(":")
    first, _, last = steps.partition("-")
    if rank and rank[0] != os.environ.get("RANK", "0"):
        return Fault(kind, 0, 0)
    return Fault(kind, int(first), int(last or first))


def _local_gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this rank holds of it; perhaps nothing."""
    gradient = torch.empty(0) if parameter.grad is None else parameter.grad
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def install(fault: Fault) -> None:
    """Wrap what a step calls."""
    if fault.kind == "impatient":
        Patience.__init__.__defaults__ = (1.0, 6, 0.05)
    forward_backward, step, update = (
        SelfDistillation.forward_backward, Optimizer.step, SelfDistillation.update_teacher,
    )  # fmt: skip

    def poisoned(self: SelfDistillation, parts: Sequence[Crops], **options: Any) -> Any:
        fault.step += 1
        if fault.hits("hang"):
            print(f"step {fault.step} hangs", flush=True)
            time.sleep(FOR_EVER)
        if fault.hits("steady"):
            time.sleep(PACE)
        if fault.hits("nan"):
            parts[0].global_crops.fill_(torch.nan)
        result = forward_backward(self, parts, **options)
        if fault.hits("inf"):
            gradient = next(grad for grad in map(_local_gradient, self.student.parameters()) if grad.numel())
            gradient.view(-1)[:1] = torch.inf
        return result

    def optimizer_step(self: Optimizer, *args: Any, **options: Any) -> Any:
        if not fault.hits("left-out"):
            return step(self, *args, **options)
        self.adamw.zero_grad(set_to_none=True)
        return None

    def update_teacher(self: SelfDistillation, *args: Any, **options: Any) -> None:
        if not fault.hits("left-out"):
            update(self, *args, **options)

    SelfDistillation.forward_backward = poisoned  # type: ignore[method-assign]
    Optimizer.step = optimizer_step  # type: ignore[method-assign]
    SelfDistillation.update_teacher = update_teacher  # type: ignore[method-assign]
