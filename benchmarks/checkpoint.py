"""What a checkpoint costs the training: saves in the background, saves in the foreground, and none.

    python -m benchmarks.checkpoint [RECIPE] [key=value ...] [--rounds 5] [--steps 20] [--dir FOLDER] [--out FILE.json]
    torchrun --nproc-per-node 8 -m benchmarks.checkpoint vitl16_short_in1k train.batch_size=512

Each round trains three stretches of the same number of steps: without a save, and with one after the first step, in the
background and in the foreground; what a stretch takes longer than the first is what its save stalled. Medians over the
rounds, since a machine has other things to do. Both files of a save are written, the checkpoint and the teacher.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.step import Bench, finish, wait
from dinoreg.config import load
from dinoreg.parallel.mesh import Ranks, setup_ranks
from dinoreg.train.checkpoint import CheckpointConfig, Checkpointer
from dinoreg.train.recipe import RunConfig
from dinoreg.train.trainer import train_step

WARMUP = 3  # steps


class SavingBench(Bench):
    """A training that saves."""

    def __init__(self, cfg: RunConfig, ranks: Ranks, folder: Path) -> None:
        super().__init__(cfg, ranks)
        self.savers = {
            "background": Checkpointer(folder, CheckpointConfig(keep=1), ranks),
            "foreground": Checkpointer(folder, CheckpointConfig(keep=1, background=False), ranks),
        }

    def step_beside(self, saver: Checkpointer) -> None:
        """As the trainer does it: the copies come before the update."""
        self.steps += 1
        train_step(
            *(self.objective, self.optimizer, self.guard, next(self.batches), self.values, self.cfg),
            row_seed=self.steps,
            before_update=saver.staged,
        )

    def stretch(self, steps: int, mode: str) -> dict[str, float]:
        """Train so many steps, with one save after the first unless `mode` is "none". Returns seconds."""
        saver = self.savers.get(mode, self.savers["background"])
        wait(self.ranks.device)
        self.ranks.barrier()
        start = time.perf_counter()
        seconds: dict[str, float] = {}
        for step in range(steps):
            self.step_beside(saver)
            if step == 0 and mode != "none":
                seconds = self.save(saver, seconds)
        wait(self.ranks.device)
        seconds["stretch"] = time.perf_counter() - start
        before = time.perf_counter()
        saver.wait()
        seconds["left"] = time.perf_counter() - before  # of the writing, when the stretch was over
        self.ranks.barrier()
        return seconds

    def save(self, saver: Checkpointer, seconds: dict[str, float]) -> dict[str, float]:
        """What the trainer's save does. `held`: until it returns, which is the copying if it is in the background."""
        wait(self.ranks.device)
        start = time.perf_counter()
        saver.save(self.steps, self.objective, self.optimizer, {"images": self.steps * self.cfg.train.batch_size})
        saver.save_teacher(self.steps, self.objective.teacher["backbone"], self.cfg.model, self.cfg.photometric)
        seconds["held"] = time.perf_counter() - start
        saver.jobs[-1].add_done_callback(lambda _: seconds.update(written=time.perf_counter() - start))
        return seconds


def measure(bench: SavingBench, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds, medians over the rounds; the first round, which also gets the memory, only counts as the first."""
    for _ in range(WARMUP):
        bench.step()
    first = {mode: bench.stretch(steps, mode)["held"] for mode in bench.savers}
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        plain = bench.stretch(steps, "none")["stretch"]
        times["step"].append(plain / steps)
        for mode in bench.savers:
            seconds = bench.stretch(steps, mode)
            times[f"{mode}/stalled"].append(seconds["stretch"] - plain)
            for name in ("held", "written", "left"):
                times[f"{mode}/{name}"].append(seconds[name])
    results: dict[str, Any] = {"seconds_per_step": median(times["step"]), "step_spread": _spread(times["step"])}
    for mode in bench.savers:
        results[mode] = {name: median(times[f"{mode}/{name}"]) for name in ("stalled", "held", "written", "left")}
        results[mode] |= {"first_held": first[mode], "stalled_of_rounds": times[f"{mode}/stalled"]}
        period = bench.cfg.checkpoint.every * results["seconds_per_step"]
        results[mode]["share_of_training"] = results[mode]["stalled"] / period
        results[mode]["share_held"] = results[mode]["held"] / period
    return results


def _spread(values: list[float]) -> float:
    return (max(values) - min(values)) / median(values)


def bytes_of(folder: Path) -> dict[str, int]:
    """Of the newest checkpoint and of the newest teacher."""
    checkpoint, teacher = max((folder / "checkpoints").glob("step_*")), max((folder / "teacher").glob("step_*"))
    return {"checkpoint": sum(file.stat().st_size for file in checkpoint.iterdir()), "teacher": teacher.stat().st_size}


def show(results: dict[str, Any]) -> None:
    machine, recipe, size = results["machine"], results["recipe"], results["bytes"]
    arch = f"{recipe['arch']}/{recipe['patch_size']}"
    print(f"{recipe['name']}: {arch}, batch {recipe['batch_size']}, {recipe['precision']}")
    print(f"{machine['device']} x {machine['processes']}, torch {machine['torch']}, commit {machine['commit']}")
    print(f"checkpoint {size['checkpoint'] / 2**20:.1f} MiB, teacher {size['teacher'] / 2**20:.1f} MiB")
    print(f"a step {results['seconds_per_step']:.3f} s, between rounds ± {results['step_spread'] / 2:.0%}\n")
    print(f"{'seconds a checkpoint':34}{'background':>12}{'foreground':>12}")
    rows = {
        "held": "the trainer is held (copying)",
        "first_held": "the same, the first time",
        "written": "until all is on the disk",
        "stalled": "training is late by",
    }
    for name, words in rows.items():
        print(f"{words:34}" + "".join(f"{results[mode][name]:12.3f}" for mode in ("background", "foreground")))
    print(f"\nshare of training time, at a checkpoint every {results['recipe']['every']} steps")
    for name, words in {"share_held": "held", "share_of_training": "late"}.items():
        print(f"{words:34}" + "".join(f"{results[mode][name]:12.3%}" for mode in ("background", "foreground")))


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.checkpoint", description="What a checkpoint costs the training.")
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of a stretch: more than are done while one is written")
    parser.add_argument("--dir", help="a folder on the disk to be measured; default: the temporary folder")
    parser.add_argument("--out", help="write the figures here as JSON")
    args = parser.parse_intermixed_args()
    cfg = load(RunConfig, args.recipe, ["data.sources=[synthetic]", *args.overrides])
    ranks = setup_ranks()
    with tempfile.TemporaryDirectory(dir=args.dir) as own:
        folder = Path(ranks.broadcast_object(own))
        bench = SavingBench(cfg, ranks, folder)
        with closing(bench.savers["background"]), closing(bench.savers["foreground"]):
            results = measure(bench, args.rounds, args.steps)
        ranks.barrier()
        results["bytes"] = bytes_of(folder)
        ranks.barrier()
    finish(results, args, cfg, ranks, show)


if __name__ == "__main__":
    main()
