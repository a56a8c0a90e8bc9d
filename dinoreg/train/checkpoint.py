"""Checkpoints of a run.

    checkpoints/step_00000100/              torch.distributed.checkpoint: all that is needed to go on, at any world size
    teacher/step_00000100.safetensors       the teacher's backbone in one file, which `load_backbone` opens

A checkpoint is written under a name that is never read and renamed when every rank is done, so that what has its final
name is whole.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from dinoreg.config import ConfigError
from dinoreg.data.photometric import PhotometricConfig
from dinoreg.models.vit import ModelConfig
from dinoreg.models.weights import NORMALISATION_KEY, save_backbone
from dinoreg.parallel.mesh import Ranks
from dinoreg.train.optimizer import Optimizer


@dataclass
class CheckpointConfig:
    """When to save, and how many to keep."""

    every: int = 1000  # steps
    keep: int = 3  # resumable checkpoints kept; the teacher files are all kept

    def check(self) -> None:
        for key in ("every", "keep"):
            if getattr(self, key) < 1:
                raise ConfigError(f"must be at least 1, not {getattr(self, key)}", key=key)


class Checkpointer:
    """Saves and restores an objective, its optimizer and the number of steps done."""

    def __init__(self, run_dir: Path, cfg: CheckpointConfig, ranks: Ranks) -> None:
        self.folder, self.teachers = run_dir / "checkpoints", run_dir / "teacher"
        self.cfg, self.ranks = cfg, ranks

    def latest(self) -> Path | None:
        """The newest whole checkpoint. The main process looks: a network file system may show ranks different lists."""
        return self.ranks.broadcast_object(max(self._whole(), default=None) if self.ranks.is_main else None)

    def save(self, step: int, objective: nn.Module, optimizer: Optimizer) -> Path:
        """Write the checkpoint of `step`; on return it has its final name on every rank."""
        final = self.folder / f"step_{step:08d}"
        partial = final.with_name(final.name + ".partial")
        if self.ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.ranks.barrier()
        try:
            dcp.save(_state(objective, optimizer, step), checkpoint_id=partial, no_dist=not dist.is_initialized())
        except CheckpointException as error:  # a BaseException
            raise ValueError(f"cannot write {partial}: {_reason(error)}; earlier checkpoints are whole") from error
        self.ranks.barrier()
        if self.ranks.is_main:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in sorted(self._whole())[: -self.cfg.keep]:
                shutil.rmtree(old, ignore_errors=True)
        self.ranks.barrier()
        return final

    def save_teacher(self, step: int, backbone: nn.Module, config: ModelConfig, images: PhotometricConfig) -> Path:
        """Write the teacher's backbone to one file, whatever it is sharded over."""
        path = self.teachers / f"step_{step:08d}.safetensors"
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = get_model_state_dict(backbone, options=options)
        if self.ranks.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            extra = {"step": str(step), NORMALISATION_KEY: json.dumps([images.mean, images.std])}
            save_backbone(path, state, config, extra)
        self.ranks.barrier()
        return path

    def load(self, checkpoint: Path, objective: nn.Module, optimizer: Optimizer) -> int:
        """Restore in place.

        Returns:
            The number of steps that the checkpoint had done.

        Raises:
            ValueError: the checkpoint is of another architecture.
        """
        state = _state(objective, optimizer, step=0)
        try:
            dcp.load(state, checkpoint_id=checkpoint, no_dist=not dist.is_initialized())
        except (Exception, CheckpointException) as error:
            raise ValueError(
                f"cannot resume from {checkpoint}: {_reason(error)}; "
                "if the architecture was changed, give another run_dir"
            ) from error
        # The model's tensors were filled in place; the optimizer's are handed back by name.
        set_optimizer_state_dict(objective.student, optimizer.adamw, state["optimizer"])  # type: ignore[arg-type]
        return int(state["step"])

    def _whole(self) -> list[Path]:
        return [
            p for p in self.folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", p.name) and (p / ".metadata").exists()
        ]


def _state(objective: nn.Module, optimizer: Optimizer, step: int) -> dict[str, Any]:
    return {
        "objective": objective.state_dict(),
        "optimizer": get_optimizer_state_dict(objective.student, optimizer.adamw),  # type: ignore[arg-type]
        "step": step,
    }


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, on whichever rank it did."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
