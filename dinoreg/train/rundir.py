"""Whose run directory this is: one run at a time, and the same run as before."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from dinoreg.config import ConfigError, load
from dinoreg.parallel.mesh import Ranks
from dinoreg.train.recipe import RunConfig, is_free

PATIENCE = 20.0  # seconds for the last job of a run to end, when the next is started at once


class RunLock:
    """Holds a run directory for one run; the kernel lets go of it however the process ends, so it is never stale.

    Raises ConfigError when another run has the directory, OSError when nothing can be written there.
    """

    def __init__(self, run_dir: Path, patience: float = PATIENCE) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / "lock"
        self._file = self.path.open("a+", encoding="utf-8")
        deadline, said = time.monotonic() + patience, False
        while not self._taken():
            if patience and not said:
                print(f"{run_dir} is in use by {self._owner()}; waiting up to {patience:.0f} s", file=sys.stderr)
                said = True
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{run_dir} is in use by {self._owner()}; wait for it, end it, or give another", key="run_dir"
                )
            time.sleep(0.2)
        self._file.truncate(0)
        job = f", Slurm job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}{job}, since {since}\n")
        self._file.flush()

    def _taken(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True  # a file system without locks: better unprotected than unusable
        return True

    def _owner(self) -> str:
        self._file.seek(0)
        return self._file.read().strip() or "another run"

    def close(self) -> None:
        """Let go of the directory."""
        self._file.truncate(0)
        self._file.close()


@contextmanager
def claimed(cfg: RunConfig, ranks: Ranks) -> Iterator[None]:
    """Hold the run directory, which must be free and this run's own. Only the main process looks.

    Raises ConfigError or OSError there; the others leave in silence.
    """
    run_dir = Path(cfg.run_dir)
    with ExitStack() as held:

        def claim() -> None:
            held.callback(RunLock(run_dir).close)
            refuse_changes(run_dir / "config.yaml", cfg)

        ranks.from_main(claim)
        yield


def changes(written: Path, cfg: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Option -> (was, is), where the configuration that a run was started with and `cfg` differ."""
    try:
        before = load(RunConfig, written)
    except ConfigError as error:
        raise ConfigError(f"{written} is damaged: {error}", key="run_dir") from None
    old, new = _flat(before), _flat(cfg)
    return {key: (old[key], new[key]) for key in new if new[key] != old[key]}


def refuse_changes(written: Path, cfg: RunConfig) -> None:
    """Raises ConfigError, key by key, when options differ that would make it another run; not where none was saved."""
    if not any(re.fullmatch(r"step_\d+", path.name) for path in written.parent.glob("checkpoints/step_*")):
        return
    if not written.is_file():
        raise ConfigError(
            f"{cfg.run_dir} has checkpoints but no config.yaml, so whose they are cannot be told. Give a new run_dir "
            f"with train.go_on_from={cfg.run_dir}",
            key="run_dir",
        )
    other = {key: pair for key, pair in changes(written, cfg).items() if not is_free(key)}
    if other:
        listed = ", ".join(f"{key}={now} (was {before})" for key, (before, now) in other.items())
        raise ConfigError(
            f"{cfg.run_dir} belongs to a run with other options: {listed}. Give the old ones, or a new run_dir with "
            f"train.go_on_from={cfg.run_dir} to go on from its last checkpoint under the new ones",
            key="run_dir",
        )


def _flat(part: Any, prefix: str = "") -> dict[str, Any]:
    """Options by dotted key."""
    if not is_dataclass(part):
        return {prefix[:-1]: part}
    return {k: v for f in fields(part) for k, v in _flat(getattr(part, f.name), f"{prefix}{f.name}.").items()}
