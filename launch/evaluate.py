"""Evaluate the teachers of a run, or of all runs of a sweep: an array of jobs, each `dinoreg-eval` on one of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinoreg.config import ConfigError, load
from launch import jobs
from launch.config import LaunchConfig
from launch.evaluating import Evaluation
from launch.evaluations import EVAL, RESULTS, Score, folder_of, step_of
from launch.logs import end_of
from launch.recipe import LaunchedRun
from launch.record import Job, locked
from launch.slurm import JobState
from launch.snapshot import Snapshot, take_snapshot
from launch.submit import Cluster, check, queue
from launch.sweep import is_sweep, runs_of
from launch.task import RECIPE

ASKED = "asked.json"  # in the folder of a suite: how it was evaluated there


@dataclass(frozen=True)
class Suite:
    """One way to evaluate. name: of its folder and its metrics; options: what `dinoreg-eval` is given beside files.

    cache: a folder for features, other than its own.
    """

    name: str
    suite: str
    options: tuple[str, ...]
    cache: str | None = None

    def words(self, weights: Path, output: Path) -> tuple[str, ...]:
        """A command line."""
        cache = ("--cache", self.cache) if self.cache else ()
        return (self.suite, "--weights", str(weights), "--output", str(output), *cache, *self.options)

    def to_json(self) -> str:
        """To tell later whether results were made in the same way."""
        return json.dumps({"suite": self.suite, "options": self.options}, indent=1) + "\n"


@dataclass(frozen=True)
class Target:
    """A teacher of a run that is to be evaluated in `folder`."""

    run: Path
    weights: Path
    folder: Path

    @property
    def step(self) -> int:
        return step_of(self.folder)

    @property
    def evaluated(self) -> bool:
        return (self.folder / RESULTS).is_file()


@dataclass(frozen=True)
class Plan:
    """What is evaluated, and where. runs: of a sweep, or the one; asked: of Slurm, for each evaluation."""

    folder: Path
    runs: list[Path]
    suite: Suite
    asked: LaunchConfig
    cluster: Cluster

    def targets(self, steps: Sequence[int] | None = None) -> list[Target]:
        """All teachers, or those of some steps. Raises ConfigError where a run lacks one that is named."""
        found = [_target(run, path, self.suite) for run in self.runs for path in teachers(run)]
        for run in self.runs if steps is not None else []:
            there = [target.step for target in found if target.run == run]
            if lacking := [step for step in steps or [] if step not in there]:
                raise ConfigError(f"{run} has no teacher of step {lacking[0]}; {_listed(there)}", key="--steps")
        return [target for target in found if steps is None or target.step in steps]

    def newest(self) -> list[Target]:
        """The last teacher of each run that has one."""
        return list({target.run: target for target in self.targets()}.values())


def plan(folder: Path, suite: Suite, words: Sequence[str], cluster: Cluster) -> Plan:
    """words: options of the run's section `launch:` that are to be others. Raises ConfigError."""
    folder = folder.absolute()
    runs = runs_of(folder) if is_sweep(folder) else [folder]
    for run in runs:
        if not (run / RECIPE).is_file() and not (run / "config.yaml").is_file():
            raise ConfigError(f"{folder} is no run: it has neither {RECIPE} nor config.yaml", key="--run")
    if not runs:
        raise ConfigError(f"{folder} is a sweep without runs", key="--run")
    return Plan(folder, runs, suite, _resources(runs[0], words), cluster)


def make_suite(
    suite: str, name: str | None, data: Sequence[str], preset: str, words: Sequence[str], cache: str | None = None
) -> Suite:
    """Raises ConfigError on what `dinoreg-eval` would not take: a suite, data or options that there are not."""
    from eval.suite import Place
    from eval.suites import SUITES

    if suite not in SUITES:
        raise ConfigError(f"there is no suite '{suite}', only {', '.join(SUITES)}")
    if name is not None and not re.fullmatch(r"[\w.+-]+", name):
        raise ConfigError(f"'{name}' is no name of a folder: give letters, digits, - and _", key="--name")
    if not data:
        raise ConfigError("give the folder of the images", key="--data")
    Place.of(data)
    schema = SUITES[suite].schema()
    load(schema, None, [*(schema.quick() if preset == "quick" else []), *words])
    places = [word for text in data for word in ("--data", _absolute(text))]
    cache = str(Path(cache).absolute()) if cache else None
    return Suite(name or suite, suite, (*places, "--preset", preset, *words), cache)


def teachers(run: Path) -> list[Path]:
    """The files of a run's teachers, by step."""
    files = [path for path in (run / "teacher").glob("step_*.safetensors") if step_of(path) >= 0]
    return sorted(files, key=step_of)


