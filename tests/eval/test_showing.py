"""What the terminal shows at the end."""

from __future__ import annotations

import pytest

from eval.results import Result, Score
from eval.running import show


def test_notes_that_suites_share_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    results = [
        Result("knn", {"top1": Score(81.23, 80, 82.5)}, {}, {}, ["quick", "only knn"]),
        Result(
            "nyud", {"rmse": Score(0.3333, 0.31, 0.35, "m", "lower"), "delta1": Score(90, 89, 91)}, {}, {}, ["quick"]
        ),
    ]
    show(results, "some[red].pth")
    lines = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "some[red].pth"  # and is no markup
    assert "knn top1 81.2 % 80.0 to 82.5" in lines
    assert "nyud rmse 0.333 m 0.310 to 0.350" in lines
    assert "delta1 90.0 % 89.0 to 91.0" in lines
    assert lines[-2:] == ["knn, nyud: quick", "knn: only knn"]
