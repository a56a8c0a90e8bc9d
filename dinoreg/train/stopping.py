"""Requests to stop: signals and the time limit. They are noted at once and heeded between two steps."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from dinoreg.config import ConfigError

AGAIN = 2.0  # seconds in which a second signal is taken for the same one: Slurm and torchrun both pass one on
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not done, try again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}


class Stopped(Exception):
    """The run was asked to stop, and did so with everything saved."""


def parse_time(text: str) -> float:
    """Seconds of a time such as 3h50m, 90s, 1.5h or 2d12h. Raises ConfigError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text.replace(" ", ""))
    if not parts or "".join(number + unit for number, unit in parts) != text.replace(" ", ""):
        raise ConfigError(f"not a time: '{text}'; write it as 3h50m, 90s or 2d12h")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


class StopRequests:
    """Context manager; `reason` says why the run should stop, in words, or is None.

    Signals are read from a pipe into which the interpreter's C handler writes their numbers: Python's own handlers wait
    for the main thread, which may be in a collective for minutes, and a second signal must end the process at once.
    The time limit counts from here. Outside of the main thread signals are left alone, as Python asks.
    """

    def __init__(self, time_limit: float | None = None) -> None:
        self._signal: str | None = None
        self._noted_at = 0.0
        self._deadline = None if time_limit is None else time.monotonic() + time_limit
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str | None:
        if self._signal is None and self._deadline is not None and time.monotonic() > self._deadline:
            return "train.time_limit"
        return self._signal

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._previous_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._previous = {number: signal.signal(number, _noted) for number in SIGNALS}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a launcher may have held them back until now
            threading.Thread(target=self._listen, args=(self._reader,), daemon=True, name="signals").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._previous_wakeup)
            os.close(self._writer)  # which ends the thread
            self._previous = {}

    def _listen(self, reader: int) -> None:
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] not in SIGNALS:
                    continue
                if self._signal is not None:
                    if time.monotonic() > self._noted_at + AGAIN:
                        _end_at_once(number[0])
                    continue
                self._signal, self._noted_at = signal.Signals(number[0]).name, time.monotonic()
                say = f"\n{self._signal}: stopping after this step; once more to stop at once, without saving\n"
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, say.encode())


def _noted(number: int, frame: FrameType | None) -> None:
    """The pipe has it already."""


def _end_at_once(number: int) -> None:
    if sys.__stderr__ is not None and sys.__stderr__.isatty():
        os.write(2, b"\x1b[?25h")  # the cursor, which the progress bar hides
    os._exit(128 + number)