def submit(plan: Plan, targets: Sequence[Target], code: Snapshot | None = None) -> dict[Target, str]:
    """The jobs of those that are neither evaluated nor in the queue. Raises ConfigError, with nothing in the queue."""
    for run in plan.runs:
        _check_asked(run / EVAL / plan.suite.name, plan.suite)
    with locked(plan.folder / f"{EVAL}.lock"):  # somebody may follow the run at the same time
        active = jobs.active_jobs(target.folder for target in targets)
        wanted = [target for target in targets if not target.evaluated and target.folder not in active]
        return _queue(plan, wanted, code) if wanted else {}


def _queue(plan: Plan, wanted: Sequence[Target], code: Snapshot | None) -> dict[Target, str]:
    if plan.cluster == "debug" and len(wanted) > 1:
        raise ConfigError(f"a debugger watches one process, not {len(wanted)}: give --steps", key="--cluster")
    check(plan.asked, plan.folder, plan.cluster)
    for target in wanted:
        target.folder.mkdir(parents=True, exist_ok=True)
        (target.folder.parent / ASKED).write_text(plan.suite.to_json(), encoding="utf-8")
    code = code or take_snapshot(plan.folder)
    tasks = [_task(plan, target, code) for target in wanted]
    name = f"{plan.folder.name}-{plan.suite.name}"
    return dict(zip(wanted, queue(tasks, plan.asked, plan.folder, plan.cluster, code, name), strict=True))


WAITING = ("waits", "runs")


def survey(targets: Iterable[Target]) -> dict[Target, str]:
    """In words: evaluated, with its score; waits; runs; failed, with the reason; or nothing yet."""
    targets = list(targets)
    latest = jobs.latest(target.folder for target in targets)
    told = jobs.states(latest)
    return {target: _word(target, latest.get(target.folder), told.get(target.folder)) for target in targets}


def _word(target: Target, job: Job | None, state: JobState | None) -> str:
    if target.evaluated:
        return f"evaluated, {_main_score(target)}"
    if job is None:
        return "not evaluated"
    if state is not None and state.active:
        return "waits" if state.name == "PENDING" else "runs"
    end = end_of(target.folder, job, state)
    return end if end == "cancelled" else f"failed: {end}"


def _main_score(target: Target) -> str:
    said = json.loads((target.folder / RESULTS).read_text(encoding="utf-8"))["scores"]
    name, score = next(iter(said.items()))
    return f"{name} {Score('', name, target.step, score['value'], unit=score.get('unit', ''))}"


def _task(plan: Plan, target: Target, code: Snapshot) -> Evaluation:
    return Evaluation(
        run_dir=str(target.folder),
        code=str(code.folder),
        folder=str(Path.cwd()),
        cluster=plan.cluster,
        patience=plan.asked.max_requeues_without_progress,
        run=str(target.run),
        arguments=plan.suite.words(target.weights, target.folder),
    )


def _target(run: Path, weights: Path, suite: Suite) -> Target:
    return Target(run, weights, folder_of(run, suite.name, step_of(weights)))


def _check_asked(folder: Path, suite: Suite) -> None:
    """Raises ConfigError where the results in a folder were made in another way: they would not be one curve."""
    path = folder / ASKED
    if path.exists() and list(folder.glob(f"step_*/{RESULTS}")) and path.read_text() != suite.to_json():
        before = " ".join(json.loads(path.read_text())["options"])
        raise ConfigError(
            f"{folder} was made with other options ({before}); give this one a name, as in --name {folder.name}-2"
        )


def _resources(run: Path, words: Sequence[str]) -> LaunchConfig:
    """What the run was given, for one task on one GPU, and with its share of a node's memory."""
    recipe = next(path for path in (run / RECIPE, run / "config.yaml") if path.is_file())
    training = load(LaunchedRun, recipe).launch
    less = ["launch.nodes=1", f"launch.gpus_a_node={min(1, training.gpus_a_node)}"]
    if training.memory and training.tasks_a_node > 1:
        less.append(f"launch.memory={share(training.memory, training.tasks_a_node)}")
    return load(LaunchedRun, recipe, [*less, *words]).launch


def share(memory: str, parts: int) -> str:
    """Of memory as sbatch takes it, such as 900GB: rounded up."""
    found = re.fullmatch(r"(\d+)(\D*)", memory.strip())
    return f"{-(-int(found.group(1)) // parts)}{found.group(2)}" if found else memory


def _absolute(text: str) -> str:
    """train=DIR and DIR alike."""
    name, equals, path = text.partition("=")
    if Path(text).exists() or not equals:
        return str(Path(text).absolute())
    return f"{name}={Path(path).absolute()}"


def _listed(steps: Sequence[int]) -> str:
    return f"there are {', '.join(map(str, steps))}" if steps else "it has none yet"
