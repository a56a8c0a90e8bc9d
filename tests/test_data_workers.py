"""Processes that load data: who may end them, that none outlives its run, and that /dev/shm has room for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from test_data_loader import load, picture

from dinoreg.config import ConfigError
from dinoreg.data import workers
from dinoreg.data.images import DataError
from dinoreg.data.workers import fit_shared_memory, signals_blocked

HERE = Path(__file__).parent
SERVED = """
import sys
from test_data_loader import load
if __name__ == "__main__":
    loader = load(sys.argv[1], steps=1000, workers=2)
    batches = iter(loader)
    for line in sys.stdin:
        print(int(next(batches).positions[0]), flush=True)
"""
FILLED = """
import logging, os, sys
from contextlib import suppress
from test_data_loader import CropConfig, load

class Remedy(logging.Handler):
    done = False

    def emit(self, record):
        if not self.done:
            os.remove("/dev/shm/other")
        self.done = True

if __name__ == "__main__":
    logging.basicConfig()
    remedy = Remedy()
    if sys.argv[3:] == ["for a while"]:
        logging.getLogger("dinoreg").addHandler(remedy)
    crops = CropConfig(global_size=64, local_size=32, local_count=2)
    loader = load(sys.argv[1], steps=12, workers=int(sys.argv[2]), crops=crops)
    print("workers:", loader.workers)
    for step, batch in enumerate(loader):
        # At each step: what the batches before have given back goes too.
        if step >= 2 and len(sys.argv) > 3 and not remedy.done:
            with open("/dev/shm/other", "ab", buffering=0) as file, suppress(OSError):
                while file.write(bytes(4096)):
                    pass
    print("steps:", step + 1)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for number in range(24):
        (root / f"{number:02d}.png").write_bytes(picture(number))
    return root


def below(pid: int) -> set[int]:
    """The living descendants of a process."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = file.read_text().rpartition(")")
            if rest.split()[0] != "Z":
                children.setdefault(int(rest.split()[1]), []).append(int(name.split()[0]))
    found, pending = set(), [pid]
    while pending:
        pending += (new := children.get(pending.pop(), []))
        found |= set(new)
    return found


def living(pids: set[int]) -> set[int]:
    states = {}
    for pid in pids:
        with suppress(OSError):
            states[pid] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return {pid for pid, state in states.items() if state != "Z"}


def all_gone(pids: set[int], seconds: float = 40) -> bool:
    deadline = time.monotonic() + seconds
    while living(pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not living(pids)


@contextmanager
def served(source: Path | str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that loads with two workers and gives a step for each line it is sent."""
    (tmp_path / "served.py").write_text(SERVED)
    main = subprocess.Popen(
        [sys.executable, tmp_path / "served.py", str(source)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(HERE)},
    )  # fmt: skip
    try:
        yield main
    finally:
        rest = below(main.pid) | {main.pid}
        for pid in living(rest):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        main.wait()


def step(main: subprocess.Popen[str]) -> int:
    assert main.stdin and main.stdout
    main.stdin.write("next\n")
    main.stdin.flush()
    return int(main.stdout.readline())


def test_signals_to_the_whole_job_leave_the_loading_alone_and_nothing_outlives_a_killed_run(folder, tmp_path) -> None:
    with served(folder, tmp_path) as main:
        assert step(main) == 0
        helpers = below(main.pid)
        assert len(helpers) == 4  # two workers, the server they come from, and Python's tracker of resources
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):
            for pid in helpers:
                os.kill(pid, number)
        time.sleep(2 * workers.GRACE)
        assert [step(main) for _ in range(12)] == list(range(12, 12 * 13, 12))
        assert below(main.pid) == helpers
        main.kill()
        main.wait()
        assert all_gone(helpers), "processes outlive the run"


