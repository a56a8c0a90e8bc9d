"""Evaluate the teachers of runs as they appear."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from launch import jobs
from launch.evaluate import WAITING, Plan, Target, submit, survey
from launch.evaluating import publish
from launch.slurm import NoAnswer
from launch.snapshot import Snapshot, take_snapshot


def follow(plan: Plan, every: float, say: Callable[[str], None]) -> bool:
    """Submit each teacher when it is there, until the runs have ended; whether all are evaluated then.

    What failed is not submitted a second time here. every: seconds between two looks. Raises ConfigError at the first;
    later on a Slurm that does not answer is asked again.
    """
    following = Following(plan, say)
    goes_on, trouble = following.look(), ""
    while goes_on:
        time.sleep(every)
        try:
            goes_on, trouble = following.look(), ""
        except NoAnswer as error:
            if str(error) != trouble:
                say(f"{error}; trying again")
            trouble = str(error)
    for run in plan.runs:
        publish(run, say)
    return all(target.evaluated for target in plan.targets())


class Following:
    """say: is told whatever changes."""

    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        self.plan, self.say = plan, say
        self.code: Snapshot | None = None
        self.told: dict[Path, str] = {}  # of what was submitted already, in which state it was last

    def look(self) -> bool:
        """Submit what is new, and say what has changed; whether there is anything left to wait for."""
        goes_on = jobs.in_use(self.plan.runs)  # before looking: what comes later is seen next time
        targets = self.plan.targets()
        self._submit([target for target in targets if target.folder not in self.told])
        states = survey(targets)
        for target, state in states.items():
            if self.told.get(target.folder) != state:
                self.told[target.folder] = state
                self.say(f"{target.run.name} step {target.step}: {state}")
        if goes_on and not self.told:
            self.told[self.plan.folder] = ""
            self.say(f"{self.plan.folder.name} has no teacher yet; waiting for the first")
        return goes_on or any(state in WAITING for state in states.values())

    def _submit(self, fresh: list[Target]) -> None:
        if any(not target.evaluated for target in fresh):
            self.code = self.code or take_snapshot(self.plan.folder)
            submit(self.plan, fresh, self.code)
