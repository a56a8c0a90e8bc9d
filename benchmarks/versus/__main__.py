"""dinoreg and lightly-train's DINOv2 side by side: the same network, crops, heads and images, in turn on this machine.

    python -m benchmarks.versus --data FOLDER [--precision fp32 bf16] [--rounds 3] [--steps 4] [--out FILE.json]
    python -m benchmarks.versus --data FOLDER --size small --precision bf16 --learn 20 --knn LABELLED_FOLDER

Both are whole trainers, started from the command line with files to read: decoding, cropping, both networks, losses,
update and moving average are all in a step. The first step of each start is left out. Rounds alternate, so that a
machine that slows down slows both. lightly-train is installed into an environment of its own (`--env`), with the build
of torch that the package index gives it.

--size: large is ViT-S/14 with crops of 224 and 98 pixels, 65,536 prototypes, 8 images a step; small the network of the
demo, which learns something within minutes. --learn: both train for as many minutes, by the steps that their measured
speeds allow, with the same schedules; then the k-NN of dinoreg-eval says what was learnt, and what a network knew that
had learnt nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine
from benchmarks.versus.work import SIZES, Work
from dinoreg.parallel.mesh import Ranks

THEIRS = Path(__file__).with_name("theirs.py")
THEIR_VERSION = "0.18.0"  # of which theirs.py knows the inside
GIB = 2**30


def measure(command: list[str], threads: int) -> dict[str, Any]:
    """Run one trainer in a process; the JSON of its last line. Raises RuntimeError with the end of what it said."""
    # How threads wait is each trainer's own affair.
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment |= {"OMP_NUM_THREADS": str(threads), "XFORMERS_DISABLED": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or not lines[-1].startswith("{"):
        raise RuntimeError(f"{' '.join(command[:3])} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


class Duel:
    """Both trainers on the same work."""

    def __init__(self, work: Work, python: Path, threads: int, folder: Path) -> None:
        self.work, self.python, self.threads, self.folder = work, python, threads, folder
        self.started = 0

    def ours(self, steps: int) -> dict[str, Any]:
        asked = self.work.ours(steps, self._new())
        return measure([sys.executable, "-m", "benchmarks.versus.ours", json.dumps(asked)], self.threads)

    def theirs(self, steps: int, export: Path | None = None) -> dict[str, Any]:
        asked = self.work.theirs(steps, self._new(), export)
        return measure([str(self.python), str(THEIRS), json.dumps(asked)], self.threads)

    def _new(self) -> Path:
        self.started += 1
        return self.folder / f"{self.started:02d}"


def speeds(duel: Duel, rounds: int, steps: int, console: Console) -> dict[str, Any]:
    """Seconds a step and peak memory of both, in alternating rounds."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    for number in range(rounds):
        for name, run in (("theirs", duel.theirs), ("ours", duel.ours)):
            result = run(steps + 1)
            found[name].append(result)
            console.print(f"round {number + 1}, {duel.work.precision}, {name}: {_median(result):.2f} s a step, "
                          f"{result['peak'] / GIB:.2f} GiB")  # fmt: skip
    summary = {name: {"seconds": statistics.median(s for each in rows for s in each["seconds"][1:]),
                      "peak": max(each["peak"] for each in rows), "torch": rows[0]["torch"]}
               for name, rows in found.items()}  # fmt: skip
    ratios = {key: summary["theirs"][key] / summary["ours"][key] for key in ("seconds", "peak")}
    return {"precision": duel.work.precision, "runs": found, **summary, "times_faster": ratios["seconds"],
            "times_less_memory": ratios["peak"]}  # fmt: skip


def learn(duel: Duel, minutes: float, speed: dict[str, Any], knn: list[str], console: Console) -> dict[str, Any]:
    """The k-NN accuracy of both after the same time, and before."""
    steps = {name: max(2, int(60 * minutes / speed[name]["seconds"])) for name in ("ours", "theirs")}
    weights = {name: duel.folder / f"{name}.pt" for name in ("untrained", "theirs")}
    duel.theirs(1, weights["untrained"])
    runs = {"ours": duel.ours(steps["ours"]), "theirs": duel.theirs(steps["theirs"], weights["theirs"])}
    weights["ours"] = Path(runs["ours"]["weights"])
    scores = {name: _knn(path, knn, duel.folder / f"knn_{name}") for name, path in weights.items()}
    took = {name: sum(run["seconds"]) / 60 for name, run in runs.items()}
    console.print(f"untrained: k-NN {scores['untrained']:.1f} %")
    for name in runs:
        console.print(f"{name}: {steps[name]} steps in {took[name]:.1f} minutes, k-NN {scores[name]:.1f} %")
    return {"minutes": minutes, "took": took, "steps": steps, "knn": scores, "data": [Path(each).name for each in knn]}


def _knn(weights: Path, data: list[str], output: Path) -> float:
    where = ["--weights", str(weights), "--output", str(output), "--data", *data]
    subprocess.run([sys.executable, "-m", "eval", "knn", *where], check=True, capture_output=True)
    return float(json.loads((output / "results.json").read_text())["scores"]["top1"]["value"])


def _median(result: dict[str, Any]) -> float:
    return statistics.median(result["seconds"][1:])


def install(env: Path, console: Console) -> Path:
    """The Python of the environment that has lightly-train, made where it is not there."""
    python = env / "bin" / "python"
    if not python.exists():
        console.print(f"installing lightly-train into {env} (some 6 GB)")
        venv.create(env, with_pip=True)
        package = f"lightly-train=={THEIR_VERSION}"
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", package], check=True)
    return python


def show(results: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="seconds a step; peak memory of the process", title_justify="left")
    for heading in (
        "precision",
        "dinoreg",
        "lightly-train",
        "times as fast",
        "dinoreg GiB",
        "lightly-train GiB",
        "less memory",
    ):
        table.add_column(heading, justify="right")
    for each in results:
        ours, theirs = each["ours"], each["theirs"]
        table.add_row(
            each["precision"], f"{ours['seconds']:.2f}", f"{theirs['seconds']:.2f}", f"{each['times_faster']:.2f} x",
            f"{ours['peak'] / GIB:.2f}", f"{theirs['peak'] / GIB:.2f}", f"{each['times_less_memory']:.2f} x",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.versus", description="dinoreg beside lightly-train's DINOv2.")
    parser.add_argument("--data", type=Path, required=True, help="a folder of images")
    parser.add_argument("--size", choices=tuple(SIZES), default="large")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed in each start")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--learn", type=float, default=0.0, metavar="MINUTES", help="train both for as long, then k-NN")
    parser.add_argument("--knn", nargs="+", metavar="DATA", help="for it: a labelled folder; or train=DATA test=DATA")
    parser.add_argument("--env", type=Path, default=Path.home() / ".cache" / "dinoreg" / "versus")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    if args.learn and not args.knn:
        parser.error("--learn wants --knn DATA")
    console = Console()
    python = install(args.env, console)
    results = []
    images = sum(1 for path in args.data.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    for precision in args.precision:
        with tempfile.TemporaryDirectory() as folder:
            duel = Duel(Work(args.data.absolute(), args.size, precision, images), python, args.threads, Path(folder))
            result = speeds(duel, args.rounds, args.steps, console)
            if args.learn:
                result["learnt"] = learn(duel, args.learn, result, args.knn, console)
            results.append(result)
    show(results, console)
    if args.out:
        args.out.write_text(
            json.dumps({"machine": describe_machine(Ranks.alone()), "size": args.size, "results": results}, indent=1)
        )


if __name__ == "__main__":
    main()
