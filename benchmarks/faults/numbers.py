"""Numbers that are not finite, and images that make them so."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

from benchmarks.faults.compare import brief, learnt, lines_of, one_line, teacher_of
from benchmarks.faults.lab import STEPS, Lab, Outcome, Run, Scenario, environment, judge
from benchmarks.faults.props import IMAGES

HIT = 5  # the step that a fault is injected into


def one_step(lab: Lab, kind: str, ranks: int) -> Outcome:
    """A fault in one step, against a run that takes that step and learns nothing from it."""
    at = f"{HIT}:{ranks - 1}"
    hit = lab.run(lab.fresh() / "run", inject=f"{kind}:{at}", ranks=ranks)
    without = lab.once(("left out", ranks), lambda: lab.run(lab.fresh() / "run", inject=f"left-out:{HIT}", ranks=ranks))
    skipped = _skipped(hit)
    where = learnt(hit.run_dir).get(HIT, {})
    broken = [name for name, value in where.items() if isinstance(value, str)]
    other = _difference_but(HIT, hit.run_dir, without.run_dir)
    return judge(
        f"step {HIT} is skipped on {_ranks(ranks)} ({', '.join(broken[:2])} not finite), skipped/total {skipped}; "
        + (other or f"all else bitwise equal to a run that leaves step {HIT} out"),
        "1 step",
        {"exit code 0": hit.codes() == [0] * ranks, "one was skipped": skipped == 1, "all else is the same": not other,
         "finite weights": _finite(hit.run_dir), "it is logged": bool(broken)},
    )  # fmt: skip


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"all {count} ranks"


def _difference_but(step: int, found: Path, expected: Path) -> str:
    ours, theirs = learnt(found), learnt(expected)
    ours.pop(step, None), theirs.pop(step, None)
    for number, line in theirs.items():
        if ours.get(number) != line:
            return f"step {number} differs"
    mine, other = teacher_of(found), teacher_of(expected)
    if not mine or not other:
        return "there is no last teacher"
    return next((f"teacher {name} differs" for name in other if not mine[name].equal(other[name])), "")


def never_again_finite(lab: Lab) -> Outcome:
    """All losses are NaN from some step on."""
    run_dir = lab.fresh() / "run"
    run = lab.run(run_dir, "train.max_skipped=3", inject=f"nan:{HIT}-99")
    fault = next(iter((run_dir / "faults").glob("step_*/fault.json")), None)
    left = fault.read_text() if fault else '{"steps": []}'
    images = len(set(re.findall(r"\d\d\.jpg", left)))
    return judge(
        f"exit code {run.codes()[0]}: {brief(run.last_words(), 200)}; {images} images named in "
        f"{fault.relative_to(run_dir) if fault else 'nothing'}",
        "3 steps",
        {"exit code 2": run.codes() == [2], "one line": one_line(run), "the images are named": images > 8,
         "it stopped after 3": len(json.loads(left)["steps"]) == 3},
    )  # fmt: skip


def replayed(lab: Lab) -> Outcome:
    """Weights so large that nothing is finite any more, and `dinoreg replay` on what is left."""
    run_dir = lab.fresh() / "run"
    run = lab.run(run_dir, "train.max_skipped=3", "optim.lr=1e20", "optim.clip=0")
    folder = next(iter((run_dir / "faults").glob("step_*")), run_dir / "faults")
    command = [sys.executable, "-m", "dinoreg", "replay", str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=100)
    named = re.search(r"outputs +first after ([\w.]+)", done.stdout)
    losses = re.findall(r"^ ?(loss/\S+ +\S+ +(?:nan|inf))", done.stdout, re.MULTILINE)
    return judge(
        f"exit code {run.codes()[0]}; replay exits {done.returncode} and names "
        f"{named[1] if named else 'no module'} first; {brief(losses[0]) if losses else 'no loss'} (in the run, now)",
        "3 steps",
        {"exit code 2": run.codes() == [2], "one line": one_line(run), "replay finds it": done.returncode == 1,
         "a module is named": bool(named), "a loss is named": bool(losses)},
    )  # fmt: skip


def odd_images(lab: Lab, make: str, *overrides: str) -> Outcome:
    """A folder of images that give equal features."""
    folder = lab.fresh() / "images"
    folder.mkdir()
    first = sorted(lab.sources["folder"].iterdir())[0]
    for number in range(IMAGES):
        if make == "blank":
            Image.new("RGB", (64, 64), (128, 128, 128)).save(folder / f"{number}.png")
        else:
            shutil.copy(first, folder / f"{number}.jpg")
    return _finishes(lab, folder, *overrides)


def batch_of_one(lab: Lab) -> Outcome:
    """KoLeo has no neighbours then."""
    return _finishes(lab, lab.sources["folder"], "train.batch_size=1")


def _finishes(lab: Lab, folder: Path, *overrides: str) -> Outcome:
    run = lab.run(lab.fresh() / "run", *overrides, data=folder)
    lines, skipped = lines_of(run.run_dir), _skipped(run)
    last = f"{float(lines[-1]['loss/total']):.4g}" if lines else "unknown"
    words = f": {brief(run.last_words())}" if run.last_words() else ""
    finite = bool(lines) and len(lines) == STEPS and _finite(run.run_dir)
    return judge(
        f"exit code {run.codes()[0]}{words}; {len(lines)} steps, {skipped} skipped, last loss {last}, weights "
        f"{'finite' if finite else 'not finite'}",
        f"{skipped} steps" if skipped else "nothing",
        {"exit code 0": run.codes() == [0], "finite weights": finite, "no step was skipped": skipped == 0},
    )


def _skipped(run: Run) -> int:
    lines = lines_of(run.run_dir)
    return int(lines[-1].get("skipped/total", -1)) if lines else -1


def _finite(run_dir: Path) -> bool:
    weights = teacher_of(run_dir)
    return bool(weights) and all(tensor.isfinite().all() for tensor in weights.values())


SCENARIOS = [
    Scenario("nan-loss", "NaN in a loss", lambda lab: one_step(lab, "nan", 1)),
    Scenario("nan-loss-2-ranks", "NaN in a loss on one of 2 ranks", lambda lab: one_step(lab, "nan", 2)),
    Scenario("inf-gradient-2-ranks", "Inf in a gradient on one of 2 ranks", lambda lab: one_step(lab, "inf", 2)),
    Scenario("nan-for-ever", "NaN in every loss from some step on", never_again_finite),
    Scenario("replay", "weights overflow; dinoreg replay on what is left", replayed),
    Scenario("duplicates", "all images are the same file", lambda lab: odd_images(lab, "same")),
    Scenario("blank-images", "all images are blank", lambda lab: odd_images(lab, "blank")),
    Scenario("blank-images-bf16", "all images are blank, in bf16",
             lambda lab: odd_images(lab, "blank", "train.precision=bf16")),
    Scenario("batch-of-one", "a batch of 1 image", batch_of_one),
]  # fmt: skip
