"""What a job of an evaluation does: become `dinoreg-eval`, and bring what it found to where the run's numbers are."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from dinoreg.config import ConfigError, load
from dinoreg.train.stopping import SIGNALS
from dinoreg.train.tracking import EVALUATIONS, send_evaluations
from launch.evaluations import collect
from launch.record import Start, locked
from launch.task import Task

HOLD = 15.0  # seconds that a run's directory is held to talk to wandb; a training that begins waits for a bit more


@dataclass(frozen=True)
class Evaluation(Task):
    """run: the directory that `run_dir`, where the record of this evaluation lies, is in."""

    run: str = ""
    arguments: tuple[str, ...] = ()  # of dinoreg-eval

    def words(self) -> list[str]:
        """Python looks first where it is started."""
        return ["-u", "-m", "launch.evaluating", self.folder, self.run, *self.arguments]

    def working_folder(self) -> str:
        return self.code

    def doing(self, start: Start) -> str:
        return f"dinoreg-eval {self.arguments[0]} of {Path(self.run_dir).name}"

    def advice(self) -> str:
        return "submit it again with dinoreg-launch eval"


def publish(run_dir: Path, say: Callable[[str], None] = print) -> int:
    """Put what was found into evaluations.jsonl, and into the run at wandb unless a training does that itself.

    Returns how many evaluations are new.
    """
    fresh = collect(run_dir)
    with locked(run_dir / f"{EVALUATIONS}.sending"):  # of several evaluations that end together, one at a time
        _send(run_dir, say)
    return fresh


def _send(run_dir: Path, say: Callable[[str], None]) -> None:
    from dinoreg.train.recipe import RunConfig
    from dinoreg.train.rundir import RunLock

    if not (run_dir / "config.yaml").is_file():
        return
    config = load(RunConfig, run_dir / "config.yaml")
    if config.tracking.wandb == "disabled":
        return
    try:
        lock = RunLock(run_dir, patience=0)
    except ConfigError:
        return  # the training has it, and sends what is new with its own numbers
    # Slow as the network may be, a training that starts meanwhile is not to give up.
    free = threading.Timer(HOLD, lock.close)
    free.start()
    try:
        send_evaluations(config.tracking, run_dir, asdict(config), say)
    except Exception as error:  # whatever it is, the evaluation is done
        say(f"wandb: {type(error).__name__}: {error}; the next evaluation sends this one too")
    finally:
        free.cancel()
        with suppress(ValueError):  # that is what closing it a second time is
            lock.close()


def main() -> None:
    """Of `python -m launch.evaluating FOLDER RUN_DIR` and the words of dinoreg-eval. Exits as that does."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # nobody catches them: features are kept as they come
    folder, run_dir, *words = sys.argv[1:]
    if Path(folder).is_dir():  # a container may lack it
        os.chdir(folder)
    from eval.cli import main as evaluate

    try:
        evaluate(words)
    except SystemExit as end:
        if not end.code and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            publish(Path(run_dir))
        raise


if __name__ == "__main__":
    main()
