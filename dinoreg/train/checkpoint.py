"""Checkpoints of a run, written while training goes on.

    checkpoints/step_00000100/              torch.distributed.checkpoint: all that is needed to go on, at any world size
    teacher/step_00000100.safetensors       the teacher's backbone in one file, which `load_backbone` opens

State is copied to host memory (staging.py) and written from there by a thread of each rank; the threads talk over a
process group of their own. Files are written to `step_00000100.partial`, which is synced, and renamed when every rank
is done: what has its final name was whole, at whatever instant a machine stops. What happens to the files later is
found by their checksums (checkpoint_files.py) when a run starts.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from dinoreg.config import ConfigError
from dinoreg.data.photometric import PhotometricConfig
from dinoreg.models.vit import ModelConfig
from dinoreg.models.weights import NORMALISATION_KEY, save_backbone
from dinoreg.parallel.mesh import Ranks
from dinoreg.train.checkpoint_files import RUN, SafeReader, SummedFiles, SummingWriter, Sums, TensorsOnly, sync_folder
from dinoreg.train.checkpoint_folder import CheckpointFolder
from dinoreg.train.checkpoint_state import State, random_state, room_for, state_of, take_over
from dinoreg.train.optimizer import Optimizer
from dinoreg.train.staging import StagedPlanner, Staging, share_of

logger = logging.getLogger("dinoreg")
T = TypeVar("T")


@dataclass
class CheckpointConfig:
    """When to save, and how many to keep."""

    every: int = 1000  # steps
    keep: int = 3  # newest resumable checkpoints kept; the teacher files are all kept
    keep_every: int = 0  # steps; checkpoints at multiples of it are kept for ever; 0: none
    background: bool = True  # train on while it is written, from a copy in host memory; false: wait until it is written

    def check(self) -> None:
        for key in ("every", "keep"):
            if getattr(self, key) < 1:
                raise ConfigError(f"must be at least 1, not {getattr(self, key)}", key=key)
        if self.keep_every < 0 or self.keep_every % self.every:
            raise ConfigError(
                f"must be 0 or a multiple of checkpoint.every {self.every}, not {self.keep_every}", key="keep_every"
            )


class CheckpointError(ValueError):
    """A checkpoint was not written, or cannot be read. All ranks raise the same."""


class Checkpointer:
    """Saves and restores an objective, its optimizer, random generators, and what else the run says about itself.

    All methods but `staged` are collective. Those that save return while it is being written. A failure to write is
    told by the next `wait`, or by the next `save` as a warning: it is no reason to stop training.
    """

    def __init__(self, run_dir: Path, cfg: CheckpointConfig, ranks: Ranks) -> None:
        self.folder = CheckpointFolder(run_dir / "checkpoints", cfg.keep, cfg.keep_every)
        self.teachers, self.cfg, self.ranks = run_dir / "teacher", cfg, ranks
        # Collectives of the thread must never meet those of the training in one group: their order would be chance.
        group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.peers = replace(ranks, control=group)
        self.among: dict[str, Any] = {"process_group": group, "no_dist": group is None}
        self.staging, self.teacher_staging = Staging(ranks.device), Staging(ranks.device)
        self.thread = ThreadPoolExecutor(1, "checkpoint", initializer=partial(_enter, ranks.device))
        self.jobs: list[Future[None]] = []
        self.teacher_job: Future[None] | None = None
        self.saved: int | None = None  # the last step that is surely on the disk

    def latest(self, *, of_another_run: bool = False) -> Path | None:
        """The newest checkpoint that is whole; newer ones that are damaged are told of and set aside.

        of_another_run: change nothing there: it may be running.

        Raises:
            CheckpointError: there are checkpoints, but all are damaged.
        """
        wait(self.jobs)
        tried: list[int] = []
        if self.ranks.is_main and not of_another_run:
            self.folder.clear_leftovers()
            for leftover in self.teachers.glob(".step_*.part"):
                leftover.unlink(missing_ok=True)
        while (step := self._from_main(partial(self.folder.newest, tried))) is not None:
            problem = self.folder.problem_of(self.folder.of(step), self.peers)
            if problem is None:
                return self.folder.of(step)
            tried.append(step)
            if self.ranks.is_main:
                logger.warning(f"{self.folder.of(step)} is damaged: {problem}; the one before it is used")
                if not of_another_run:
                    self.folder.set_aside(step)
        damaged_before = self._from_main(self.folder.has_damaged)
        if tried or damaged_before:
            raise CheckpointError(
                f"all checkpoints in {self.folder.path} are damaged; give another run_dir, or remove that folder to "
                "start from the beginning"
            )
        return None

    def check(self, checkpoint: Path) -> None:
        """Raises CheckpointError when this one, wherever it lies, is no whole checkpoint."""
        if problem := self.folder.problem_of(checkpoint, self.peers):
            raise CheckpointError(f"{checkpoint} cannot be gone on from: {problem}")

    def save(self, step: int, objective: nn.Module, optimizer: Optimizer, about: dict[str, Any]) -> None:
        """Start to write the checkpoint of `step`, unless it is there already. Waits for the one before.

        Parameters and the optimizer's state may change again after `staged`, all else at once.
        about: what `load` gives back; JSON.
        """
        failure = self._finish()
        if failure is not None and self.ranks.is_main:
            logger.warning(f"{failure}; training goes on")
        if step != self.saved:
            text = json.dumps({"step": step, **about}, indent=1)
            self._start(self._write, step, self._stage(objective, optimizer), text)

    def staged(self) -> None:
        """To be called before parameters change: from here on the device copies first. Nobody waits for the disk."""
        self.staging.wait_on_device()

    def save_teacher(self, step: int, backbone: nn.Module, config: ModelConfig, images: PhotometricConfig) -> Path:
        """Start to write the teacher's backbone to one file, whatever it is sharded over. It may change at once.

        Returns:
            Where it will be after `wait`.
        """
        if self.teacher_job is not None:
            wait([self.teacher_job])  # it is written from the memory that is filled now
        state: State = {}
        for name, tensor in backbone.state_dict().items():
            whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.ranks.is_main:
                state |= self.teacher_staging.copy({name: whole})
        path = self.teacher_path(step)
        extra = {"step": str(step), NORMALISATION_KEY: json.dumps([images.mean, images.std])}
        self.teacher_job = self._start(self._write_teacher, path, state, config, extra)
        return path

    def teacher_path(self, step: int) -> Path:
        """The file of the teacher after `step` steps."""
        return self.teachers / f"step_{step:08d}.safetensors"

    def wait(self) -> None:
        """Until what was started is on the disk. Raises CheckpointError when it could not be written."""
        failure = self._finish()
        if failure is not None:
            raise failure

    def load(self, checkpoint: Path, objective: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Restore in place.

        Returns:
            What was said `about` the run when it was saved, and `step`.

        Raises:
            CheckpointError: the checkpoint is of another architecture, or holds what no checkpoint of ours does.
        """
        try:
            reader, room, about = self._together(partial(self._open, checkpoint, objective, optimizer))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # alone, as `replay` is
                dcp.load(room, storage_reader=reader, planner=TensorsOnly(), **self.among)
        except (Exception, CheckpointException) as error:  # the latter is a BaseException
            raise CheckpointError(
                f"cannot resume from {checkpoint}: {_reason(error)}; "
                "if the architecture was changed, give another run_dir"
            ) from error
        take_over(room, optimizer, self.ranks)
        if checkpoint.parent == self.folder.path:
            self.saved = about["step"]
        return about

    def close(self) -> None:
        """Let what was started be finished, whatever becomes of it. Nothing can be started afterwards."""
        self.thread.shutdown(wait=True)

    # ---- on the calling thread

    def _stage(self, objective: nn.Module, optimizer: Optimizer) -> StagedPlanner | Exception:
        """Start to copy. An error of one rank goes with the others to the thread, where all hear of it."""
        try:
            steady, moving = state_of(objective, optimizer)
            steady, moving = share_of(steady, self.ranks), share_of(moving, self.ranks) | random_state(self.ranks)
            copies = self.staging.copy(moving) | self.staging.copy(steady, beside=True)
            return StagedPlanner(moving | steady, copies, self.ranks)
        except Exception as error:
            return error

    def _start(self, work: Callable[..., None], *args: Any) -> Future[None]:
        job = self.thread.submit(work, *args)
        self.jobs.append(job)
        if not self.cfg.background:
            wait([job])
        return job

    def _finish(self) -> CheckpointError | None:
        """Wait for all that was started; the first failure."""
        failures = [job.exception() for job in self.jobs]
        self.jobs.clear()
        return next((CheckpointError(str(failure)) for failure in failures if failure is not None), None)

    def _open(
        self, checkpoint: Path, objective: nn.Module, optimizer: Optimizer
    ) -> tuple[SafeReader, State, dict[str, Any]]:
        reader = SafeReader(checkpoint)
        about = json.loads((checkpoint / RUN).read_bytes())
        return reader, room_for(reader.metadata, objective, optimizer, self.ranks), about

    # ---- on the thread

    def _write(self, step: int, staged: StagedPlanner | Exception, about: str) -> None:
        final, folder = self.folder.of(step), self.folder.partial(step)
        try:
            planner = self._together(partial(self._prepare, step, staged))
            writer = SummingWriter(folder)
            dcp.save({}, storage_writer=writer, planner=planner, **self.among)
            sums = self.peers.gather_objects(writer.files.sums)
            self._together(partial(self._commit, step, sums, about))
        except (Exception, CheckpointException) as error:
            if self.ranks.is_main:
                shutil.rmtree(folder, ignore_errors=True)
            raise CheckpointError(f"cannot write {final}: {_reason(error)}; earlier checkpoints are whole") from error
        self.saved = step

    def _prepare(self, step: int, staged: StagedPlanner | Exception) -> StagedPlanner:
        if isinstance(staged, Exception):
            raise staged
        if self.ranks.is_main:
            self.folder.start(step)
        self.staging.wait_on_host()
        return staged

    def _commit(self, step: int, sums: list[Sums], about: str) -> None:
        if not self.ranks.is_main:
            return
        files = SummedFiles()
        files.write_text(self.folder.partial(step) / RUN, about)
        self.folder.commit(step, {name: entry for part in [*sums, files.sums] for name, entry in part.items()})

    def _write_teacher(self, path: Path, state: State, config: ModelConfig, extra: dict[str, str]) -> None:
        try:
            self._together(partial(self._save_backbone, path, state, config, extra))
        except Exception as error:
            raise CheckpointError(f"cannot write {path}: {_reason(error)}; earlier files are whole") from error

    def _save_backbone(self, path: Path, state: State, config: ModelConfig, extra: dict[str, str]) -> None:
        if self.ranks.is_main:
            self.teacher_staging.wait_on_host()
            save_backbone(path, state, config, extra)
            sync_folder(path.parent)

    # ---- on either

    def _together(self, work: Callable[[], T]) -> T:
        """Do it on all ranks. Raises the first error on all of them, so that none waits for one that gave up."""
        try:
            result, mine = [work()], None
        except Exception as error:
            result, mine = [], _reason(error)
        for rank, problem in enumerate(self.peers.gather_objects(mine)):
            if problem is not None:
                raise CheckpointError(problem + (f" (rank {rank})" if self.ranks.world > 1 else ""))
        return result[0]

    def _from_main(self, work: Callable[[], T]) -> T | None:
        return self.peers.gather_objects(work() if self.ranks.is_main else None)[0]


def _enter(device: torch.device) -> None:
    """A thread starts on the first GPU, whichever its process has."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, on whichever rank it did."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
