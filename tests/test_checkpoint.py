"""Checkpoints: what comes back, on any number of ranks, after a crash, a full disk, a flipped bit or a bad pickle."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed import run_ranks
from safetensors.torch import load_file
from tiny import make_crops, tiny_config, tiny_crops, tiny_objective
from torch import Tensor
from torch.distributed.tensor import DTensor

from dinoreg.config import ConfigError
from dinoreg.data.photometric import PhotometricConfig
from dinoreg.models.vit import ModelConfig
from dinoreg.parallel.mesh import Ranks
from dinoreg.parallel.shard import EfficiencyConfig, parallelize
from dinoreg.train.checkpoint import CheckpointConfig, Checkpointer, CheckpointError
from dinoreg.train.checkpoint_files import MANIFEST, METADATA, RUN, SafeReader, TensorsOnly, read_metadata
from dinoreg.train.optimizer import OptimConfig, Optimizer

MODEL = ModelConfig(embed_dim=32, depth=2, num_heads=2, patch_size=4, image_size=16)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


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
        return {name: _whole(tensor) for name, tensor in state.items()}

    def save(self, checkpointer: Checkpointer, step: int, **about: Any) -> None:
        checkpointer.save(step, self.objective, self.optimizer, about)

    def resume(self, run_dir: Path) -> dict[str, Any]:
        with closing(Checkpointer(run_dir, CheckpointConfig(), self.ranks)) as checkpointer:
            checkpoint = checkpointer.latest()
            assert checkpoint is not None
            return checkpointer.load(checkpoint, self.objective, self.optimizer)


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different, f"{len(different)} of {len(expected)} differ, {different[:3]}"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def checkpointer(tmp_path: Path) -> Iterator[Checkpointer]:
    with closing(Checkpointer(tmp_path, CheckpointConfig(), Ranks.alone())) as checkpointer:
        yield checkpointer


@contextmanager
def held_back(checkpointer: Checkpointer) -> Iterator[None]:
    """The thread has something else to do first, as on a slow disk."""
    gate = threading.Event()
    checkpointer.thread.submit(gate.wait)
    try:
        yield
    finally:
        gate.set()


# ---- what comes back


def test_all_comes_back_bit_for_bit_and_training_goes_on_alike(checkpointer: Checkpointer, tmp_path: Path) -> None:
    run, other = Run(0), Run(1)
    run.save(checkpointer, 2, images=16, wandb="abc")
    random, expected = torch.rand(3), run.state()
    checkpointer.wait()
    torch.manual_seed(99)
    assert other.resume(tmp_path) == {"step": 2, "images": 16, "wandb": "abc"}
    assert_same(other.state(), expected)
    assert {"student.backbone.cls_token", "targets.dino_center", "backbone.norm.weight.exp_avg_sq"} <= expected.keys()
    assert expected["backbone.norm.weight.step"] == 2
    assert torch.equal(torch.rand(3), random)
    for continued in (run, other):
        continued.step(7)
    assert_same(other.state(), run.state())


def test_what_is_told_about_the_run_can_be_read(checkpointer: Checkpointer, tmp_path: Path) -> None:
    Run(0, steps=0).save(checkpointer, 5, wandb="abc", position={"step": 5})
    checkpointer.wait()
    text = (tmp_path / "checkpoints" / "step_00000005" / RUN).read_text()
    assert json.loads(text) == {"step": 5, "wandb": "abc", "position": {"step": 5}} and len(text.splitlines()) > 4


def test_before_the_first_step_there_is_no_state_of_the_optimizer(checkpointer: Checkpointer, tmp_path: Path) -> None:
    run, other = Run(0, steps=0), Run(1)
    run.save(checkpointer, 0)
    checkpointer.wait()
    other.resume(tmp_path)
    assert_same(other.state(), run.state())


def test_a_parameter_without_gradients_needs_no_moments(checkpointer: Checkpointer, tmp_path: Path) -> None:
    run, other = Run(0, ibot=0.0), Run(1, ibot=0.0)
    for each in (run, other):
        del each.optimizer.adamw.state[each.objective.student["backbone"].get_parameter("mask_token")]
    run.save(checkpointer, 2)
    checkpointer.wait()
    other.resume(tmp_path)
    assert_same(other.state(), run.state())


def _reshard(ranks: Ranks, folder: Path) -> dict[str, Tensor]:
    """hybrid -> full -> none, two nodes of two. What each saved is compared here, the last is returned."""
    ranks, before = replace(ranks, local_world=2), None
    for number, shard in enumerate(("hybrid", "full", "none")):
        run = Run(number, ranks, shard, steps=2 if before is None else 1)
        if before is not None:
            run.resume(folder / str(number - 1))
            assert_same(run.state(), before)
        run.step(10 + number)
        before = run.state()
        with closing(Checkpointer(folder / str(number), CheckpointConfig(), ranks)) as checkpointer:
            run.save(checkpointer, number)
            checkpointer.wait()
        _assert_nothing_twice(folder / str(number))
    return before or {}


def _assert_nothing_twice(run_dir: Path) -> None:
    """Replicas share the work of writing."""
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    metadata = read_metadata(checkpoint)
    places = [(place.relative_path, place.offset) for place in metadata.storage_data.values()]
    assert len(places) == len(set(places)) and {name for name, _ in places} == {f"__{r}_0.distcp" for r in range(4)}
    sizes = [(checkpoint / f"__{rank}_0.distcp").stat().st_size for rank in range(4)]
    assert max(sizes) < 2 * min(sizes)


def test_sharded_in_any_way_over_four_processes_and_back_to_one(tmp_path: Path) -> None:
    (saved, *_) = run_ranks(_reshard, 4, tmp_path)
    run = Run(9)
    run.resume(tmp_path / "2")
    assert_same(run.state(), saved)


def _one_to_two(ranks: Ranks, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], bool, str]:
    run = Run(3, ranks, "full")
    generator = torch.get_rng_state()
    run.resume(folder / "one")
    found, kept = run.state(), torch.equal(torch.get_rng_state(), generator)
    run.step(20)
    with closing(Checkpointer(folder / "two", CheckpointConfig(), ranks)) as checkpointer:
        checkpointer.latest()
        torch.manual_seed(50 + ranks.rank)
        run.save(checkpointer, 3)
        drawn, expected = torch.rand(3), run.state()
        checkpointer.wait()
        words = _failure_of_one(run, checkpointer)
    again, checkpoints = Run(4, ranks, "full"), folder / "two" / "checkpoints"
    if ranks.is_main:  # of its three files the second rank checks the second, which alone is damaged
        shutil.copytree(checkpoints / "step_00000003", checkpoints / "step_00000009")
        _flip(checkpoints / "step_00000009" / "__0_0.distcp")
    ranks.barrier()
    again.resume(folder / "two")
    assert torch.equal(torch.rand(3), drawn)
    assert_same(again.state(), expected)
    return found, expected, kept, words


def _failure_of_one(run: Run, checkpointer: Checkpointer) -> str:
    """What all hear when one rank cannot copy its state: on the second one these have no data."""
    device = "meta" if run.ranks.rank == 1 else "cpu"
    for name in ("dino_center", "ibot_center"):  # one of them is for the second rank to write
        run.objective.targets.register_buffer(name, torch.zeros(64, device=device))
    run.save(checkpointer, 4)
    with pytest.raises(CheckpointError) as caught:
        checkpointer.wait()
    return str(caught.value)


@dataclass
class Pair:
    """What two processes did, each with what it returned; and with what they were given."""

    folder: Path
    given: dict[str, Tensor]
    exchanged: list[tuple[dict[str, Tensor], dict[str, Tensor], bool, str]]
    told_of_full_disk: list[list[str]] | None  # None: there was no small disk


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Starting processes is slow: these do the work of several tests."""
    folder, run = tmp_path_factory.mktemp("pair"), Run(0)
    torch.manual_seed(77)
    with closing(Checkpointer(folder / "one", CheckpointConfig(), Ranks.alone())) as checkpointer:
        run.save(checkpointer, 2)
        checkpointer.wait()
    with small_disk(folder / "disk", "8m") as disk:
        filler = _save_and_fill_up(disk, 300_000) if disk else None
        done = run_ranks(_do_both, 2, folder, disk, filler)
    told = [told for _, told in done] if disk else None
    return Pair(folder, run.state(), [exchanged for exchanged, _ in done], told)


