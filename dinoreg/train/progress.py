"""What a person sees of a running training: a bar on a terminal, aligned lines in a log file."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

UNTIMED_STEPS = 3  # the first steps compile, warm caches and start workers: their pace says nothing
WINDOW = 200  # steps over which the pace is measured, so that a k-NN or a checkpoint weighs as much as it costs


class Pace:
    """Seconds a step, over the latest WINDOW steps and without the first UNTIMED_STEPS."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._calls = 0
        self._seen: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    def mark(self, step: int) -> None:
        """`step` steps are done now."""
        self._calls += 1
        if self._calls > UNTIMED_STEPS:
            self._seen.append((step, self._clock()))

    def seconds_for(self, steps: int) -> float | None:
        """Expected seconds for so many steps more; None while there is nothing to judge by."""
        if len(self._seen) < 2:
            return None
        (first, begun), (last, now) = self._seen[0], self._seen[-1]
        return steps * (now - begun) / (last - first) if last > first else None


class Progress:
    """Shows how far a run is. Only the main rank makes one.

    `update` may be called every step (cheap) and gets the metrics at logging steps, when a log file gets its line.
    """

    def __init__(self, total_steps: int, start_step: int = 0, console: Console | None = None) -> None:
        self.total_steps = total_steps
        self._console = console or Console()
        self._pace = Pace()
        self._latest: dict[str, float] = {}
        self._bar: Bar | None = None
        if self._console.is_terminal:
            self._bar = Bar(
                BarColumn(bar_width=None),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[facts]}", markup=False),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, facts="starting")
            self._bar.start()

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """`step` steps are done; `metrics` under the names of metrics.jsonl."""
        self._pace.mark(step)
        eta = _duration(self._pace.seconds_for(self.total_steps - step))
        if self._bar is not None:
            self._latest.update(metrics or {})  # a k-NN stays visible until the next one
            facts = "  ".join(" ".join(fact.split()) for fact in [*bar_facts(self._latest), f"ETA {eta}"])
            self._bar.update(self._task, completed=step, facts=facts)
        elif metrics is not None:
            self._print(log_line(step, self.total_steps, metrics, eta))

    def say(self, text: str) -> None:
        """A line for the reader: above the bar, or into the log."""
        self._print(text)

    def close(self) -> None:
        """Leave the terminal as it was; may be called twice."""
        if self._bar is not None:
            self._bar.stop()

    def _print(self, text: str) -> None:
        # Plain: rich would break lines at 80 columns in a log and colour the numbers.
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)


def bar_facts(metrics: Mapping[str, float]) -> list[str]:
    """The few numbers that fit behind a bar."""
    facts = [f"loss {metrics['loss/total']:.3f}"] if "loss/total" in metrics else []
    if (value := metrics.get("knn/top1")) is not None:
        facts.append(f"k-NN {value:.1%}")
    return facts + _speed(metrics)


def log_line(step: int, total: int, metrics: Mapping[str, float], eta: str) -> str:
    """One line a logging step; columns keep their place so that the eye can run down them."""
    parts = [f"step {step:>{len(str(total))}}/{total}"]
    parts += [f"{label} {metrics[name]:7.4f}" for name, label in _LOSSES.items() if name in metrics]
    if "lr" in metrics:
        parts.append(f"lr {metrics['lr']:.2e}")
    parts += _speed(metrics)
    parts.append(f"eta {eta}")
    if (value := metrics.get("knn/top1")) is not None:
        parts.append(f"k-NN {value:.1%}")
    return " | ".join(parts)


_LOSSES = {
    "loss/total": "loss",
    "loss/dino_global": "global",
    "loss/dino_local": "local",
    "loss/ibot": "ibot",
    "loss/koleo": "koleo",
}


def _speed(metrics: Mapping[str, float]) -> list[str]:
    facts = []
    if "throughput/images_per_second" in metrics:
        facts.append(f"{metrics['throughput/images_per_second']:6.1f} img/s")
    if "throughput/data_wait_share" in metrics:
        facts.append(f"data wait {metrics['throughput/data_wait_share']:4.0%}")
    mfu = metrics.get("throughput/mfu", math.nan)
    if math.isfinite(mfu):  # unknown where the device's peak is
        facts.append(f"MFU {mfu:5.1%}")
    return facts


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
