"""What a suite is given to work with: where its data are, who computes, where things go, how to speak."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dinoreg.config import ConfigError
from dinoreg.parallel.mesh import Ranks

LINE_EVERY = 20.0  # seconds between two lines of progress in a log file


@dataclass(frozen=True)
class Place:
    """What --data said: a folder with its parts inside, or each part by itself (train=DIR, test=DIR, ...)."""

    root: Path | None = None
    parts: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(words: Sequence[str]) -> Place:
        """Raises ConfigError where there is neither one folder nor parts with names."""
        roots = [word for word in words if Path(word).exists()]
        parts = {}
        for word in words:
            found = re.fullmatch(r"(\w+)=(.+)", word)
            if word in roots:
                continue
            if found is None:
                raise ConfigError(f"no such file or folder: {word}", "--data")
            parts[found.group(1)] = found.group(2)
        if len(roots) + bool(parts) != 1:
            raise ConfigError("give one folder, or parts such as train=DIR and test=DIR", "--data")
        return Place(Path(roots[0]) if roots else None, parts)

    def __str__(self) -> str:
        return str(self.root) if self.root else ", ".join(f"{name}={path}" for name, path in self.parts.items())


@dataclass
class Context:
    """Everything around a suite. output: the folder of its results; cache: a folder that all suites share."""

    ranks: Ranks
    data: Place
    output: Path
    cache: Path
    workers: int = 0  # processes a rank that decode images
    weights: Path | None = None  # the file, folder or run directory that the backbone is of
    console: Console = field(default_factory=lambda: Console(file=sys.stderr))

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    def say(self, text: str) -> None:
        """A line for the reader, once for all ranks."""
        if self.ranks.is_main:
            self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    @contextmanager
    def progress(self, what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        """A bar with the time left on a terminal, else a line now and then. What it yields is told how much is new."""
        if not self.ranks.is_main:
            yield lambda _: None
        elif self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            with Progress(*columns, TimeRemainingColumn(), console=self.console) as bar:
                task = bar.add_task(what, total=total, completed=done)
                yield lambda new: bar.advance(task, new)
        else:
            yield _Lines(self.say, what, total, done)


class _Lines:
    """Progress in a log file."""

    def __init__(self, say: Callable[[str], None], what: str, total: int, done: int) -> None:
        self._say, self._what, self._total, self._done, self._new = say, what, total, done, 0
        self._start = self._said = time.monotonic()

    def __call__(self, new: int) -> None:
        self._new += new
        now = time.monotonic()
        if now - self._said < LINE_EVERY:
            return
        self._said = now
        reached = self._done + self._new
        left = round((now - self._start) * (self._total - reached) / max(1, self._new))
        self._say(f"{self._what}: {reached} of {self._total}, {left // 60}:{left % 60:02d} left")
