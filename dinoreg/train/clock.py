"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """What happened since the last reading."""

    images_per_second: float
    data_wait_share: float  # of the training time


class Clock:
    """Images a second of training alone: saving, k-NN and pictures are left out, waiting for data is told apart."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._images = 0
        self._waited = self._paused = 0.0

    def count(self, images: int) -> None:
        self._images += images

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent for the next batch."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def read(self) -> Interval:
        """The pace since the last reading; starts a new interval."""
        elapsed = max(time.perf_counter() - self._start - self._paused, 1e-9)
        interval = Interval(self._images / elapsed, min(self._waited / elapsed, 1.0))
        self._restart()
        return interval
