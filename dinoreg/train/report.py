"""What a run tells those who watch it: metrics.jsonl, wandb, the progress bar, and the doctor's findings."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from dinoreg.config import to_yaml
from dinoreg.train.about import About
from dinoreg.train.doctor import diagnose
from dinoreg.train.progress import Progress
from dinoreg.train.recipe import RunConfig
from dinoreg.train.stopping import Stopped
from dinoreg.train.tracking import Tracker

logger = logging.getLogger("dinoreg")

REMEMBERED = 500  # records that the doctor looks back on


class Report:
    """Speaks on the main process and is silent on the others. A context manager, so that an error closes everything."""

    def __init__(self, cfg: RunConfig, total_steps: int, start: About, num_samples: int | None, speaks: bool) -> None:
        """start: what the checkpoint that the run goes on from says of it."""
        self.cfg, self.num_samples = cfg, num_samples
        self.history: deque[dict[str, float]] = deque(maxlen=REMEMBERED)
        self.found: set[str] = set()
        self.tracker = self.progress = None
        if speaks:
            run_dir = Path(cfg.run_dir)
            run_dir.mkdir(parents=True, exist_ok=True)
            fresh = run_dir / "config.yaml.new"
            fresh.write_text(to_yaml(cfg))
            fresh.replace(run_dir / "config.yaml")  # at once: what it says guards the run's checkpoints
            self.tracker = Tracker(cfg.tracking, run_dir, asdict(cfg), start.step, logger.info, start.wandb)
            self.progress = Progress(total_steps, start.step)

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.tracker is not None and self.progress is not None:
            self.progress.close()
            self.tracker.close(failed=kind not in (None, Stopped))

    def sync(self) -> None:
        """Put on the disk what was recorded; a checkpoint must not survive the readings before it."""
        if self.tracker is not None:
            self.tracker.sync()

    def step_done(self, step: int) -> None:
        """Move the progress bar; cheap."""
        if self.progress is not None:
            self.progress.update(step)

    def record(self, step: int, numbers: dict[str, float]) -> None:
        """Write what was measured after `step` steps, and say what the doctor newly makes of it."""
        if self.tracker is None or self.progress is None:
            return
        images = step * self.cfg.train.batch_size
        epoch = {"epoch": images / self.num_samples} if self.num_samples else {}
        numbers = {"step": step, "images": images, **epoch, **numbers}
        self.tracker.log(step, numbers)
        self.progress.update(step, numbers)
        self.history.append(numbers)
        findings = diagnose(self.history)
        for finding in findings:
            if finding.name not in self.found:
                self.progress.say(f"step {step}: {finding}")
        self.found = {finding.name for finding in findings}

    def picture(self, step: int, name: str, path: Path) -> None:
        """Pass on a PNG that lies in the run directory."""
        if self.tracker is not None:
            self.tracker.log_picture(step, name, path)
