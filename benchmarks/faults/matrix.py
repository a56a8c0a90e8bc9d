"""All scenarios, in the order of the table."""

from __future__ import annotations

from benchmarks.faults import checkpoints, data, numbers, resume, rundir, signals
from benchmarks.faults.compare import brief
from benchmarks.faults.lab import Lab, Outcome, Scenario

GROUPS = (resume, signals, numbers, checkpoints, rundir, data)
SCENARIOS: list[Scenario] = [scenario for group in GROUPS for scenario in group.SCENARIOS]


def play(lab: Lab, scenario: Scenario) -> Outcome:
    """One row. A scenario that itself fails is not ok."""
    try:
        return scenario.play(lab)
    except Exception as error:
        return Outcome(brief(f"{type(error).__name__}: {error}", 1500), "unknown", False)
