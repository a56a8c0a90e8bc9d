"""Ranks that watch each other: one that dies, hangs or fails ends the others within a set time, with its name."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from dataclasses import dataclass
from types import TracebackType

import torch.distributed as dist

from dinoreg.config import ConfigError
from dinoreg.parallel.judge import ADVICE, ALIVE, LEFT, LOST, STARTING, WITH_OTHERS, Beat, Judge
from dinoreg.parallel.mesh import Ranks

logger = logging.getLogger("dinoreg")

EXIT_PEER = 76  # another rank died, hangs or failed, and one line said which
LONGEST_BEAT = 5.0  # seconds; 1,000 ranks are then 400 small requests a second to the store


@dataclass
class WatchConfig:
    """When a rank that gives no sign, or none of progress, ends the run."""

    silence: float = 60.0  # seconds without a heartbeat after which a rank counts as dead or frozen
    stall: float = 1500.0  # seconds without progress on any rank; below the 30 minutes after which NCCL aborts unnamed

    def check(self) -> None:
        """Raises ConfigError on a time too short for what it has to tell apart."""
        if self.silence < 1:
            raise ConfigError(f"must be at least a second, not {self.silence:g}", key="silence")
        if self.stall < self.silence:
            raise ConfigError(f"must be at least watch.silence {self.silence:g}, not {self.stall:g}", key="stall")


class Watch:
    """Context manager around a run, one per rank; does nothing alone.

    A thread writes a beat of this rank to the store and reads those that it judges: the main rank's those of all, the
    others' that of the main rank. Who finds something writes the verdict; every rank that reads one prints it and ends
    with EXIT_PEER, whatever its main thread is stuck in.

    Handlers of SIGTERM must outlive it (`with handlers, Watch(...)`): launchers send one to who waits for the verdict.

    together: exceptions that all ranks raise at the same place, after which each leaves as at the end of a run. Any
    other is told to the others, who end with it; so is none that `Ranks.from_main` raises.
    """

    def __init__(self, ranks: Ranks, cfg: WatchConfig, together: tuple[type[BaseException], ...] = ()) -> None:
        self.ranks, self.cfg, self.together = ranks, cfg, together
        self.beat = min(cfg.silence / 6, LONGEST_BEAT)
        self._store: dist.Store  # where there are peers
        self._mark = (0, STARTING)
        self._host, self._number = socket.gethostname(), 0
        self._seen_mark, self._moved = self._mark, 0.0
        self._state, self._why = ALIVE, ""
        # Seconds that this process was awake: one stopped for an hour must not take the others for silent.
        self._awake = self._answered = 0.0
        self._hurry, self._alone, self._stop, self._done = (threading.Event() for _ in range(4))
        self._ending = threading.Lock()
        watched = range(ranks.world) if ranks.is_main else [0]
        self._judge = Judge(watched, beat=self.beat, silence=cfg.silence, stall=cfg.stall)

    def mark(self, step: int, doing: str) -> None:
        """This rank begins something; marked again, it goes on with it. Costs a tenth of a microsecond."""
        self._mark = (step, doing)

    def __enter__(self) -> Watch:
        if self.ranks.store is not None:
            # A connection of its own: whoever waits for a key holds the shared one.
            self._store = dist.PrefixStore("watch", self.ranks.store).clone()  # type: ignore[attr-defined]
            self._watcher = threading.Thread(target=self._watch, name="watch", daemon=True)
            self._watcher.start()
            threading.Thread(target=self._count, name="watch-clock", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.ranks.store is None:
            return
        if error is not None and lost_peers(error):
            self._wait_for_verdict(error)
        try:
            if error is None or isinstance(error, self.together) or getattr(error, "together", False):
                self._leave(error)
            else:
                self._fail(error)
        except Exception as trouble:
            if error is None:
                self._store_gone(trouble)
        self._done.set()

    # The end, as the main thread comes to it.

    def _wait_for_verdict(self, error: BaseException) -> None:
        """A peer that vanished is seen here first; who it was, the judge finds: the process ends in this wait."""
        self._why = one_line(error)
        self._state = LOST
        self._hurry.set()
        self._watcher.join(self.cfg.silence)

    def _leave(self, error: BaseException | None) -> None:
        """Say goodbye. The main rank goes last, for it may be its process that the others' store lives in."""
        if self.ranks.is_main:
            self.mark(self._mark[0], WITH_OTHERS)
            self._hurry.set()
            self._alone.wait()
        self._stop_watching()
        self._why = one_line(error) if error is not None else ""
        self._write(LEFT)

    def _fail(self, error: BaseException) -> None:
        self._stop_watching()  # this rank ends by its own error, not by the verdict
        self._why = one_line(error)
        self._tell(f"{self._me().who(self.ranks.rank)} failed: {self._why}")
        self._linger()

    def _stop_watching(self) -> None:
        self._stop.set()
        self._hurry.set()
        self._watcher.join()

    # The threads.

    def _count(self) -> None:
        """The clock, and the guard of the other thread: a request to a store that is frozen may never return."""
        pulse = self.beat / 5
        while not self._done.wait(pulse):
            self._awake += pulse
            if self._awake - self._answered > self.cfg.silence + self.beat:
                self._store_gone(None)

    def _watch(self) -> None:
        try:
            for key in ("verdict", *self._judge.keys):
                self._store.compare_set(key, "", "")  # now it can be read without waiting
            while not self._stop.is_set():
                if verdict := self._look():
                    self._end(verdict)
                self._pause()
        except Exception as error:  # a watch that fails in silence would be none
            self._store_gone(error)

    def _pause(self) -> None:
        if self._hurry.is_set():
            self._stop.wait(self.beat / 5)
        else:
            self._hurry.wait(self.beat)

    def _look(self) -> str:
        """One beat: write, read, judge."""
        self._write(self._state)
        verdict, *beats = self._store.multi_get(["verdict", *self._judge.keys])
        self._answered = self._awake
        found = self._judge(beats, self._awake, lost=self._state == LOST)
        if self._judge.alone():
            self._alone.set()
        if verdict or not found:
            return str(verdict, "utf-8")
        return self._tell(found)

    # What they say.

    def _me(self) -> Beat:
        if self._mark is not self._seen_mark:  # a new mark is a new tuple, even if it says the same
            self._seen_mark, self._moved = self._mark, self._awake
        self._number += 1
        return Beat(self._number, self._host, os.getpid(), *self._seen_mark, self._awake - self._moved, self._why)

    def _write(self, state: bytes) -> None:
        self._store.set(f"beat/{self.ranks.rank}", self._me().text(state))

    def _tell(self, verdict: str) -> str:
        """The verdict that counts: the first."""
        return str(self._store.compare_set("verdict", "", verdict), "utf-8")

    def _store_gone(self, error: Exception | None) -> None:
        main = self._judge.last_of(0)
        how = f"no answer for {self.cfg.silence:.0f} s" if error is None else one_line(error)
        who = f"{main.who(0)}, or the launcher that keeps the store of the ranks, is gone: {how}"
        self._end(f"{who}; last seen {main.what()}. {ADVICE}", linger=False)

    def _end(self, verdict: str, linger: bool = True) -> None:
        self._ending.acquire()  # never released: one thread ends the process, and the other stays here
        # Whatever happens: the log may lie on the file system that hangs.
        late = threading.Timer(3 * self.beat + 10, os._exit, (EXIT_PEER,))
        late.daemon = True
        late.start()
        # To the terminal by hand, with the cursor that a progress bar hides; the logger's own handlers may be stuck.
        os.write(2, f"{chr(27) + '[?25h' + chr(10) if os.isatty(2) else ''}{verdict}\n".encode())
        logger.debug(verdict)
        for handler in logger.handlers:
            handler.flush()
        if linger:
            self._linger()
        os._exit(EXIT_PEER)

    def _linger(self) -> None:
        """Say goodbye; the main rank lets the others read the verdict before it takes the store away."""
        try:
            self._write(LEFT)
            for _ in range(15 if self.ranks.is_main else 0):
                self._judge(self._store.multi_get(self._judge.keys), self._awake)
                if self._judge.alone(self._awake, 2 * self.beat):
                    return
                time.sleep(self.beat / 5)
        except Exception:  # the store has gone meanwhile, and with it whoever could read
            return


def lost_peers(error: BaseException) -> bool:
    """Whether this is how a rank sees that another has vanished: an error of the transport, or one caused by it."""
    chain: BaseException | None = error
    while chain is not None:
        # Of plain RuntimeErrors only the transport's: a broken connection to a data server is another matter.
        if isinstance(chain, dist.DistError) or (
            type(chain) is RuntimeError and re.search(r"gloo|nccl|c10d|TCPStore", str(chain), re.IGNORECASE)
        ):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__
