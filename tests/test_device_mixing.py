"""A training step on a device that is not there: it never mixes the host's tensors with the device's, nor waits.

torch lets Python make a device of its own. Tensors that are said to be there are fake ones, which know shapes and where
they are; those of the host stay real. This changes torch for good, so that each case has a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.fake import load_recipe
from benchmarks.step import synthetic_batch, values_of
from dinoreg.objectives.self_distillation import SelfDistillation
from dinoreg.parallel.mesh import Ranks
from dinoreg.parallel.shard import parallelize
from dinoreg.train.guard import Guard
from dinoreg.train.monitors import measure
from dinoreg.train.optimizer import Optimizer
from dinoreg.train.trainer import train_step

REPOSITORY = Path(__file__).resolve().parent.parent
DEVICE = "pretended"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real device says the same")
FAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "": nullcontext,
    "masks stay on the host": lambda: patch("dinoreg.data.photometric._send", lambda tensor, _: tensor),
    "the guard looks": lambda: patch.object(Guard, "__call__", lambda _, metrics: float(metrics["loss/total"])),
    "a norm comes back": lambda: patch.object(Guard, "__call__", lambda _, metrics: metrics["loss/total"].cpu()),
}


class There(TorchDispatchMode):
    """Operations that have to do with the device run on fake tensors, all others really."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = tree_leaves((args, kwargs))
        read = any(isinstance(value, FakeTensor) for value in values)
        named = any(isinstance(value, torch.device) and value.type == DEVICE for value in values)
        with self.fake if read or named else nullcontext():
            out = func(*args, **(kwargs or {}))
        back = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor) and each.device.type != DEVICE]
        assert not (read and back), f"{func} waits for the device"
        return out


def pretend() -> Ranks:
    """A device with streams that do nothing, and a process group of one."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    torch.utils.backend_registration._setup_privateuseone_for_python_backend(DEVICE)
    module = getattr(torch, DEVICE)
    module.Stream = module.Event = module.current_stream = MagicMock()
    module.stream, module.set_device, module.device_count = lambda _: nullcontext(), lambda _: None, lambda: 1
    # torch.tensor(..., device=...) is then made on the host and sent, which the mode sees.
    torch._C._set_only_lift_cpu_tensors(True)
    FakeTensorMode.avoid_device_init = True  # type: ignore[assignment, method-assign]
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    return Ranks.alone(torch.device(DEVICE, 0))


def rehearse(fault: str, recipe: str, *words: str) -> None:
    """Two steps, photometrics and the monitors' look included."""
    ranks, cfg = pretend(), load_recipe(recipe, ["train.batch_size=4", "model.depth=2", *words])
    # A device in Python has no generators: rows of drop path are drawn by the host's, which the code allows.
    generator = torch.Generator
    with There(), patch.object(torch, "Generator", lambda _=None: generator()), FAULTS[fault]():
        objective = SelfDistillation(cfg.objective, cfg.model, ranks, attention="sdpa").to_empty(device=ranks.device)
        parallelize(objective.student, objective.teacher, cfg.efficiency, "bf16", ranks)
        guard, optimizer = Guard(ranks), Optimizer(objective.student, cfg.optim)
        batch, values = synthetic_batch(cfg, ranks, 0), values_of(cfg)
        for seed in range(2):
            metrics, seen = train_step(objective, optimizer, guard, batch, values, cfg, seed, observe=True)
            assert seen is not None
            metrics |= measure(seen, cfg.monitor, ranks)
    assert {value.device.type for value in metrics.values()} == {DEVICE}


@pytest.mark.parametrize(
    ("fault", "words", "said"),
    [
        ("", ["vits14_in1k"], ""),
        ("", ["vitl14_in22k", "model.rope_base=100"], ""),
        ("", ["vitl16_short_in1k", "train.accumulate=2"], ""),
        ("masks stay on the host", ["vits14_in1k"], "found at least two devices"),
        ("the guard looks", ["vits14_in1k"], "DataDependentOutputException"),
        ("a norm comes back", ["vits14_in1k"], "waits for the device"),
    ],
)
def test_a_step(fault: str, words: list[str], said: str) -> None:
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, __file__, fault, *words], env=env, capture_output=True, text=True)
    assert (done.returncode != 0) == bool(fault), done.stderr
    assert said in done.stderr


if __name__ == "__main__":
    rehearse(*sys.argv[1:])
