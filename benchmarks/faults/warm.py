"""Starts of `dinoreg` without the seconds of CPU that importing torch takes each time.

One process imports everything and then waits; each start is a fork of it, in a session of its own, with the arguments,
the environment and the output that a start from a shell would have, and an interpreter's own end. From the first line
of `dinoreg.cli.main` on it is the same program.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

_REQUESTS, _REPLIES = 0, 1  # file descriptors of the waiting process


class Child:
    """One start; what `subprocess.Popen` has of pid, poll and wait."""

    def __init__(self) -> None:
        self.pid = 0
        self.started, self.ended = threading.Event(), threading.Event()
        self._code: int | None = None

    def poll(self) -> int | None:
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        if not self.ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return self._code or 0

    def end(self, code: int) -> None:
        self._code = code
        self.ended.set()


class Warm:
    """The waiting process, seen from outside. A thread of this process listens to it."""

    def __init__(self, env: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "benchmarks.faults.warm"]
        self._process = subprocess.Popen(command, env=dict(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._numbers, self._lock = itertools.count(), threading.Lock()
        self._asked: dict[int, Child] = {}
        self._living: dict[int, Child] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, arguments: Sequence[str], env: Mapping[str, str], out: Path, inject: str | None = None) -> Child:
        """`dinoreg` with these arguments; what it prints goes to `out`. Raises RuntimeError where nothing starts."""
        child = Child()
        out.touch()  # readable from now on
        with self._lock:
            number = next(self._numbers)
            self._asked[number] = child
            request = {"number": number, "arguments": list(arguments), "env": dict(env), "out": str(out)}
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request | {"inject": inject}).encode() + b"\n")
            self._process.stdin.flush()
        if not child.started.wait(120):
            raise RuntimeError("the process that starts others does not answer")
        return child

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            kind, first, second = line.split()
            if kind == b"started":
                child = self._asked.pop(int(first))
                child.pid = int(second)
                self._living[child.pid] = child
                child.started.set()
            else:
                self._living.pop(int(first)).end(int(second))


def _serve() -> dict[str, object] | None:
    """Forks for each request. Returns in the child with its request, and with nothing when there are no more."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    waiting = b""
    while True:
        ready, _, _ = select.select([_REQUESTS, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _tell_ended()
        if _REQUESTS not in ready:
            continue
        data = os.read(_REQUESTS, 1 << 16)
        if not data:
            return None
        *lines, waiting = (waiting + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.close(woken)
                os.close(wake)
                return request
            os.write(_REPLIES, f"started {request['number']} {pid}\n".encode())


def _tell_ended() -> None:
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            os.write(_REPLIES, f"ended {found[0]} {os.waitstatus_to_exitcode(found[1])}\n".encode())


def _become(env: Mapping[str, str], out: str) -> None:
    """What a shell does between fork and exec."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(env)
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]


def _main() -> None:
    # All that a start imports; nothing of it may have started a thread, which a fork would lose.
    import dinoreg.train.trainer  # noqa: F401
    from benchmarks.faults import inject
    from dinoreg.cli import main

    assert len(os.listdir("/proc/self/task")) == 1, "a thread was started by an import"  # noqa: PTH208
    gc.freeze()
    request = _serve()
    if request is None:
        return
    _become(request["env"], request["out"])  # type: ignore[arg-type]
    if request["inject"]:
        inject.install(inject.parse(str(request["inject"])))
    main(request["arguments"])  # type: ignore[arg-type]


if __name__ == "__main__":
    _main()
