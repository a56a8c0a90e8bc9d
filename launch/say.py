"""What `dinoreg-launch` says of work that it has submitted, or would."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from dinoreg.config import ConfigError
from launch.submit import script
from launch.task import RECIPE

if TYPE_CHECKING:
    from launch.evaluate import Plan
    from launch.sweep import Sweep


def say_submitted(jobs: dict[Path, str], folder: Path) -> None:
    """Of runs in a folder, or of the one that it is."""
    for run, job in jobs.items():
        print(f"job {job}: {shown(run)}")
    print(f"see it: dinoreg-launch status {shown(folder)}, dinoreg-launch logs -f {shown(folder)}")


def dry_sweep(sweep: Sweep) -> None:
    """What would be submitted."""
    print(f"axes: {'; '.join(map(str, sweep.axes))}")
    print(f"{len(sweep.runs)} runs in {shown(sweep.folder)}:")
    print("\n".join(f"    {name}" for name in sweep.runs))
    print(script(sweep.first.launch, sweep.folder, len(sweep.runs)))


def say_sweep(sweep: Sweep, submitted: dict[str, str], left: dict[str, str]) -> None:
    """What was submitted, and what was left as it is."""
    folder = shown(sweep.folder)
    print(f"axes: {'; '.join(map(str, sweep.axes))}")
    print(f"{len(submitted)} of {len(sweep.runs)} runs submitted in {folder}")
    for name in sweep.runs:
        print(f"    {name}: {f'job {submitted[name]}' if name in submitted else f'{left[name]}, left as it is'}")
    print(f"see them: dinoreg-launch status {folder}; what comes of them: dinoreg-launch sweep --table {folder}")


def evaluate(plan: Plan, every: bool, steps: str | None, dry_run: bool) -> int:
    """Submit evaluations of the newest teachers, of all, or of some steps, and say what became of each."""
    from launch.evaluate import submit, survey
    from launch.evaluating import publish

    chosen = plan.targets(_numbers(steps)) if every or steps else plan.newest()
    if not chosen:
        raise ConfigError(f"{shown(plan.folder)} has no teacher/step_*.safetensors yet; --follow waits for them")
    if dry_run:
        print("\n".join(f"{target.run.name} step {target.step}: {state}" for target, state in survey(chosen).items()))
        print(script(plan.asked, plan.folder, len(chosen), f"{plan.folder.name}-{plan.suite.name}"))
        return 0
    submitted = submit(plan, chosen)
    for target, state in survey(chosen).items():
        job = submitted.get(target)
        print(f"{target.run.name} step {target.step}: {f'job {job}' if job else f'{state}, left as it is'}")
    for run in plan.runs:
        publish(run)
    print(f"see them: dinoreg-launch status {shown(plan.folder)}")
    return 0


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"'{text}' are no numbers, as in 100,200", key="--steps") from None


def advice(run: Path) -> str:
    """How what was cancelled goes on."""
    if (run / RECIPE).is_file():
        return f"go on with: dinoreg-launch resume {shown(run)}"
    return "dinoreg-launch eval submits it again"


def shown(path: Path | str) -> str:
    """As somebody in this folder writes it in a shell."""
    here = Path.cwd()
    return quote(str(Path(path).relative_to(here) if Path(path).is_relative_to(here) else path))
