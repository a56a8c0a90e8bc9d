"""Where faults are tried: real runs of `dinoreg train` in processes of their own, and what became of them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.faults.warm import Child, Warm

T = TypeVar("T")

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = Path(__file__).with_name("tiny.yaml")
STEPS = 14  # of the recipe
IMAGES, SHARDS = 24, 3
PATIENCE = 150.0  # seconds for what takes two on an idle machine
STOPPED, PEER_LOST = 75, 76  # exit codes of `dinoreg train`
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


# -- what became of it -----------------------------------------------------------------------------------------------


def lines_of(run_dir: Path) -> list[dict[str, float]]:
    """metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def learnt(run_dir: Path) -> dict[int, dict[str, float]]:
    """Losses and gradient norms by step."""
    return {
        int(line["step"]): {name: value for name, value in line.items() if name.startswith(("loss/", "grad_norm/"))}
        for line in lines_of(run_dir)
    }


def teacher_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """The last one; nothing where there is none."""
    path = run_dir / "teacher" / f"step_{STEPS:08d}.safetensors"
    return load_file(path) if path.exists() else {}


def saved_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that have their final name."""
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*") if FINAL.fullmatch(path.name))


def difference(found: Path, expected: Path, tolerance: float = 0.0) -> str:
    """Where two finished runs differ first, in words; empty where they are the same, for tolerance 0 bit for bit.

    Compared are all losses and gradient norms of all steps, that there is one line a step, and the last teacher.
    """
    steps = [int(line["step"]) for line in lines_of(found)]
    if steps != list(range(1, STEPS + 1)):
        return f"metrics.jsonl has steps {steps}"
    ours, theirs = learnt(found), learnt(expected)
    for step, numbers in theirs.items():
        for name, value in numbers.items():
            if not _close(ours[step].get(name), value, tolerance):
                return f"{name} of step {step} is {ours[step].get(name)}, not {value}"
    other = teacher_of(expected)
    if not (mine := teacher_of(found)):
        return "there is no last teacher"
    for name, tensor in other.items():
        # The gradient of the keys' bias is rounding alone, which AdamW makes as large as any other: hence 10 x.
        same = torch.allclose(mine[name], tensor, rtol=0, atol=10 * tolerance)
        if not same:
            return f"teacher {name} differs by {(mine[name] - tensor).abs().max():.2g}"
    return ""


def _close(found: float | None, expected: float, tolerance: float) -> bool:
    if found is None or isinstance(found, str) or isinstance(expected, str):
        return found == expected
    return abs(found - expected) <= tolerance * max(1.0, abs(expected))


def same(found: Path, expected: Path) -> tuple[str, bool]:
    """How two finished runs compare bit for bit: a phrase, and whether they are equal."""
    other = difference(found, expected)
    if other:
        return f"differs: {other}", False
    return f"{STEPS} steps and teacher bitwise equal", True


def one_line(run: Run, rank: int = 0) -> bool:
    """Whether a rank gave up with one line of its own, not with a traceback."""
    return bool(run.last_words(rank)) and "Traceback" not in run.said(rank)


def brief(text: str, width: int = 160, **places: Path) -> str:
    """A message, cut to what fits a table; a long path is shown by the name given here."""
    for name, path in places.items():
        text = text.replace(str(path), name)
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def went_on_from(run: Run) -> int:
    """The step that a start went on from, by the first step that it logged."""
    return min(run.logged(), default=STEPS + 1) - 1


def contents(folder: Path, leave_out: Sequence[str] = ()) -> dict[str, bytes]:
    """Every file below a folder by its relative name."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(tuple(leave_out))}


# -- what it is played with ------------------------------------------------------------------------------------------


def draw_images(folder: Path, count: int = IMAGES, seed: int = 0) -> None:
    """Images of smooth noise, in two sizes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        size = (48, 64) if number % 2 else (80, 56)
        noise = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        noise.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:02d}.jpg", quality=95)


def write_shards(images: Path, folder: Path, count: int = SHARDS) -> None:
    """The images of a folder in `count` tars."""
    folder.mkdir(parents=True)
    files = sorted(images.iterdir())
    for number in range(count):
        write_tar(folder / f"shard-{number}.tar", {file.name: file.read_bytes() for file in files[number::count]})


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    """A tar of these members, whatever their names."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own on a folder. Raises OSError where this is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def resize_disk(folder: Path, size: str) -> None:
    """Another size for a file system of `small_disk`."""
    _mount("-o", f"remount,size={size}", str(folder))


def mounting(command: str) -> list[str]:
    """A prefix for commands, which run where `command` has mounted something that nobody else sees.

    Raises OSError where this is not allowed.
    """
    prefix = ["unshare", "-m", "sh", "-c", f'{command} && exec "$@"', "sh"]
    try:
        tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise OSError("there is no unshare command") from None
    if tried.returncode:
        raise OSError(f"mounting is not allowed: {tried.stderr.strip()}")
    return prefix


def _mount(*words: str) -> None:
    try:
        done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise OSError("there is no mount command") from None
    if done.returncode:
        raise OSError(f"mounting is not allowed: {done.stderr.strip()}")


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
