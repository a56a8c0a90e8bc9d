"""Opens the backbone, runs suites on it one after the other, writes and shows what they found."""

from __future__ import annotations

import json
import os
import shlex
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dinoreg.allocator import keep_freed_memory
from dinoreg.config import ConfigError, load
from dinoreg.data.workers import choose_workers
from dinoreg.models.files import FOLDER_FILES
from dinoreg.parallel.mesh import Ranks, setup_ranks
from eval.backbone import Backbone
from eval.inside.page import gather, write_inside
from eval.inside.testtime.network import open_weights, read_neurons
from eval.report.page import write_report
from eval.results import FILE, Result, write_result
from eval.suite import Context, Place
from eval.suites import SCORES, Suite

HUB_STEMS = {Path(name).stem for name in FOLDER_FILES}


@dataclass(frozen=True)
class Job:
    """A suite, what --data said for it, and its overrides."""

    suite: Suite
    data: Sequence[str]
    overrides: Sequence[str]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What is measured, and where its results go: into `home`, or into a folder for each suite below it."""

    weights: str
    backbone: Backbone
    home: Path
    own: bool  # home is of one suite alone

    def output(self, suite: str) -> Path:
        """The folder for a suite's results."""
        if self.own:
            return self.home
        step = self.backbone.step
        in_run = step is not None and self.home == run_of(Path(self.weights)) / "eval"
        return self.home / suite / (f"step_{step:08d}" if in_run else "")


def run_jobs(asked: Namespace, jobs: Sequence[Job]) -> int:
    """What the command line asked for; returns the exit code. All options are checked before anything is computed."""
    quick = asked.preset == "quick"
    configs = [_config(job, quick, alone=len(jobs) == 1) for job in jobs]
    places = [Place.of(job.data) if job.suite.data else Place() for job in jobs]
    ranks = setup_ranks()
    if ranks.device.type == "cpu":
        keep_freed_memory()
    try:
        checkpoints = open_checkpoints(asked, alone=len(jobs) == 1)
        for checkpoint in checkpoints:
            if ranks.is_main:
                print(f"{checkpoint.weights}: {checkpoint.backbone.found}", flush=True)
            for job in jobs:
                output, backbone = checkpoint.output(job.suite.name), checkpoint.backbone
                said = ranks.from_main(partial(check_output, output, job.suite.name, backbone))
                if said and ranks.is_main:
                    print(said, flush=True)
        done: list[tuple[Checkpoint, Suite]] = []
        try:
            for checkpoint in checkpoints:
                _measure(asked, checkpoint, list(zip(jobs, configs, places, strict=True)), ranks, done)
        finally:  # also of what was measured before another suite's data turned out to be wrong
            if ranks.is_main and done:
                write_pages(done)
    finally:
        ranks.close()
    return 0


def _measure(
    asked: Namespace, checkpoint: Checkpoint, jobs: Sequence[tuple[Job, Any, Place]], ranks: Ranks,
    done: list[tuple[Checkpoint, Suite]],
) -> None:  # fmt: skip
    """Every suite on one checkpoint; notes in `done` what is finished."""
    results: list[Result] = []
    checkpoint.backbone.to(ranks.device)
    try:
        for job, config, place in jobs:
            workers = choose_workers(ranks.local_world)
            context = Context(
                ranks, place, checkpoint.output(job.suite.name), asked.cache or default_cache(), workers,
                weights=Path(checkpoint.weights),
            )  # fmt: skip
            results.append(_run(job.suite, config, checkpoint, context, asked))
            done.append((checkpoint, job.suite))
    finally:
        if ranks.is_main and results:
            show(results, checkpoint.weights)
            _say_where_curves_are(Path(checkpoint.weights))
        checkpoint.backbone.to("cpu")  # room for the next


def _config(job: Job, quick: bool, alone: bool) -> Any:
    """The suite's options. Raises ConfigError, with the suite's name in the key where there are several suites."""
    schema = job.suite.schema()
    try:
        return load(schema, None, [*(schema.quick() if quick else []), *job.overrides])
    except ConfigError as error:
        if alone:
            raise
        raise ConfigError(error.message, f"{job.suite.name}.{error.key}".rstrip(".")) from None


def _run(suite: Suite, config: object, checkpoint: Checkpoint, context: Context, asked: Namespace) -> Result:
    start, backbone = time.perf_counter(), checkpoint.backbone
    result = suite.runner()(backbone, config, context)
    if asked.preset != "published":
        result.notes.insert(0, f"the {asked.preset} preset, which is shorter than the published protocol")
    if context.ranks.is_main:
        result.protocol["preset"] = asked.preset
        path = write_result(context.output, result, backbone, checkpoint.weights, time.perf_counter() - start)
        print(f"{suite.name}: {path}", flush=True)
    return result


