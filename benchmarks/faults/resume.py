"""Exact resume: killed at any moment, and on other numbers of ranks."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.faults.compare import brief, difference, lines_of, same, saved_steps, went_on_from
from benchmarks.faults.lab import RECIPE, STEADY, STEPS, Lab, Outcome, Run, Scenario, judge
from benchmarks.faults.props import IMAGES
from dinoreg.config import load
from dinoreg.data.sources import open_sources
from dinoreg.parallel.mesh import Ranks
from dinoreg.train.about import About
from dinoreg.train.build import open_loader
from dinoreg.train.recipe import RunConfig


def killed(lab: Lab, data: str, workers: int, ranks: int, moments: Sequence[str]) -> Outcome:
    """SIGKILL at each of `moments`, after a few steps or while a checkpoint is written, then to the end."""
    rng = random.Random(f"{data} {workers} {ranks}")
    run_dir, reference = lab.fresh() / "run", lab.reference(data, ranks)
    dead: list[Run] = []
    for moment in moments:
        run = lab.start(run_dir, f"data.workers={workers}", data=data, ranks=ranks, inject=STEADY)
        run.until(partial(saved_steps, run_dir), "checkpoint")
        run.until_logged(rng.randint(2, 5))
        if moment == "writing":
            run.until_writing()
        time.sleep(rng.uniform(0, 0.05))
        run.kill()
        dead.append(run)
    last = lab.run(run_dir, f"data.workers={workers}", data=data, ranks=ranks)
    phrase, equal = same(run_dir, reference)
    killed_at = [max(run.logged()) for run in dead]
    again = [step - went_on_from(run) for step, run in zip(killed_at, [*dead[1:], last], strict=True)]
    at = " and ".join(f"{step} ({moment})" for step, moment in zip(killed_at, moments, strict=True))
    return judge(
        f"killed after step {at}; {phrase}",
        f"{' + '.join(map(str, again))} steps done again",
        {"exit code 0": last.codes() == [0] * ranks, "the same run": equal, "it went on": went_on_from(last) > 0},
    )


def killed_at_start(lab: Lab) -> Outcome:
    """SIGKILL before the first checkpoint, and while the program is starting on one."""
    rng = random.Random(1)
    run_dir = lab.fresh() / "run"
    run = lab.start(run_dir, cold=True)
    run.until_logged(1)
    run.kill()
    run = lab.start(run_dir, cold=True)
    time.sleep(rng.uniform(1, 3))
    run.kill()
    run = lab.run(run_dir, cold=True)
    phrase, equal = same(run_dir, lab.reference())
    return judge(
        f"killed after step 1 and again while starting; {phrase}",
        "1 step done again",
        {"exit code 0": run.codes() == [0], "the same run": equal},
    )


def killed_streaming(lab: Lab) -> Outcome:
    """Shards that can only be read from their start go on by whole shards."""
    pipes = ",".join(f"pipe:cat {shard}" for shard in sorted(lab.sources["shards"].glob("*.tar")))
    run_dir = lab.fresh() / "run"
    run = lab.start(run_dir, data=f"[{pipes}]", inject=STEADY)
    run.until(partial(saved_steps, run_dir), "checkpoint")
    run.kill()
    again = lab.run(run_dir, data=f"[{pipes}]")
    told = next((line for line in again.said().splitlines() if "stream" in line), "nothing is said")
    steps = [int(line["step"]) for line in lines_of(run_dir)]
    return judge(
        f"killed after step {max(run.logged())}, went on from {went_on_from(again)} to the end: {brief(told, 200)}",
        f"{max(run.logged()) - went_on_from(again)} steps done again, on other images of the pass",
        {"exit code 0": again.codes() == [0], "one line a step": steps == list(range(1, STEPS + 1)),
         "it went on": went_on_from(again) > 0, "it is told": "stream" in told},
    )  # fmt: skip


def elastic(lab: Lab, before: tuple[int, str], after: tuple[int, str]) -> Outcome:
    """Stopped on some ranks, gone on with on others; to rounding the same as on one."""
    run_dir = lab.fresh() / "run"
    first = lab.start(run_dir, f"efficiency.shard={before[1]}", ranks=before[0], inject=STEADY)
    first.until((run_dir / "checkpoints" / "step_00000006").exists, "checkpoint")
    first.kill()
    second = lab.run(run_dir, f"efficiency.shard={after[1]}", ranks=after[0])
    other = difference(run_dir, lab.reference(), tolerance=1e-5)
    start = went_on_from(second)
    uneven = _uneven_epochs(lab, start, before[0], after[0])
    return judge(
        f"went on from step {start}; "
        f"{other or 'losses within 1e-5 and teacher within 1e-4 of an uninterrupted run on 1 rank'}",
        f"{max(first.logged()) - start} steps done again; {uneven or 'each image once an epoch'}",
        {"exit code 0": not any(second.codes()), "the same run": not other, "no image lost or twice": not uneven,
         "it went on": start >= 6},
    )  # fmt: skip


def _uneven_epochs(lab: Lab, start: int, before: int, after: int) -> str:
    """Asks the loaders of all ranks which images they take, before and after `start`."""
    drawn = [name for step in range(STEPS) for name in _images_of(lab, step, before if step < start else after)]
    for epoch in range(len(drawn) // IMAGES):
        counts = Counter(drawn[epoch * IMAGES : (epoch + 1) * IMAGES])
        if len(counts) != IMAGES:
            return f"epoch {epoch}: {IMAGES - len(counts)} images left out"
    return ""


def _images_of(lab: Lab, step: int, world: int) -> list[str]:
    cfg = load(RunConfig, RECIPE, [f"data.sources={lab.sources['folder']}"])
    sources = open_sources(cfg.data)
    names = []
    for rank in range(world):
        ranks = Ranks(rank, world, rank, world, torch.device("cpu"))
        names += [
            name for _, name in open_loader(cfg, sources, ranks, start=About(step=step), total=STEPS).maker[step].keys
        ]
    return names


def _kill(data: str, workers: int, ranks: int, *moments: str) -> Scenario:
    many = f"{ranks} rank{'s' * (ranks > 1)}"
    return Scenario(
        f"kill-{data}-{workers}workers-{many.replace(' ', '')}",
        f"SIGKILL{' twice' * (len(moments) > 1)}: {data}, {workers} workers, {many}",
        partial(killed, data=data, workers=workers, ranks=ranks, moments=moments),
    )


SCENARIOS = [
    _kill("folder", 2, 1, "computing", "writing"),
    _kill("folder", 0, 1, "computing", "writing"),
    _kill("shards", 2, 1, "computing", "writing"),
    _kill("shards", 0, 1, "computing", "writing"),
    _kill("folder", 2, 2, "computing", "writing"),
    _kill("folder", 0, 2, "writing"),
    _kill("shards", 2, 2, "writing"),
    _kill("shards", 0, 2, "computing"),
    Scenario("kill-at-start", "SIGKILL before the first checkpoint and while starting", killed_at_start),
    Scenario("kill-streams", "SIGKILL: shards that can only be streamed", killed_streaming),
    Scenario("elastic-2-to-1", "2 ranks killed, then 1", partial(elastic, before=(2, "full"), after=(1, "full"))),
    Scenario("elastic-1-to-2", "1 rank killed, then 2", partial(elastic, before=(1, "full"), after=(2, "full"))),
    Scenario(
        "elastic-hybrid-to-full",
        "2 ranks killed under shard=hybrid, then shard=full",
        partial(elastic, before=(2, "hybrid"), after=(2, "full")),
    ),
]
