"""Exact resume: killed at any moment, and on other numbers of ranks."""

from __future__ import annotations

import random
import time
from collections import Counter
from functools import partial

from benchmarks.faults.lab import (
    IMAGES,
    RECIPE,
    STEPS,
    Lab,
    Outcome,
    Scenario,
    difference,
    judge,
    same,
    went_on_from,
)
from dinoreg.config import load
from dinoreg.data.loader import BatchMaker
from dinoreg.data.masks import MaskConfig
from dinoreg.data.sources import StoredEntry, open_sources
from dinoreg.train.recipe import RunConfig

BATCH = 8  # of the recipe


def killed(lab: Lab, data: str, workers: int, ranks: int) -> Outcome:
    """SIGKILL after a few steps and again while a checkpoint is written, then to the end."""
    rng = random.Random(f"{data} {workers} {ranks}")
    run_dir, reference = lab.fresh() / "run", lab.reference(data, ranks)
    killed_at: list[int] = []
    again: list[int] = []
    for moment in ("steps", "writing", None):
        run = lab.start(run_dir, f"data.workers={workers}", data=data, ranks=ranks)
        if moment is None:
            run.wait()
        else:
            run.until_logged(rng.randint(2, 5))
            if moment == "writing":
                run.until_writing()
            time.sleep(rng.uniform(0, 0.03))
            run.kill()
        if killed_at:
            again.append(killed_at[-1] - went_on_from(run))
        if moment:
            killed_at.append(max(run.logged()))
    phrase, equal = same(run_dir, reference)
    at = " and ".join(map(str, killed_at))
    return judge(
        f"killed after steps {at}, the second time while saving; {phrase}",
        f"{' + '.join(map(str, again))} steps done again",
        {"exit code 0": run.codes() == [0] * ranks, "the same run": equal, "it went on": went_on_from(run) > 0},
    )


def killed_at_start(lab: Lab) -> Outcome:
    """SIGKILL before the first checkpoint, and while the program is starting on one."""
    rng = random.Random(1)
    run_dir = lab.fresh() / "run"
    run = lab.start(run_dir)
    run.until_logged(1)
    run.kill()
    run = lab.start(run_dir)
    time.sleep(rng.uniform(1, 3))
    run.kill()
    run = lab.run(run_dir)
    phrase, equal = same(run_dir, lab.reference())
    return judge(
        f"killed after step 1 and again while starting; {phrase}",
        "1 step done again",
        {"exit code 0": run.codes() == [0], "the same run": equal},
    )


def elastic(lab: Lab, before: tuple[int, str], after: tuple[int, str]) -> Outcome:
    """Stopped on some ranks, gone on with on others; to rounding the same as on one."""
    run_dir = lab.fresh() / "run"
    first = lab.start(run_dir, f"efficiency.shard={before[1]}", ranks=before[0])
    first.until((run_dir / "checkpoints" / "step_00000006").exists, "checkpoint")
    first.kill()
    second = lab.run(run_dir, f"efficiency.shard={after[1]}", ranks=after[0])
    other = difference(run_dir, lab.reference(), tolerance=1e-5)
    start = went_on_from(second)
    uneven = _uneven_epochs(lab, start, before[0], after[0])
    return judge(
        f"went on from step {start}; {other or 'losses within 1e-5 of an uninterrupted run on 1 rank'}",
        f"{max(first.logged()) - start} steps done again; {uneven or 'each image once an epoch'}",
        {"exit code 0": not any(second.codes()), "the same run": not other, "no image lost or twice": not uneven,
         "it went on": start >= 6},
    )  # fmt: skip


def _uneven_epochs(lab: Lab, start: int, before: int, after: int) -> str:
    """Asks the loaders of all ranks which images they take, before and after `start`."""
    drawn = [name for step in range(STEPS) for name in _images_of(lab, step, before if step < start else after, start)]
    for epoch in range(len(drawn) // IMAGES):
        counts = Counter(drawn[epoch * IMAGES : (epoch + 1) * IMAGES])
        if len(counts) != IMAGES:
            return f"epoch {epoch}: {IMAGES - len(counts)} images left out"
    return ""


def _images_of(lab: Lab, step: int, world: int, start: int) -> list[str]:
    cfg = load(RunConfig, RECIPE, [f"data.sources={lab.sources['folder']}"])
    names = []
    for rank in range(world):
        maker = BatchMaker(
            open_sources(cfg.data), cfg.crops, cfg.photometric, MaskConfig(probability=0.0), grid=(4, 4), channels=3,
            batch_size=BATCH, seed=cfg.seed, rank=rank, world=world, start_step=start if step >= start else 0,
        )  # fmt: skip
        for number in maker[step].positions.tolist():
            entry = maker.reader.entry(number)
            assert isinstance(entry, StoredEntry)
            names.append(entry.where()[1])
    return names


SCENARIOS = [
    Scenario(
        f"kill-{data}-{workers}workers-{ranks}rank{'s' * (ranks > 1)}",
        f"SIGKILL twice: {data}, {workers} workers, {ranks} rank{'s' * (ranks > 1)}",
        partial(killed, data=data, workers=workers, ranks=ranks),
    )
    for ranks in (1, 2)
    for data in ("folder", "shards")
    for workers in (2, 0)
] + [
    Scenario("kill-at-start", "SIGKILL before the first checkpoint and while starting", killed_at_start),
    Scenario("elastic-2-to-1", "2 ranks killed, then 1", partial(elastic, before=(2, "full"), after=(1, "full"))),
    Scenario("elastic-1-to-2", "1 rank killed, then 2", partial(elastic, before=(1, "full"), after=(2, "full"))),
    Scenario(
        "elastic-hybrid-to-full",
        "2 ranks killed under shard=hybrid, then shard=full",
        partial(elastic, before=(2, "hybrid"), after=(2, "full")),
    ),
]
