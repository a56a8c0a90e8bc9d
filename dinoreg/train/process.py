"""What surrounds the loop in every process of a run: its logs, and when memory is tidied."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from dinoreg.parallel.mesh import Ranks

logger = logging.getLogger("dinoreg")


@contextmanager
def unhurried_garbage_collection() -> Iterator[Callable[[], int]]:
    """Collect at logging steps only: a collection in mid-step stalls one rank, and with it all others."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.enable()
        gc.unfreeze()


class _Terminal(logging.StreamHandler[TextIO]):
    """Looks up sys.stderr for each line: while the progress bar is shown, it has put its own there."""

    def emit(self, record: logging.LogRecord) -> None:
        self.setStream(sys.stderr)
        super().emit(record)


class _File(logging.FileHandler):
    """A full disk costs lines of the log, not the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Silence: the terminal has the line too."""


@contextmanager
def logging_to(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Everything to logs/rank<r>.log; what a person should read to the terminal of the main process."""
    folder.mkdir(parents=True, exist_ok=True)
    file = _File(folder / f"rank{ranks.rank}.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    terminal = _Terminal()
    terminal.setLevel(logging.INFO if ranks.is_main else logging.ERROR)
    handlers: list[logging.Handler] = [file, terminal]
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
