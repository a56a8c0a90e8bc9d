"""Training small heads on maps, several at once; goes on after a kill where it last saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from dinoreg.config import ConfigError
from eval.dense.samples import Batch, Source
from eval.results import write_atomically
from eval.suite import Context

LOOK_EVERY = 100  # steps between two looks at whether all is finite: each makes the device wait

Loss = Callable[[nn.Module, Batch, int], Tensor]  # of a head, on a batch, at a step


@dataclass(frozen=True)
class Schedule:
    """AdamW, whose rate rises linearly from `warmup_ratio` of what it would be and falls to 0 along `shape`."""

    steps: int
    rate: float
    weight_decay: float
    warmup: int
    warmup_ratio: float
    shape: Literal["linear", "cosine"]
    clip: float  # the largest norm of a head's gradient; 0 = any
    save_every: int

    def rate_at(self, step: int) -> float:
        """The learning rate."""
        done = step / self.steps
        left = 1 - done if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        rising = 1 - (1 - step / self.warmup) * (1 - self.warmup_ratio) if step < self.warmup else 1.0
        return self.rate * left * rising


class Training:
    """Heads that share batches and nothing else, the same on every rank."""

    def __init__(self, heads: nn.ModuleDict, schedule: Schedule, context: Context, identity: str) -> None:
        self.heads, self.schedule, self.context = heads, schedule, context
        self.optimizer = torch.optim.AdamW(heads.parameters(), lr=schedule.rate, weight_decay=schedule.weight_decay)
        self.file: Path = context.cache / f"dense-{identity}.pt"

    def run(self, source: Source, loss: Loss) -> None:
        """To the end of the schedule. Raises ConfigError where a loss is not finite."""
        schedule, start = self.schedule, self._resume()
        self.heads.train()
        with self.context.progress("training", schedule.steps, start) as advance:
            for step, batch in enumerate(source.batches(start), start):
                self._step(step, [loss(head, batch, step) for head in self.heads.values()])
                if (step + 1) % schedule.save_every == 0 or step + 1 == schedule.steps:
                    self._save(step + 1)
                advance(1)
        self.heads.eval()

    def _step(self, step: int, losses: list[Tensor]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate_at(step)
        self.optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        self._average_gradients()
        for head in self.heads.values():
            norm = nn.utils.clip_grad_norm_(head.parameters(), self.schedule.clip or math.inf)
            look = step % LOOK_EVERY == 0 or step + 1 == self.schedule.steps
            if look and not norm.isfinite():
                raise ConfigError(f"the loss is not finite at step {step}: the features may not be, try precision=fp32")
        self.optimizer.step()

    def _average_gradients(self) -> None:
        ranks = self.context.ranks
        if ranks.world == 1:
            return
        gradients = [parameter.grad for parameter in self.heads.parameters() if parameter.grad is not None]
        flat = ranks.sum_(torch.cat([gradient.flatten() for gradient in gradients])) / ranks.world
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _save(self, step: int) -> None:
        if self.context.ranks.is_main:
            state = {"step": step, "heads": self.heads.state_dict(), "optimizer": self.optimizer.state_dict()}
            write_atomically(self.file, lambda file: torch.save(state, file))

    def _resume(self) -> int:
        """The step to go on at, everything being as it was then."""
        if not self.context.ranks.broadcast_object(self.file.is_file()):
            return 0
        state = torch.load(self.file, map_location=self.context.device, weights_only=True)
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.context.say(f"training: goes on after step {state['step']}")
        return int(state["step"])

    def forget(self) -> None:
        """Once the result is there."""
        self.context.ranks.barrier()
        if self.context.ranks.is_main:
            self.file.unlink(missing_ok=True)
