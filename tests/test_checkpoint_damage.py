"""Checkpoints after a crash, a flipped bit or on a disk that fails: the last good one is there."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
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
from torch import Tensor

from dinoreg.data.photometric import PhotometricConfig
from dinoreg.parallel.mesh import Ranks
from dinoreg.train.checkpoint import CheckpointConfig, Checkpointer, CheckpointError
from dinoreg.train.checkpoint_files import MANIFEST, METADATA, RUN

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


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
            {name: whole(t) for name, t in run.objective.student.state_dict().items()},
            {name: whole(t) for name, t in Run(0, steps=1).objective.student.state_dict().items()},
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


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing data": ("__0_0.distcp", Path.unlink, "cannot be read: No such file"),
    "short data": ("__0_0.distcp", _cut, "bytes instead of"),
    "flipped bit of data": ("__0_0.distcp", flip, "its checksum differs"),
    "flipped bit of metadata": (METADATA, flip, ".metadata"),
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
    flip(tmp_path / "checkpoints" / "step_00000002" / METADATA)
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
        flip(tmp_path / "checkpoints" / f"step_{step:08d}" / "__0_0.distcp")
    for _ in range(2):  # nor when it is asked again
        with (
            closing(Checkpointer(tmp_path, CheckpointConfig(), Ranks.alone())) as checkpointer,
            pytest.raises(CheckpointError, match=r"all checkpoints in .* are damaged"),
        ):
            checkpointer.latest()


@pytest.mark.parametrize("leave", [0, 300_000])
def test_a_full_disk_costs_that_checkpoint_only(leave: int, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        if disk is None:
            pytest.skip(NO_DISK)
        assert_told(on_a_full_disk(Ranks.alone(), disk, save_and_fill_up(disk, leave)))


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
