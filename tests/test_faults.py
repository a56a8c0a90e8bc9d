"""The fault matrix of `python -m benchmarks.faults`, row by row."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.faults.lab import Lab, Outcome
from benchmarks.faults.matrix import SCENARIOS, play

# Rows that differ from another in a way that a smaller test has too; `python -m benchmarks.faults` plays all.
ALIKE = {
    *("kill-folder-0workers-1rank", "kill-shards-2workers-1rank", "kill-shards-0workers-1rank"),
    *("kill-folder-2workers-2ranks", "kill-folder-0workers-2ranks", "kill-shards-0workers-2ranks", "elastic-1-to-2"),
    *("signal-group-int", "nan-loss", "blank-images", "duplicates", "batch-of-one", "replay", "main-rank-killed"),
    *("checkpoint-cut", "checkpoint-missing", "checkpoint-manifest", "disk-full", "two-runs", "other-images"),
    *("shard-shrinks", "shard-replaced", "http-errors", "http-half-no-range", "http-down"),
}
ROWS = [row.name for row in SCENARIOS if row.name not in ALIKE]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Outcome]]]:
    """All rows that were asked for, played side by side: most of them wait for something most of the time."""
    wanted = {item.callspec.params["name"] for item in request.session.items if item.fspath == request.node.fspath}
    with Lab() as lab, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        yield {row.name: pool.submit(play, lab, row) for row in SCENARIOS if row.name in wanted}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", ROWS)
def test_a_run_survives(name: str, outcomes: dict[str, Future[Outcome]]) -> None:
    outcome = outcomes[name].result()
    if outcome.ok is None:
        pytest.skip(outcome.happened)
    assert outcome.ok, outcome.happened
