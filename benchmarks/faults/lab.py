"""Where faults are tried: real runs of `dinoreg train` in processes of their own, and what became of them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from benchmarks.faults.props import draw_images, write_shards
from benchmarks.faults.warm import Child, Warm

T = TypeVar("T")

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = Path(__file__).with_name("tiny.yaml")
STEPS = 14  # of the recipe
PATIENCE = 150.0  # seconds for what takes two on an idle machine
STOPPED, PEER_LOST = 75, 76  # exit codes of `dinoreg train`
# Steps (see inject.py) that are long enough for something to happen in between, on a busy machine too.
STEADY = "steady:1-99"
FINAL = re.compile(r"step_\d{8,}")


Process = subprocess.Popen[bytes] | Child


@dataclass(frozen=True)
class Outcome:
    """What a fault did. ok: None where this machine cannot play it."""

    happened: str
    lost: str
    ok: bool | None


@dataclass(frozen=True)
class Scenario:
    """One row of the matrix."""

    name: str
    fault: str
    play: Callable[[Lab], Outcome]


def judge(happened: str, lost: str, promises: Mapping[str, bool]) -> Outcome:
    """ok when every promise was kept; the broken ones are named."""
    broken = [promise for promise, kept in promises.items() if not kept]
    return Outcome(happened + "".join(f"; NOT TRUE: {promise}" for promise in broken), lost, not broken)


def impossible(reason: str) -> Outcome:
    """For a machine that cannot play the fault."""
    return Outcome(f"not possible here: {reason}", "-", None)


class Run:
    """Processes of one start of `dinoreg train`, one a rank (or one launcher), each in a process group of its own."""

    def __init__(self, run_dir: Path, processes: Sequence[Process], outputs: list[Path]) -> None:
        self.run_dir, self.processes, self.outputs = run_dir, processes, outputs
        self.begun, self.seconds = time.monotonic(), 0.0  # when it was started, and how long it took

    def said(self, rank: int = 0) -> str:
        """Everything that a rank has printed up to now."""
        return self.outputs[rank].read_text(errors="replace")

    def last_words(self, rank: int = 0) -> str:
        """The one line with which `dinoreg` gave up, without its name; empty where there is none."""
        lines = [line for line in self.said(rank).splitlines() if line.startswith("dinoreg: ")]
        return lines[-1].removeprefix("dinoreg: ") if lines else ""

    def logged(self) -> list[int]:
        """The steps that this start has logged."""
        return [int(step) for step in re.findall(r"^step +(\d+)/", self.said(), re.MULTILINE)]

    def until(self, happened: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
        """Raises RuntimeError where a process ends first, TimeoutError where nothing happens."""
        deadline = time.monotonic() + seconds
        while not happened():
            if all(process.poll() is not None for process in self.processes):
                if happened():
                    return
                raise RuntimeError(f"ended before {what}: {self.codes()} {self.said()[-800:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {what} in {seconds:.0f} s: {self.said()[-800:]}")
            time.sleep(0.002)

    def until_logged(self, steps: int) -> None:
        """Wait until this start has done so many steps."""
        self.until(lambda: len(self.logged()) >= steps, f"{steps} steps")

    def until_writing(self) -> None:
        """Wait for a checkpoint that has not its final name yet."""
        folder = self.run_dir / "checkpoints"

        def writing() -> bool:
            names = os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208 (every millisecond counts)
            return any(not FINAL.fullmatch(name) for name in names)

        self.until(writing, "checkpoint being written")

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """A signal to these ranks, or to all."""
        for rank in ranks or range(len(self.processes)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, number)

    def send_to_groups(self, number: signal.Signals) -> None:
        """A signal to the ranks and to all processes that they have started."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """Exit codes, as a shell gives them (128 + the signal that ended it). Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"still running after {seconds:.0f} s: {self.said()[-800:]}") from None
        self.seconds = time.monotonic() - self.begun
        return self.codes()

    def codes(self) -> list[int]:
        return [code if code >= 0 else 128 - code for code in (p.poll() or 0 for p in self.processes)]

    def kill(self) -> None:
        """SIGKILL for every rank at once, and then for the orphans that they leave."""
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.wait(PATIENCE)
        self.send_to_groups(signal.SIGKILL)


