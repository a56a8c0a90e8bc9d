"""A run directory belongs to one run at a time, and to the same run as before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from dinoreg.config import ConfigError, leaf_keys, load, to_yaml
from dinoreg.train.recipe import FREE, RunConfig
from dinoreg.train.rundir import RunLock, changes, refuse_changes

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = REPOSITORY / "tests" / "tiny.yaml"


def config(*options: str) -> RunConfig:
    return load(RunConfig, TINY, ["data.sources=/images", *options])


def started(run_dir: Path, *options: str) -> Path:
    """The configuration of a run that has saved something."""
    (run_dir / "checkpoints" / "step_00000002").mkdir(parents=True)
    written = run_dir / "config.yaml"
    written.write_text(to_yaml(config(*options)))
    return written


def test_the_second_run_is_told_who_has_the_directory(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"run_dir: .*run is in use by process {os.getpid()} on .*, since 20"):
        RunLock(tmp_path / "run", patience=0)
    lock.close()
    RunLock(tmp_path / "run", patience=0).close()


def test_a_run_that_was_killed_leaves_no_lock(tmp_path: Path) -> None:
    program = f"import sys, time\nfrom pathlib import Path\nfrom dinoreg.train.rundir import RunLock\n\
lock = RunLock(Path({str(tmp_path)!r}))\nprint('mine', flush=True)\ntime.sleep(60)"
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    holder = subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"mine\n"
    with pytest.raises(ConfigError, match=f"process {holder.pid} on"):
        RunLock(tmp_path, patience=0)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    RunLock(tmp_path, patience=0).close()


def test_the_next_job_waits_for_the_last_one_to_end(tmp_path: Path) -> None:
    command = f"flock {tmp_path}/lock sleep 1"
    (tmp_path / "lock").touch()
    holder = subprocess.Popen(command.split())
    while True:
        try:
            RunLock(tmp_path, patience=0).close()
        except ConfigError:
            break  # it has the lock now
    RunLock(tmp_path, patience=30).close()
    holder.wait()


def test_only_what_may_change_may_change(tmp_path: Path) -> None:
    written = started(tmp_path)
    free = ["data.workers=3", "efficiency.shard=none", "train.log_every=7", "checkpoint.keep=9", "train.time_limit=3h"]
    refuse_changes(written, config(*free, f"run_dir={tmp_path}"))
    with pytest.raises(ConfigError) as caught:
        refuse_changes(written, config(*free, "optim.lr=0.5", "seed=3", "model.depth=5"))
    told = str(caught.value)
    assert "seed=3 (was 0)" in told and "model.depth=5 (was 3)" in told and "optim.lr=0.5 (was 0.001)" in told
    assert "workers" not in told and "train.go_on_from=" in told and "\n" not in told


def test_a_run_that_saved_nothing_binds_nobody(tmp_path: Path) -> None:
    written = tmp_path / "config.yaml"
    written.write_text(to_yaml(config()))
    refuse_changes(written, config("optim.lr=0.5"))
    refuse_changes(tmp_path / "none.yaml", config("optim.lr=0.5"))


def test_checkpoints_without_a_readable_configuration_are_nobodys(tmp_path: Path) -> None:
    written = started(tmp_path)
    written.write_text("train: {steps: 4")
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged"):
        refuse_changes(written, config())
    written.unlink()
    with pytest.raises(ConfigError, match=r"has checkpoints but no config\.yaml"):
        refuse_changes(written, config())


def test_a_checkpoint_that_was_never_finished_binds_nobody(tmp_path: Path) -> None:
    written = started(tmp_path)
    (tmp_path / "checkpoints" / "step_00000002").rename(tmp_path / "checkpoints" / "step_00000002.partial")
    refuse_changes(written, config("optim.lr=0.5"))


def test_differences_are_found_by_dotted_key(tmp_path: Path) -> None:
    assert changes(started(tmp_path), config("photometric.mean=[0.5, 0.5, 0.5]", "train.steps=9")) == {
        "photometric.mean": ([0.485, 0.456, 0.406], [0.5, 0.5, 0.5]),
        "train.steps": (4, 9),
    }


def test_every_free_option_exists() -> None:
    keys = leaf_keys(RunConfig)
    assert not [name for name in FREE if not any(key.startswith(name) for key in keys)]
    assert {field.name for field in fields(RunConfig)} >= {name.partition(".")[0] for name in FREE}
