"""What tests of the launcher share: images, the command, and waiting."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from launch.cli import main

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = REPOSITORY / "tests" / "tiny.yaml"
# Weights are sharded in the same way on two nodes and on one, and nothing waits for more than a moment.
FAST = ["efficiency.shard=full", "monitor.every=1000", "checkpoint.background=false", "watch.silence=5"]


def write_images(folder: Path, count: int = 16) -> Path:
    """Noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def outside(**extra: str) -> dict[str, str]:
    """The environment of somebody who is in no job."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SUBMITIT"))}
    return kept | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **extra}


def launch(*words: object, env: Mapping[str, str], fails: bool = False) -> str:
    """What `dinoreg-launch` prints: its answer, or its complaint. In this process, which has torch already."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ, env, clear=True), redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            assert end.code == (2 if fails else 0), err.getvalue() + out.getvalue()
    return err.getvalue() if fails else out.getvalue()


def launch_from(checkout: Path, *words: object, env: Mapping[str, str]) -> str:
    """The same by the program in a checkout."""
    command = [sys.executable, "-m", "launch", *map(str, words)]
    done = subprocess.run(command, env=env, cwd=checkout, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def until(done: Callable[[], object], what: str, seconds: float = 300) -> None:
    """Wait for something to be so."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(0.3)


def processes_of(run_dir: Path) -> list[int]:
    """That train in a run directory on this machine."""
    words = f"{run_dir}/launch.yaml\0".encode()
    folders = [path for path in Path("/proc").glob("[0-9]*") if words in _command_line(path)]
    return sorted(int(path.name) for path in folders)


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def metrics(run_dir: Path) -> list[dict[str, float]]:
    """Whole lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def steps(run_dir: Path) -> int:
    """Steps that the run has logged."""
    return int(metrics(run_dir)[-1]["step"]) if metrics(run_dir) else 0


def losses(run_dir: Path) -> list[tuple[float, float]]:
    """(step, loss), exactly as logged."""
    return [(line["step"], line["loss/total"]) for line in metrics(run_dir)]