def write_pages(done: Sequence[tuple[Checkpoint, Suite]]) -> None:
    """A page beside each score, and one of all; one of all experiments for all checkpoints side by side."""
    pages = []
    checkpoints = list(dict.fromkeys(checkpoint for checkpoint, _ in done))
    for checkpoint in checkpoints:
        outputs = [each.output(suite.name) for each, suite in done if each is checkpoint and suite.name in SCORES]
        pages += [write_report(output) for output in outputs]
        if len(outputs) > 1:
            pages.append(write_report(Path(os.path.commonpath(outputs))))
    if groups := [group for each in checkpoints if (group := gather(each.home, each.backbone.digest))]:
        pages.append(write_inside(groups, checkpoints[0].home))
    print(f"to look at: {pages[-1]}", flush=True)


def open_checkpoints(asked: Namespace, alone: bool) -> list[Checkpoint]:
    """All weights that the command line names, on the host. alone: there is one suite.

    With --output the results of each checkpoint get a folder of its name there, where there are several of them.
    """
    names = [asked.weights, *asked.compare]
    backbones = [open_weights(name) for name in names]
    if not asked.output:
        homes = [home_of(Path(name), backbone) for name, backbone in zip(names, backbones, strict=True)]
    elif len(names) == 1:
        homes = [asked.output]
    else:
        homes = [asked.output / name for name in _distinct([stem_of(Path(name)) for name in names])]
    own = alone and bool(asked.output) and len(names) == 1
    checkpoints = [Checkpoint(*each, own) for each in zip(names, backbones, homes, strict=True)]
    if len({each.output("") for each in checkpoints}) < len(checkpoints):  # steps of one run lie side by side
        raise ConfigError("two of the weights would have their results in the same folder: name one", "--output")
    return checkpoints


def home_of(weights: Path, backbone: Backbone) -> Path:
    """The folder for results: beside the run that made the weights, else below results/."""
    run = run_of(weights)
    if backbone.step is not None and (run / "teacher").is_dir():
        return run / "eval"
    return Path("results") / stem_of(weights)


def stem_of(weights: Path) -> str:
    """What weights are called. model.safetensors is what the file is called in everybody's folder."""
    if run_of(weights) != weights:
        return f"{run_of(weights).name}_{weights.stem}"
    if weights.suffix == ".json" and weights.is_file():  # a network with test-time registers
        return f"{stem_of(Path(read_neurons(weights).weights))}_test_time_registers"
    stem = weights.name if weights.is_dir() else weights.stem
    return weights.parent.name if stem in HUB_STEMS and weights.parent.name else stem


def _distinct(names: Sequence[str]) -> list[str]:
    return [f"{name}_{at}" if names.count(name) > 1 else name for at, name in enumerate(names, 1)]


def run_of(weights: Path) -> Path:
    """The run directory, if the weights are one, or lie in one as its teacher."""
    return weights.parents[1] if weights.parent.name == "teacher" else weights


def _say_where_curves_are(weights: Path) -> None:
    """A suite knows nothing of trainings, so somebody else puts its figures beside theirs."""
    run = run_of(weights)
    if (run / "wandb_id.txt").is_file():
        print(f"into the run's curve at wandb: dinoreg-launch publish {shlex.quote(str(run))}", flush=True)


def check_output(output: Path, suite: str, backbone: Backbone) -> str:
    """Makes the folder, so that hours of work are not lost for want of it; what must be said of results it holds.

    Raises ConfigError where they are another suite's, OSError where nothing can be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=output):
        pass
    there = output / FILE
    try:
        content = json.loads(there.read_text())
        held, digest = content["suite"], content["digest"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return ""
    if held != suite:
        raise ConfigError(f"{there} is of {held}: name another folder for {suite}", "--output")
    return f"{suite}: {there} is of other weights, and will be replaced" if digest != backbone.digest else ""


def default_cache() -> Path:
    """Where the system wants things that may be computed again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinoreg" / "features"


def show(results: Sequence[Result], weights: str) -> None:
    """A table of all figures with their intervals, and what a reader of them must know, said once."""
    table = Table(title=Text(weights, style="table.title"), title_justify="left")
    for heading in ("suite", "score", "value", "95 % interval"):
        table.add_column(heading, justify="left" if heading in ("suite", "score") else "right")
    suites_of: dict[str, list[str]] = {}
    for result in results:
        for number, (name, score) in enumerate(result.scores.items()):
            table.add_row("" if number else result.suite, name, *score.texts(), style="bold" if not number else None)
        table.add_section()
        for note in result.notes:
            suites_of.setdefault(note, []).append(result.suite)
    console = Console()
    console.print(table)
    for note, suites in suites_of.items():
        console.print(f"{', '.join(suites)}: {note}", soft_wrap=True, markup=False, highlight=False)
