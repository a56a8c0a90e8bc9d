"""Checkpoints: what comes back, on any number of ranks, and what the training waits for."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointing import (
    MODEL,
    NO_DISK,
    Run,
    assert_same,
    assert_told,
    flip,
    names,
    on_a_full_disk,
    save_and_fill_up,
    small_disk,
    whole,
)
from distributed import run_ranks
from safetensors.torch import load_file
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.data.photometric import PhotometricConfig
from dinoreg.parallel.mesh import Ranks
from dinoreg.train.checkpoint import CheckpointConfig, Checkpointer, CheckpointError
from dinoreg.train.checkpoint_files import RUN, read_metadata

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@contextmanager
def held_back(checkpointer: Checkpointer) -> Iterator[None]:
    """The thread has something else to do first, as on a slow disk."""
    gate = threading.Event()
    checkpointer.thread.submit(gate.wait)
    try:
        yield
    finally:
        gate.set()


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
        flip(checkpoints / "step_00000009" / "__0_0.distcp")
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
        filler = save_and_fill_up(disk, 300_000) if disk else None
        done = run_ranks(_do_both, 2, folder, disk, filler)
    told = [told for _, told in done] if disk else None
    return Pair(folder, run.state(), [exchanged for exchanged, _ in done], told)


def _do_both(ranks: Ranks, folder: Path, disk: Path | None, filler: Path | None) -> tuple[Any, list[str]]:
    return _one_to_two(ranks, folder), on_a_full_disk(ranks, disk, filler) if disk and filler else []


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
        expected = {name: whole(t) for name, t in backbone.objective.teacher["backbone"].state_dict().items()}
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


def test_a_full_disk_is_told_alike_on_all_ranks(pair: Pair) -> None:
    if pair.told_of_full_disk is None:
        pytest.skip(NO_DISK)
    first, second = pair.told_of_full_disk
    assert_told(first)
    assert second == first[1:]  # the warning is the main process's to give
