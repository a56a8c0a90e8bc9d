"""What tests of checkpoints share: a run, comparing states, and a disk that is too small."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_crops, tiny_config, tiny_crops, tiny_objective
from torch import Tensor
from torch.distributed.tensor import DTensor

from dinoreg.models.vit import ModelConfig
from dinoreg.parallel.mesh import Ranks
from dinoreg.parallel.shard import EfficiencyConfig, parallelize
from dinoreg.train.checkpoint import CheckpointConfig, Checkpointer, CheckpointError
from dinoreg.train.optimizer import OptimConfig, Optimizer

MODEL = ModelConfig(embed_dim=32, depth=2, num_heads=2, patch_size=4, image_size=16)


class Run:
    """An objective and its optimizer, in a state that only training leads to."""

    def __init__(self, seed: int, ranks: Ranks | None = None, shard: Any = None, steps: int = 2, **cfg: Any) -> None:
        self.ranks = ranks or Ranks.alone()
        self.objective = tiny_objective(tiny_config(**({"centering": "centering"} | cfg)), self.ranks)
        with torch.no_grad():
            for parameter in self.objective.parameters():
                parameter.add_(seed)
        if shard is not None:
            parallelize(self.objective.student, self.objective.teacher, EfficiencyConfig(shard), "fp32", self.ranks)
        self.objective.to(self.ranks.device)
        self.optimizer = Optimizer(self.objective.student, OptimConfig())
        for step in range(steps):
            self.step(step)

    def step(self, seed: int, before_update: Callable[[], None] = lambda: None) -> None:
        crops = tiny_crops(2, seed=seed * self.ranks.world + self.ranks.rank)
        tensors = (crops.global_crops, crops.local_crops, crops.masks)
        crops = make_crops(*(tensor.to(self.ranks.device) for tensor in tensors))
        self.objective.forward_backward([crops], teacher_temperature=0.05, seed=seed)
        for group in self.optimizer.adamw.param_groups:
            group["lr"] = 1e-3
        before_update()
        self.optimizer.step()
        self.objective.update_teacher(0.9)

    def state(self) -> dict[str, Tensor]:
        """Copies of all that must come back, whole on every rank."""
        state = dict(self.objective.state_dict())
        for name, parameter in self.optimizer.student.named_parameters():
            for key, value in self.optimizer.adamw.state.get(parameter, {}).items():
                state[f"{name}.{key}"] = value
        return {name: whole(tensor) for name, tensor in state.items()}

    def save(self, checkpointer: Checkpointer, step: int, **about: Any) -> None:
        checkpointer.save(step, self.objective, self.optimizer, about)

    def resume(self, run_dir: Path) -> dict[str, Any]:
        with closing(Checkpointer(run_dir, CheckpointConfig(), self.ranks)) as checkpointer:
            checkpoint = checkpointer.latest()
            assert checkpoint is not None
            return checkpointer.load(checkpoint, self.objective, self.optimizer)


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different, f"{len(different)} of {len(expected)} differ, {different[:3]}"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path | None]:
    """None where we may not mount one."""
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True).returncode:
        yield None
        return
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


NO_DISK = "mounting a small disk needs root"


def save_and_fill_up(disk: Path, leave: int) -> Path:
    """Step 1 is saved, then a file takes all room but this."""
    with closing(Checkpointer(disk / "run", CheckpointConfig(), Ranks.alone())) as checkpointer:
        Run(0).save(checkpointer, 1)
        checkpointer.wait()
    filler = disk / "filler"
    room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    filler.write_bytes(bytes(room - leave))
    return filler


def on_a_full_disk(ranks: Ranks, disk: Path, filler: Path) -> list[str]:
    """Save 2 fails in the middle, save 3 tells of it and fails too, save 4 has room again."""
    run, told = Run(0, ranks, "full" if ranks.world > 1 else None), []
    listener = logging.Handler()
    listener.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dinoreg").addHandler(listener)
    with closing(Checkpointer(disk / "run", CheckpointConfig(), ranks)) as checkpointer:
        for step in (2, 3):
            run.save(checkpointer, step)
        with pytest.raises(CheckpointError) as caught:
            checkpointer.wait()
        told.append(str(caught.value))
        checkpointer.wait()  # said once
        ranks.barrier()
        if ranks.is_main:
            assert names(disk / "run" / "checkpoints") == ["step_00000001"]
            filler.unlink()
        ranks.barrier()
        run.save(checkpointer, 4)
        expected = run.state()
        checkpointer.wait()
    again = Run(1, ranks, "full" if ranks.world > 1 else None)
    assert again.resume(disk / "run")["step"] == 4
    assert_same(again.state(), expected)
    return told


def assert_told(told: list[str]) -> None:
    warning, error = told
    assert "step_00000002" in warning and "step_00000003" in error
    for words in told:
        assert "No space left on device" in words and "earlier checkpoints are whole" in words and "\n" not in words
