"""The bar, the log lines and the expected time."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from dinoreg.train.progress import UNTIMED_STEPS, WINDOW, Pace, Progress, _duration, log_line

METRICS = {
    "loss/total": 10.5,
    "loss/ibot": 5.25,
    "lr": 1e-3,
    "throughput/images_per_second": 123.4,
    "throughput/data_wait_share": 0.031,
    "throughput/mfu": 0.412,
}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_pace_leaves_out_the_first_steps() -> None:
    clock = Clock()
    pace = Pace(clock)
    for step in range(1, 20):
        clock.now += 60.0 if step <= UNTIMED_STEPS + 1 else 0.5
        pace.mark(step)
    assert pace.seconds_for(10) == pytest.approx(5.0)


def test_pace_forgets_and_knows_when_it_knows_nothing() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.seconds_for(10) is None
    for step in range(1, 3 * WINDOW):
        clock.now += 1.0 if step < WINDOW else 0.25
        pace.mark(step)
    assert pace.seconds_for(100) == pytest.approx(25.0)


def test_pace_counts_steps_not_calls() -> None:
    clock = Clock()
    pace = Pace(clock)
    for step in range(10, 200, 10):  # called every tenth step, as without a terminal
        clock.now += 10 * 0.5
        pace.mark(step)
    assert pace.seconds_for(4) == pytest.approx(2.0)


def test_log_file_gets_one_aligned_line_a_logging_step() -> None:
    out = io.StringIO()
    progress = Progress(1000, console=Console(file=out, width=40))
    for step in range(1, 31):
        progress.update(step, METRICS if step % 10 == 0 else None)
    progress.say("doctor: [bold]all[/bold] is well")
    progress.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 4  # the width of a log is no reason to break a line
    assert lines[0].startswith(
        "step   10/1000 | loss 10.5000 | ibot  5.2500 | lr 1.00e-03 |  123.4 img/s | data wait   3%"
    )
    assert {line.index("| loss") for line in lines[:3]} == {15}
    assert "MFU 41.2%" in lines[0] and "eta 0:00:0" in lines[2]
    assert lines[3] == "doctor: [bold]all[/bold] is well"
    assert "\x1b" not in out.getvalue()


def test_unknown_mfu_and_absent_terms_are_left_out() -> None:
    line = log_line(5, 10, {"loss/total": 1.0, "throughput/mfu": math.nan, "knn/top1": 0.5}, "0:00:01")
    assert line == "step  5/10 | loss  1.0000 | eta 0:00:01 | k-NN 50.0%"


def test_bar_on_a_terminal() -> None:
    out = io.StringIO()
    progress = Progress(50, start_step=20, console=Console(file=out, force_terminal=True, width=120))
    progress.update(21, {**METRICS, "knn/top1": 0.625})
    progress.update(22, METRICS)
    progress.update(23)
    progress.say("a word in between")
    progress.close()
    progress.close()
    text = out.getvalue()
    for expected in ("23/50", "loss 10.500", "123.4 img/s", "data wait 3%", "MFU 41.2%", "ETA ", "a word in between"):
        assert expected in text, expected
    assert "k-NN 62.5%" in text.rsplit("23/50", 1)[1]
    assert "step 22/50" not in text  # no log lines beside the bar


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-:--:--"), (59.6, "0:01:00"), (3661, "1:01:01"), (360000, "100:00:00")]
)
def test_duration(seconds: float | None, text: str) -> None:
    assert _duration(seconds) == text