def _do_both(ranks: Ranks, folder: Path, disk: Path | None, filler: Path | None) -> tuple[Any, list[str]]:
    return _one_to_two(ranks, folder), _on_a_full_disk(ranks, disk, filler) if disk and filler else []


def test_one_process_and_two_exchange_checkpoints_and_failures(pair: Pair) -> None:
    (found, saved, kept, words), (found_too, _, kept_too, words_too) = pair.exchanged
    run, tmp_path = Run(9), pair.folder
    assert_same(found, pair.given)
    assert_same(found_too, pair.given)
    assert not kept and kept_too  # the second rank's generator is not in the checkpoint
    run.resume(tmp_path / "two")
    assert_same(run.state(), saved)
    assert words == words_too
    assert "step_00000004" in words and "meta" in words and "rank 1" in words and "earlier" in words, words
    assert names(tmp_path / "two" / "checkpoints") == ["step_00000003", "step_00000009.damaged"]


def test_another_architecture_is_refused_whichever_has_more(checkpointer: Checkpointer, tmp_path: Path) -> None:
    small, large = Run(0, ibot=0.0), Run(0)
    for step, saved, other in ((1, small, large), (2, large, small)):
        saved.save(checkpointer, step)
        checkpointer.wait()
        with pytest.raises(CheckpointError, match=r"cannot resume from .*ibot_.*give another run_dir"):
            other.resume(tmp_path)


