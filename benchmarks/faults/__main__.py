"""The matrix: what happens to a run under each fault, and what is lost.

    python -m benchmarks.faults [--only NAME ...] [--list] [--jobs 2] [--out FILE.json]

Every row is real: `dinoreg train` in processes of its own, on tiny data, with the fault done to it.
tests/test_faults.py asserts the same rows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from benchmarks.faults.lab import Lab, Outcome, Scenario
from benchmarks.faults.matrix import SCENARIOS, play
from benchmarks.machine import describe_machine
from dinoreg.parallel.mesh import Ranks

VERDICTS = {True: ("ok", "green"), False: ("NOT OK", "bold red"), None: ("not tried", "yellow")}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.faults", description="What happens to a run under each fault.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows, or those that begin so")
    parser.add_argument("--list", action="store_true", help="the names of all rows")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="rows at a time")
    parser.add_argument("--out", type=Path, default=Path("faults.json"), help="where the JSON goes (%(default)s)")
    args = parser.parse_args()
    scenarios = chosen(args.only)
    console = Console()
    if args.list:
        for scenario in scenarios:
            console.print(f"{scenario.name:28} {scenario.fault}", highlight=False, soft_wrap=True)
        return
    started = time.monotonic()
    rows = play_all(scenarios, args.jobs, console)
    machine = describe_machine(Ranks.alone()) | {"cores": os.cpu_count(), "seconds": round(time.monotonic() - started)}
    console.print(table(rows))
    console.print(summary(rows, machine), highlight=False)
    args.out.write_text(json.dumps({"machine": machine, "rows": [as_json(*row) for row in rows]}, indent=1))
    sys.exit(any(outcome.ok is False for _, outcome, _ in rows))


def chosen(prefixes: list[str] | None) -> list[Scenario]:
    """Raises SystemExit where a name fits nothing."""
    for prefix in prefixes or []:
        if not any(scenario.name.startswith(prefix) for scenario in SCENARIOS):
            sys.exit(f"benchmarks.faults: no row begins with {prefix}; --list shows all")
    return [scenario for scenario in SCENARIOS if scenario.name.startswith(tuple(prefixes or [""]))]


def play_all(scenarios: list[Scenario], jobs: int, console: Console) -> list[tuple[Scenario, Outcome, float]]:
    """Rows in their order, with the seconds each took."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Lab() as lab, ThreadPoolExecutor(jobs) as pool, Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("faults", total=len(scenarios))
        futures = {pool.submit(_timed, lab, scenario): scenario for scenario in scenarios}
        for future in as_completed(futures):
            bar.update(task, advance=1, description=f"{futures[future].name:<28}")
        return [(scenario, *future.result()) for future, scenario in futures.items()]


def _timed(lab: Lab, scenario: Scenario) -> tuple[Outcome, float]:
    started = time.monotonic()
    return play(lab, scenario), time.monotonic() - started


def table(rows: list[tuple[Scenario, Outcome, float]]) -> Table:
    """What people read."""
    shown = Table(box=box.ROUNDED, show_lines=True, expand=True)  # without `expand` rich takes no notice of ratios
    for title, ratio in (("fault", 4), ("what happened", 10), ("what was lost", 3)):
        shown.add_column(title, ratio=ratio, overflow="fold")
    shown.add_column("s", justify="right", no_wrap=True)
    shown.add_column("verdict", no_wrap=True)
    for scenario, outcome, seconds in rows:
        # As text: messages hold brackets, which are no markup.
        shown.add_row(
            Text(scenario.fault), Text(outcome.happened), Text(outcome.lost), f"{seconds:.0f}",
            Text(*VERDICTS[outcome.ok]),
        )  # fmt: skip
    return shown


def summary(rows: list[tuple[Scenario, Outcome, float]], machine: dict[str, Any]) -> str:
    """Counts, hardware, versions and commit."""
    verdicts = [outcome.ok for _, outcome, _ in rows]
    counts = ", ".join(f"{verdicts.count(ok)} {word}" for ok, (word, _) in VERDICTS.items() if verdicts.count(ok))
    return (
        f"{counts} in {machine['seconds']} s; {machine['device']}, {machine['cores']} cores, torch {machine['torch']}, "
        f"Python {machine['python']}, commit {machine['commit']}"
    )


def as_json(scenario: Scenario, outcome: Outcome, seconds: float) -> dict[str, Any]:
    facts = {"happened": outcome.happened, "lost": outcome.lost, "ok": outcome.ok}
    return {"name": scenario.name, "fault": scenario.fault, **facts, "seconds": round(seconds, 1)}


if __name__ == "__main__":
    main()