def test_a_run_ends_though_its_workers_are_stuck(folder, tmp_path) -> None:
    """One that is stopped, so that only SIGKILL ends it; the other one waits for an image that does not come."""
    with served(f"pipe:cat {tmp_path}/s.tar; sleep 1000", tmp_path) as main:
        subprocess.run(["tar", "cf", tmp_path / "s.tar", "-C", folder, *sorted(os.listdir(folder))], check=True)  # noqa: PTH208
        os.truncate(tmp_path / "s.tar", (tmp_path / "s.tar").stat().st_size - 10240)
        assert main.stdin
        main.stdin.write("next\n")
        main.stdin.flush()
        deadline = time.monotonic() + 60
        while len(below(main.pid)) < 8 and time.monotonic() < deadline:  # with a shell and a `sleep` for each worker
            time.sleep(0.1)
        python = [pid for pid in below(main.pid) if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(python) == 3
        everything = below(main.pid)
        os.kill(max(python), signal.SIGSTOP)
        main.send_signal(signal.SIGINT)
        began = time.monotonic()
        main.wait(timeout=60)
        assert time.monotonic() - began < 40
        assert all_gone(set(python))
        left = living(everything)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert len(left) <= 2, "the command of the worker that could still act outlives it"


def test_processes_started_meanwhile_are_born_with_the_signals_blocked() -> None:
    def blocked() -> set[int]:
        shown = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout
        mask = int(next(line for line in shown.splitlines() if line.startswith("SigBlk")).split()[1], 16)
        return {number for number in workers.SIGNALS if mask & 1 << number - 1}

    with signals_blocked():
        assert blocked() == workers.SIGNALS
    assert blocked() == set()


def test_workers_that_are_silent_too_long_end_the_run(tmp_path) -> None:
    loader = load("pipe:sleep 600", workers=1, timeout=2)
    with pytest.raises(DataError, match=r"the batch of step 1 did not come .* within data.timeout=2 seconds") as caught:
        next(iter(loader))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError):
        loader.cfg.timeout = -1
        loader.cfg.check()


def test_workers_are_as_many_as_shared_memory_holds(monkeypatch, caplog) -> None:
    monkeypatch.setattr(workers, "_free_bytes", lambda _: 100)
    assert fit_shared_memory(4, asked=True, batch_bytes=9, prefetch=2, local_world=1) == 4  # 11 batches
    assert fit_shared_memory(0, asked=True, batch_bytes=99, prefetch=2, local_world=8) == 0
    assert not caplog.records
    assert fit_shared_memory(4, asked=False, batch_bytes=12, prefetch=2, local_world=1) == 2  # 7 batches
    assert "/dev/shm" in caplog.text and "--shm-size" in caplog.text
    assert fit_shared_memory(4, asked=False, batch_bytes=6, prefetch=2, local_world=2) == 2
    with pytest.raises(ConfigError, match=r"docker run --shm-size.* data\.workers=0") as caught:
        fit_shared_memory(4, asked=True, batch_bytes=30, prefetch=2, local_world=1)
    assert caught.value.key == "data.workers" and "\n" not in str(caught.value)


def in_small_memory(folder: Path, tmp_path: Path, size: str, *words: str) -> subprocess.CompletedProcess[str]:
    """FILLED with a /dev/shm of its own."""
    (tmp_path / "filled.py").write_text(FILLED)
    mounted = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mounted], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    command = f'{mounted} && exec "$@"'
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", command, "sh", sys.executable, tmp_path / "filled.py", folder, *words],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(HERE)}, timeout=200,
    )  # fmt: skip


def test_a_tiny_shared_memory_is_told_or_done_without(folder, tmp_path) -> None:
    done = in_small_memory(folder, tmp_path, "1m", "-1")
    assert done.returncode == 0 and "workers: 0" in done.stdout and "steps: 12" in done.stdout, done.stderr
    refused = in_small_memory(folder, tmp_path, "1m", "1")
    assert refused.returncode and "data.workers" in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize("how", ["for a while", "for good"])
def test_shared_memory_that_others_fill(folder, tmp_path, how) -> None:
    done = in_small_memory(folder, tmp_path, "6m", "1", how)
    assert "/dev/shm is full" in done.stderr and "start again at step" in done.stderr
    if how == "for a while":
        assert done.returncode == 0 and "steps: 12" in done.stdout, done.stderr
    else:
        assert "DataError: a data worker died again after 3 new starts" in done.stderr.splitlines()[-1]