# ---- beside the training


def test_training_goes_on_while_it_is_written(checkpointer: Checkpointer, tmp_path: Path) -> None:
    """A copy, never a view (pytorch #144657), of parameters, moments, centers and the teacher's file."""
    run, other = Run(0), Run(1)
    expected = run.state()
    with held_back(checkpointer):
        run.save(checkpointer, 2)
        path = checkpointer.save_teacher(2, run.objective.teacher["backbone"], MODEL, PhotometricConfig())
        checkpointer.staged()
        run.step(5)
        assert not path.exists() and checkpointer.jobs and not checkpointer.jobs[0].done()
        changed = run.state()
        moved = [name for name in expected if not torch.equal(changed[name], expected[name])]
        assert len(moved) > 0.9 * len(expected) and "targets.dino_center" in moved
    checkpointer.wait()
    other.resume(tmp_path)
    assert_same(other.state(), expected)
    teacher = {f"teacher.backbone.{name}": tensor for name, tensor in load_file(path).items()}
    assert_same(teacher, {name: tensor for name, tensor in expected.items() if name in teacher})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_copy_that_is_late_is_waited_for(tmp_path: Path) -> None:
    """Forward and backward go on beside it, the update comes after it, and centers were copied before them."""
    ranks = Ranks.alone("cuda")
    run, other = Run(0, ranks), Run(1, ranks)
    with closing(Checkpointer(tmp_path, CheckpointConfig(), ranks)) as checkpointer:
        run.save(checkpointer, 1)  # gets the memory, for which the device may be waited for
        checkpointer.wait()
        expected = run.state()
        with torch.cuda.stream(checkpointer.staging.stream):
            torch.cuda._sleep(1_000_000_000)  # clock cycles
        run.save(checkpointer, 2)
        assert not checkpointer.staging.done.query()  # nobody waited for it
        path = checkpointer.save_teacher(2, run.objective.teacher["backbone"], MODEL, PhotometricConfig())
        drawn = torch.rand(3, device="cuda")
        run.step(5, checkpointer.staged)
        checkpointer.wait()
        assert all(memory.is_pinned() for memory in checkpointer.staging.memory.values())
    other.resume(tmp_path)
    assert torch.equal(torch.rand(3, device="cuda"), drawn)
    assert_same(other.state(), expected)
    teacher = {f"teacher.backbone.{name}": tensor.cuda() for name, tensor in load_file(path).items()}
    assert_same(teacher, {name: tensor for name, tensor in expected.items() if name in teacher})