class Lab:
    """Images, runs and comparisons. A context manager: what it made and started is gone afterwards."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True)
        self.root = Path(self._folder.name)
        self.runs: list[Run] = []
        self._made: dict[Hashable, Any] = {}
        self._lock, self._locks = threading.Lock(), dict[Hashable, threading.Lock]()
        self.warm = Warm(environment())
        self.sources = {"folder": self.root / "images", "shards": self.root / "shards"}
        draw_images(self.sources["folder"])
        write_shards(self.sources["folder"], self.sources["shards"])

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for run in self.runs:
            run.send_to_groups(signal.SIGKILL)
        self.warm.close()
        self._folder.cleanup()

    def fresh(self) -> Path:
        """A new, empty folder."""
        return Path(tempfile.mkdtemp(dir=self.root))

    def start(
        self,
        run_dir: Path,
        *overrides: str,
        data: str | Path = "folder",
        ranks: int = 1,
        torchrun: bool = False,
        inject: str | None = None,
        cold: bool = False,
        prefix: Sequence[str] = (),
        recipe: Path = RECIPE,
    ) -> Run:
        """`dinoreg train` in the background.

        data: 'folder', 'shards', or what else to give as data.sources. inject: a fault of benchmarks/faults/inject.py.
        cold: as a new program (see benchmarks/faults/warm.py). prefix: a command that executes the rest.
        """
        source = self.sources.get(str(data), data)
        arguments = ["train", str(recipe), f"data.sources={source}", f"run_dir={run_dir}", *overrides]
        talk, port, processes = self.fresh(), _free_port(), list[Process]()
        outputs = [talk / f"rank{rank}.txt" for rank in range(1 if torchrun else ranks)]
        for rank, out in enumerate(outputs):
            env = environment() if torchrun else environment(rank, ranks, port)
            if cold or torchrun or prefix:
                launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
                module = [*(launcher if torchrun else []), "dinoreg"]
                command = [*prefix, sys.executable, "-m", *module, *arguments]
                with out.open("wb") as file:
                    processes.append(
                        subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
                    )
            else:
                processes.append(self.warm.start(arguments, env, out, inject))
        run = Run(run_dir, processes, outputs)
        self.runs.append(run)
        return run

    def run(self, run_dir: Path, *overrides: str, **options: object) -> Run:
        """`dinoreg train` to its end, whatever that is."""
        run = self.start(run_dir, *overrides, **options)  # type: ignore[arg-type]
        run.wait()
        return run

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made by the first who asks; others wait for it."""
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._made:
                self._made[key] = make()
            return self._made[key]

    def reference(self, data: str = "folder", ranks: int = 1) -> Path:
        """The run directory of an uninterrupted run. Raises RuntimeError where even that fails."""
        return self.once(("reference", data, ranks), partial(self._uninterrupted, data, ranks))

    def _uninterrupted(self, data: str, ranks: int) -> Path:
        run = self.run(self.fresh() / "run", data=data, ranks=ranks)
        if any(run.codes()):
            raise RuntimeError(f"an uninterrupted run failed: {run.said()[-2000:]}")
        return run.run_dir

    def crashed(self, step: int, data: str = "folder", ranks: int = 1) -> Path:
        """A run directory as a run leaves it that was killed soon after its checkpoint of `step`."""
        run_dir = self.fresh() / "run"
        shutil.copytree(self.reference(data, ranks), run_dir)
        for path in [*(run_dir / "checkpoints").glob("step_*"), *(run_dir / "teacher").glob("step_*")]:
            if int(path.name[5:13]) > step:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run_dir / "metrics.jsonl").write_text("".join(lines[: step + 1]))
        return run_dir


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(rank: int = 0, ranks: int = 1, port: int = 0) -> dict[str, str]:
    """As on a login node: nothing of a launcher that the matrix itself may run under, then what a launcher sets."""
    foreign = ("SLURM_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    env |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "1000"}
    if ranks == 1:
        return env
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return env | {name: str(value) for name, value in here.items()} | {"MASTER_ADDR": "127.0.0.1"}
