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

from dinoreg.config import ConfigError, load
from dinoreg.data.workers import choose_workers
from dinoreg.models.files import FOLDER_FILES
from dinoreg.parallel.mesh import setup_ranks
from eval.backbone import Backbone, open_backbone
from eval.report.page import write_report
from eval.results import FILE, Result, write_result
from eval.suite import Context, Place
from eval.suites import Suite

HUB_STEMS = {Path(name).stem for name in FOLDER_FILES}


@dataclass(frozen=True)
class Job:
    """A suite, what --data said for it, and its overrides."""

    suite: Suite
    data: Sequence[str]
    overrides: Sequence[str]


def run_jobs(asked: Namespace, jobs: Sequence[Job]) -> int:
    """What the command line asked for; returns the exit code. All options are checked before anything is computed."""
    quick = asked.preset == "quick"
    configs = [_config(job, quick, alone=len(jobs) == 1) for job in jobs]
    places = [Place.of(job.data) for job in jobs]
    ranks = setup_ranks()
    try:
        backbone = open_backbone(asked.weights).to(ranks.device)
        if ranks.is_main:
            print(f"{asked.weights}: {backbone.found}", flush=True)
        results: list[Result] = []
        outputs = [output_of(asked, job.suite.name, backbone, alone=len(jobs) == 1) for job in jobs]
        for job, output in zip(jobs, outputs, strict=True):
            said = ranks.from_main(partial(check_output, output, job.suite.name, backbone))
            if said and ranks.is_main:
                print(said, flush=True)
        try:
            for job, config, place, output in zip(jobs, configs, places, outputs, strict=True):
                workers = choose_workers(ranks.local_world)
                context = Context(ranks, place, output, asked.cache or default_cache(), workers)
                results.append(_run(job.suite, config, backbone, context, asked))
        finally:  # also what was measured before another suite's data turned out to be wrong
            if ranks.is_main and results:
                show(results)
                write_pages(outputs[: len(results)])
                _say_where_curves_are(Path(asked.weights))
    finally:
        ranks.close()
    return 0


def _config(job: Job, quick: bool, alone: bool) -> Any:
    """The suite's options. Raises ConfigError, with the suite's name in the key where there are several suites."""
    schema = job.suite.schema()
    try:
        return load(schema, None, [*(schema.quick() if quick else []), *job.overrides])
    except ConfigError as error:
        if alone:
            raise
        raise ConfigError(error.message, f"{job.suite.name}.{error.key}".rstrip(".")) from None


def _run(suite: Suite, config: object, backbone: Backbone, context: Context, asked: Namespace) -> Result:
    start = time.perf_counter()
    result = suite.runner()(backbone, config, context)
    if asked.preset != "published":
        result.notes.insert(0, f"the {asked.preset} preset, which is shorter than the published protocol")
    if context.ranks.is_main:
        result.protocol["preset"] = asked.preset
        path = write_result(context.output, result, backbone, asked.weights, time.perf_counter() - start)
        print(f"{suite.name}: {path}", flush=True)
    return result


def write_pages(outputs: Sequence[Path]) -> None:
    """A page beside each result, and one of all; when everything is measured, so that nothing waits for pictures."""
    pages = [write_report(output) for output in outputs]
    if len(pages) > 1:
        pages.append(write_report(Path(os.path.commonpath(outputs))))
    print(f"to look at: {pages[-1]}", flush=True)


def output_of(asked: Namespace, suite: str, backbone: Backbone, alone: bool) -> Path:
    """The folder for a suite's results: beside the run that made the weights, else below results/."""
    if asked.output:
        return Path(asked.output) if alone else asked.output / suite
    weights = Path(asked.weights)
    run = run_of(weights)
    if backbone.step is not None and (run / "teacher").is_dir():
        return run / "eval" / suite / f"step_{backbone.step:08d}"
    # model.safetensors is what the file is called in everybody's folder.
    stem = weights.name if weights.is_dir() else weights.stem
    return Path("results") / (weights.parent.name if stem in HUB_STEMS and weights.parent.name else stem) / suite


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


def show(results: Sequence[Result]) -> None:
    """A table of all figures with their intervals, and what a reader of them must know, said once."""
    table = Table()
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