def test_the_memory_of_a_copy_is_used_again_when_it_is_written(checkpointer: Checkpointer, tmp_path: Path) -> None:
    run, other = Run(0), Run(1)
    run.save(checkpointer, 2)
    places = {name: memory.data_ptr() for name, memory in checkpointer.staging.memory.items()}
    run.step(5)
    run.save(checkpointer, 3)  # waits for the first
    assert (tmp_path / "checkpoints" / "step_00000002").exists()
    assert places == {name: memory.data_ptr() for name, memory in checkpointer.staging.memory.items()}
    for step, backbone in enumerate((run, other)):
        checkpointer.save_teacher(step, backbone.objective.teacher["backbone"], MODEL, PhotometricConfig())
    checkpointer.wait()
    for step, backbone in enumerate((run, other)):
        expected = {name: _whole(t) for name, t in backbone.objective.teacher["backbone"].state_dict().items()}
        assert_same(load_file(tmp_path / "teacher" / f"step_{step:08d}.safetensors"), expected)


def test_in_the_foreground_it_is_there_on_return(tmp_path: Path) -> None:
    with closing(Checkpointer(tmp_path, CheckpointConfig(background=False), Ranks.alone())) as checkpointer:
        Run(0).save(checkpointer, 2)
        assert names(tmp_path / "checkpoints") == ["step_00000002"]


def test_a_step_that_is_there_is_not_written_again(checkpointer: Checkpointer, tmp_path: Path) -> None:
    run = Run(0)
    run.save(checkpointer, 2)
    checkpointer.wait()
    written = (tmp_path / "checkpoints" / "step_00000002").stat().st_ino
    run.save(checkpointer, 2)
    checkpointer.wait()
    run.resume(tmp_path)
    assert (tmp_path / "checkpoints" / "step_00000002").stat().st_ino == written


def test_the_newest_are_kept_and_some_for_ever(tmp_path: Path) -> None:
    cfg, run = CheckpointConfig(every=10, keep=2, keep_every=30), Run(0, steps=0)
    with closing(Checkpointer(tmp_path, cfg, Ranks.alone())) as checkpointer:
        for step in (10, 20, 30, 40, 50, 60, 70, 75):
            run.save(checkpointer, step)
        checkpointer.wait()
    assert names(tmp_path / "checkpoints") == [f"step_{step:08d}" for step in (30, 60, 70, 75)]


@pytest.mark.parametrize("wrong", [{"every": 0}, {"keep": 0}, {"keep_every": -1}, {"keep_every": 1500}])
def test_what_cannot_be_kept_is_told(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError) as caught:
        CheckpointConfig(**wrong).check()
    assert caught.value.key == next(iter(wrong))


# ---- crashes


def _save_for_ever(run_dir: Path) -> None:
    torch.set_num_threads(1)
    run = Run(0, steps=1)
    run.objective.register_buffer("ballast", torch.arange(8e6))
    checkpointer = Checkpointer(run_dir, CheckpointConfig(keep=1), Ranks.alone())
    checkpointer.latest()
    for step in range(1, 1000):
        run.save(checkpointer, step)
        checkpointer.save_teacher(step, run.objective.teacher["backbone"], MODEL, PhotometricConfig())


def _file(name: str, least: int = 0) -> Callable[[Path], bool]:
    """A moment of a save: the file is there, with so many bytes."""

    def come(partial: Path) -> bool:
        path = partial / name
        return path.exists() and path.stat().st_size >= least

    return come


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "data": _file("__0_0.distcp"),
    "half of the data": _file("__0_0.distcp", 16_000_000),
    "metadata": _file(METADATA),
    "manifest": _file(MANIFEST),
    "name": lambda partial: partial.with_suffix("").exists(),
}


