"""The folder of a run's checkpoints: which there are, which are whole, which are kept.

step_00000100           whole when it was written
step_00000200.partial   being written, or left by a crash; removed
step_00000200.old       being removed
step_00000200.damaged   was found damaged; kept for a person to look at, never read
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from dinoreg.parallel.mesh import Ranks
from dinoreg.train.checkpoint_files import Sums, check_file, read_manifest, read_metadata, sync_folder, write_manifest


class CheckpointFolder:
    """Of one run. The main process alone changes and lists it: a network file system may show ranks different lists."""

    def __init__(self, path: Path, keep: int, keep_every: int) -> None:
        self.path, self.keep, self.keep_every = path, keep, keep_every

    def of(self, step: int) -> Path:
        return self.path / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Of the checkpoints under their final name, ascending."""
        names = [re.fullmatch(r"step_(\d{8,})", path.name) for path in self.path.glob("step_*")]
        return sorted(int(name[1]) for name in names if name)

    def newest(self, but: Collection[int]) -> int | None:
        return max((step for step in self.steps() if step not in but), default=None)

    def has_damaged(self) -> bool:
        return any(self.path.glob("step_*.damaged"))

    def partial(self, step: int) -> Path:
        """Where the checkpoint of `step` is while it is written."""
        return _beside(self.of(step), "partial")

    def start(self, step: int) -> None:
        self.clear_leftovers()
        self.partial(step).mkdir(parents=True)

    def clear_leftovers(self) -> None:
        """Of a run that was killed, or of a save that failed."""
        for suffix in ("partial", "old"):
            for leftover in self.path.glob(f"step_*.{suffix}"):
                shutil.rmtree(leftover, ignore_errors=True)

    def commit(self, step: int, sums: Sums) -> None:
        """Give what was written its final name, and remove what need not be kept any more."""
        partial = self.partial(step)
        write_manifest(partial, sums)
        sync_folder(partial)
        final = self.of(step)
        if final.exists():  # damaged, and could not be set aside; or the run was sent back to an earlier one
            final.rename(_beside(final, "old"))
        partial.rename(final)
        sync_folder(self.path)
        self._retire()

    def _retire(self) -> None:
        for step in self.steps()[: -self.keep]:
            if self.keep_every == 0 or step % self.keep_every:
                with suppress(OSError):  # takes room, and harms nobody; the next save tries again
                    self.of(step).rename(_beside(self.of(step), "old"))
        for leftover in self.path.glob("step_*.old"):
            shutil.rmtree(leftover, ignore_errors=True)

    @staticmethod
    def problem_of(folder: Path, ranks: Ranks) -> str | None:
        """What is wrong with a checkpoint, if anything. Collective: each rank reads its share of the files."""
        sums, problem = _read(folder) if ranks.is_main else ({}, None)
        sums, problem = ranks.gather_objects((sums, problem))[0]
        for name in sorted(sums)[ranks.rank :: ranks.world]:
            if problem is None:
                problem = _problem_of(folder / name, *sums[name])
        return next(filter(None, ranks.gather_objects(problem)), None)

    def set_aside(self, step: int) -> None:
        """Let nobody take a damaged one for whole."""
        folder = self.of(step)
        with suppress(OSError):
            shutil.rmtree(_beside(folder, "damaged"), ignore_errors=True)
            folder.rename(_beside(folder, "damaged"))


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")


def _read(folder: Path) -> tuple[Sums, str | None]:
    try:
        sums = read_manifest(folder)
        read_metadata(folder)
    except ValueError as error:
        return {}, str(error)
    return sums, None


def _problem_of(path: Path, size: int, crc: int) -> str | None:
    try:
        check_file(path, size, crc)
    except ValueError as error:
        return str(error)
    return None