def test_killed_at_any_moment_the_last_good_one_is_there(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dinoreg.train.checkpoint", "dinoreg.objectives.self_distillation"])
    for number, (moment, come) in enumerate(MOMENTS.items()):
        run_dir = tmp_path / str(number)
        process = context.Process(target=_save_for_ever, args=(run_dir,))
        process.start()
        before = _wait_for_second(run_dir, come, process)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        run = Run(1, steps=1)
        run.objective.register_buffer("ballast", torch.zeros(8_000_000))
        step = run.resume(run_dir)["step"]
        assert before <= step <= before + 2, moment
        assert torch.equal(run.objective.get_buffer("ballast"), torch.arange(8e6)), moment
        assert_same(
            {name: _whole(t) for name, t in run.objective.student.state_dict().items()},
            {name: _whole(t) for name, t in Run(0, steps=1).objective.student.state_dict().items()},
        )
        left = names(run_dir / "checkpoints") + [path.name for path in (run_dir / "teacher").glob(".*")]
        assert left == [f"step_{step:08d}"] or moment == "name", left  # cleared when the next run starts
        shutil.rmtree(run_dir)


def _wait_for_second(run_dir: Path, come: Callable[[Path], bool], process: Any) -> int:
    """Until a save after the first has come so far; the newest that was whole just before."""
    folder = run_dir / "checkpoints"
    limit = time.monotonic() + 120
    while time.monotonic() < limit and process.is_alive():
        whole = [int(path.name[5:]) for path in folder.glob("step_????????")]
        if whole and come(folder / f"step_{max(whole) + 1:08d}.partial"):
            return max(whole)
    raise AssertionError("nothing was saved")


# ---- damage


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Steps 1 and 2, and the state of step 1."""
    run_dir, run = tmp_path_factory.mktemp("two"), Run(0)
    with closing(Checkpointer(run_dir, CheckpointConfig(), Ranks.alone())) as checkpointer:
        state = run.state()
        run.save(checkpointer, 1)
        run.step(9)
        run.save(checkpointer, 2)
        checkpointer.wait()
    return run_dir, state


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing data": ("__0_0.distcp", Path.unlink, "cannot be read: No such file"),
    "short data": ("__0_0.distcp", _cut, "bytes instead of"),
    "flipped bit of data": ("__0_0.distcp", _flip, "its checksum differs"),
    "flipped bit of metadata": (METADATA, _flip, ".metadata"),
    "no metadata": (METADATA, Path.unlink, "cannot be read: No such file"),
    "empty metadata": (METADATA, lambda path: path.write_bytes(b""), "cannot be read"),
    "other words": (RUN, lambda path: path.write_text("{}"), "bytes instead of"),
    "no manifest": (MANIFEST, Path.unlink, "cannot be read: No such file"),
    "torn manifest": (MANIFEST, _cut, "is not a manifest"),
    "strange manifest": (MANIFEST, lambda path: path.write_text('{"files": [1]}'), "is not a manifest"),
    "empty manifest": (MANIFEST, lambda path: path.write_text('{"files": {}}'), "does not name"),
    "manifest of other files": (
        MANIFEST,
        lambda path: path.write_text('{"files": {"../x": {"bytes": 1, "crc32": "0"}}}'),
        "outside of its folder",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_one_is_told_of_and_the_one_before_is_used(
    kind: str, two_saved: tuple[Path, dict[str, Tensor]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, damage, told = DAMAGES[kind]
    shutil.copytree(two_saved[0], tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints" / "step_00000002" / file)
    run = Run(1)
    with caplog.at_level(logging.WARNING, "dinoreg"):
        assert run.resume(tmp_path)["step"] == 1
    assert_same(run.state(), two_saved[1])
    (line,) = [record.getMessage() for record in caplog.records]
    assert "step_00000002 is damaged" in line and file in line and told in line and "\n" not in line
    assert names(tmp_path / "checkpoints") == ["step_00000001", "step_00000002.damaged"]
    with closing(Checkpointer(tmp_path, CheckpointConfig(), Ranks.alone())) as checkpointer:
        checkpointer.latest()
        run.save(checkpointer, 2)  # and on it goes
        checkpointer.wait()
        assert checkpointer.latest() == tmp_path / "checkpoints" / "step_00000002"


def test_another_run_is_only_read(two_saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """It may be running: its damaged checkpoint, and the one that it writes, stay where they are."""
    shutil.copytree(two_saved[0], tmp_path, dirs_exist_ok=True)
    _flip(tmp_path / "checkpoints" / "step_00000002" / METADATA)
    (tmp_path / "checkpoints" / "step_00000003.partial").mkdir()
    before, run = names(tmp_path / "checkpoints"), Run(0)
    with (
        closing(Checkpointer(tmp_path, CheckpointConfig(), Ranks.alone())) as other,
        closing(Checkpointer(tmp_path / "own", CheckpointConfig(), Ranks.alone())) as own,
    ):
        checkpoint = other.latest(of_another_run=True)
        assert checkpoint is not None and checkpoint.name == "step_00000001"
        assert own.load(checkpoint, run.objective, run.optimizer)["step"] == 1
        run.save(own, 1)
        own.wait()
        assert own.latest() == tmp_path / "own" / "checkpoints" / "step_00000001"
    assert names(tmp_path / "checkpoints") == before


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(
    two_saved: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    shutil.copytree(two_saved[0], tmp_path, dirs_exist_ok=True)
    for step in (1, 2):
        _flip(tmp_path / "checkpoints" / f"step_{step:08d}" / "__0_0.distcp")
    for _ in range(2):  # nor when it is asked again
        with (
            closing(Checkpointer(tmp_path, CheckpointConfig(), Ranks.alone())) as checkpointer,
            pytest.raises(CheckpointError, match=r"all checkpoints in .* are damaged"),
        ):
            checkpointer.latest()


# ---- a disk that fails


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


def _save_and_fill_up(disk: Path, leave: int) -> Path:
    """Step 1 is saved, then a file takes all room but this."""
    with closing(Checkpointer(disk / "run", CheckpointConfig(), Ranks.alone())) as checkpointer:
        Run(0).save(checkpointer, 1)
        checkpointer.wait()
    filler = disk / "filler"
    room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    filler.write_bytes(bytes(room - leave))
    return filler


def _on_a_full_disk(ranks: Ranks, disk: Path, filler: Path) -> list[str]:
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


def _assert_told(told: list[str]) -> None:
    warning, error = told
    assert "step_00000002" in warning and "step_00000003" in error
    for words in told:
        assert "No space left on device" in words and "earlier checkpoints are whole" in words and "\n" not in words


@pytest.mark.parametrize("leave", [0, 300_000])
def test_a_full_disk_costs_that_checkpoint_only(leave: int, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        if disk is None:
            pytest.skip(NO_DISK)
        _assert_told(_on_a_full_disk(Ranks.alone(), disk, _save_and_fill_up(disk, leave)))


def test_a_full_disk_is_told_alike_on_all_ranks(pair: Pair) -> None:
    if pair.told_of_full_disk is None:
        pytest.skip(NO_DISK)
    first, second = pair.told_of_full_disk
    _assert_told(first)
    assert second == first[1:]  # the warning is the main process's to give


def test_a_disk_that_becomes_read_only_costs_the_run_nothing(tmp_path: Path) -> None:
    run = Run(0)
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(tmp_path / "disk", "8m"))
        if disk is None:
            pytest.skip(NO_DISK)
        checkpointer = stack.enter_context(closing(Checkpointer(disk, CheckpointConfig(), Ranks.alone())))
        run.save(checkpointer, 1)
        checkpointer.wait()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        run.save(checkpointer, 2)
        path = checkpointer.save_teacher(2, run.objective.teacher["backbone"], MODEL, PhotometricConfig())
        with pytest.raises(CheckpointError, match=r"cannot write .*step_00000002: .*Read-only file system"):
            checkpointer.wait()
        assert not path.exists() and checkpointer.latest() == disk / "checkpoints" / "step_00000001"
        assert names(disk / "checkpoints") == ["step_00000001"]


def test_a_teacher_that_cannot_be_written_is_told(checkpointer: Checkpointer, tmp_path: Path) -> None:
    (tmp_path / "teacher").write_text("a file where the folder should be")
    checkpointer.save_teacher(1, Run(0).objective.teacher["backbone"], MODEL, PhotometricConfig())
    with pytest.raises(CheckpointError, match=r"cannot write .*teacher/step_00000001.safetensors"):
        checkpointer.wait()


# ---- trust


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


@pytest.fixture
def saved(checkpointer: Checkpointer, tmp_path: Path) -> Path:
    Run(0).save(checkpointer, 1)
    checkpointer.wait()
    return tmp_path / "checkpoints" / "step_00000001"


def test_evil_metadata_is_refused_by_name_and_not_run(saved: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (saved / METADATA).write_bytes(pickle.dumps(Evil(trace)))
    with pytest.raises(ValueError, match=r"\.metadata is refused: it names posix\.system"):
        read_metadata(saved)
    run = Run(1)
    with (
        closing(Checkpointer(tmp_path, CheckpointConfig(), Ranks.alone())) as checkpointer,
        pytest.raises(CheckpointError, match=r"cannot resume from .*it names posix\.system"),
    ):
        checkpointer.load(saved, run.objective, run.optimizer)
    assert not trace.exists()
    pickle.loads((saved / METADATA).read_bytes())
    assert trace.exists()  # it would have worked


def test_functions_of_torch_are_refused_as_well(saved: Path) -> None:
    for name in (b"ctorch\nload\n.", b"ctorch.distributed.checkpoint.metadata\nos.system\n.", b"cbuiltins\neval\n."):
        (saved / METADATA).write_bytes(name)
        with pytest.raises(ValueError, match="is refused: it names"):
            read_metadata(saved)


def test_objects_in_place_of_tensors_are_refused(tmp_path: Path) -> None:
    """torch would open them with an unrestricted pickle."""
    trace = tmp_path / "trace"
    dcp.save({"objective.x": Evil(trace)}, checkpoint_id=tmp_path / "evil")
    metadata = pickle.loads((tmp_path / "evil" / METADATA).read_bytes())
    metadata.storage_meta = None
    (tmp_path / "evil" / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"is refused: .*BytesStorageMetadata"):
        SafeReader(tmp_path / "evil")
    reader = SafeReader.__new__(SafeReader)  # and if it came so far
    dcp.FileSystemReader.__init__(reader, tmp_path / "evil")
    reader.metadata = metadata
    with pytest.raises(BaseException, match=r"objective.x is refused"):
        dcp.load({"objective.x": torch.zeros(1)}, storage_reader=reader, planner=TensorsOnly())
    assert not trace.exists()


def test_evil_tensors_are_not_run(tmp_path: Path) -> None:
    folder, trace = tmp_path / "evil", tmp_path / "trace"
    dcp.save({"x": torch.zeros(4)}, checkpoint_id=folder)
    torch.save(Evil(trace), folder / "__0_0.distcp")
    metadata = pickle.loads((folder / METADATA).read_bytes())
    metadata.storage_meta = None
    (place,) = metadata.storage_data.values()
    place.length = (folder / "__0_0.distcp").stat().st_size
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(BaseException, match=r"[Ww]eights.only"):
        dcp.load({"x": torch.zeros(4)}, storage_reader=SafeReader(folder), planner=TensorsOnly())
    assert not trace.exists()


def test_data_outside_of_the_folder_are_refused(saved: Path) -> None:
    metadata = pickle.loads((saved / METADATA).read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../../secret"
    (saved / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"names \.\./\.\./secret, a file outside of its folder"):
        read_metadata(saved)
