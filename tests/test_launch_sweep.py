"""Sweeps without Slurm: grids, their names and mistakes, on this machine, and what comes of them."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import signal
from pathlib import Path

import pytest
import yaml
from launching import FAST, TINY, launch, outside, processes_of, steps, until, write_images
from PIL import Image

from dinoreg.config import ConfigError
from launch.grid import Axis, name_of, points, short_names, split_axes
from launch.recipe import LaunchedRun
from launch.record import editing, read_jobs
from launch.status import natural
from launch.sweep import leave_out

LENGTH = 150  # steps: some seconds, in which something can happen to a run


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


def test_options_with_several_values_are_axes_and_lists_are_not() -> None:
    words = ["model.num_registers=0,1,2", "optim.betas=[0.9,0.95],[0.9,0.999]", "seed=3", "data.sources=a,b"]
    words += ["optim.betas=[0.8,0.9]", "data.sources=['x,y']", "launch.exclude=n1,n2", "data.root={a,b}"][1:]
    axes, rest = split_axes(words)
    assert axes == [
        Axis("model.num_registers", ("0", "1", "2")),
        Axis("optim.betas", ("[0.9,0.95]", "[0.9,0.999]")),
    ]
    assert rest == ["seed=3", "data.sources=a,b", "data.sources=['x,y']", "launch.exclude=n1,n2", "data.root={a,b}"]
    assert [point[0][-1] + point[1][-5:] for point in points(axes)][:3] == ["00.95]", "0.999]", "10.95]"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["seed=3"], "no option has several values: give one, as in model.num_registers"),
        (["seed=0,,1"], "seed: one of its values is empty: 0,,1"),
        (["seed=0,1,"], "seed: one of its values is empty"),
        (["seed=0,1", "seed=2"], "seed: is given twice"),
        (["run_dir=a,b"], "run_dir: is the folder of them all"),
    ],
)
def test_a_grid_that_is_none_is_said_in_one_line(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        split_axes(words)


def test_names_are_those_of_values_and_of_safe_files() -> None:
    config = LaunchedRun()
    config.model.init_from = "/a/file of mine.pth"
    axes = [Axis("seed", ("0",)), Axis("model.init_from", ("",)), Axis("optim.betas", ("",))]
    name = name_of(config, axes)
    assert name.startswith("seed=0,init_from=a_file_of_mine.pth-") and "/" not in name and " " not in name
    assert short_names(["optim.lr", "seed", "data.seed"]) == {
        "optim.lr": "lr",
        "seed": "seed",
        "data.seed": "data.seed",
    }
    paths = [Path(f"x/num_registers={value}") for value in (16, 0, 4, "none", "1e-05", 0.5)]
    order = [path.name.partition("=")[2] for path in sorted(paths, key=natural)]
    assert order == ["0", "1e-05", "0.5", "4", "16", "none"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model.num_regs=0,1"], "model.num_regs: no such option; the nearest is model.num_registers"),
        (["optim.lr=1e-3,2e-3,0.001"], "the same value twice: optim.lr=0.001 is lr=0.001 again"),
        (["optim.lr=1e-3,-1"], "optim.lr: must be more than 0, not -1.0"),
        (["seed=0,1", "launch.nodes=2", "--cluster", "local"], "launch.nodes: this machine is one node, not 2"),
        (["seed=0,1"], "no sbatch on PATH"),
        (["seed=0,1,2,3", "--most", "3"], "a grid of 4 runs; if that is meant, say --most 4"),
        (["seed=0,1", "launch.array=0"], "launch.array: must be at least 1, not 0"),
    ],
)
def test_mistakes_are_found_before_any_run_is_submitted(
    words: list[str], says: str, images: Path, tmp_path: Path
) -> None:
    options = [TINY, f"data.sources={images}", f"run_dir={tmp_path / 'sweep'}", *words]
    said = launch("sweep", *options, env=outside(PATH="/nowhere"), fails=True)
    assert said.startswith(f"dinoreg-launch: {says}") and said.count("\n") == 1
    assert not list(tmp_path.glob("sweep/*=*"))


def test_a_dry_run_shows_the_runs_and_one_script(images: Path, tmp_path: Path) -> None:
    words = ["seed=0,1,2", "optim.lr=1e-3,2e-3", "launch.array=4", f"run_dir={tmp_path / 'sweep'}", "--dry-run"]
    said = launch("sweep", TINY, f"data.sources={images}", *words, env=outside(PATH="/nowhere"))
    assert said.startswith("axes: seed = 0, 1, 2; optim.lr = 1e-3, 2e-3\n6 runs in ")
    assert "    seed=2,lr=0.001\n" in said and "#SBATCH --array=0-5%4\n" in said
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_of_this_machine_runs_is_extended_cancelled_and_resumed(images: Path, tmp_path: Path) -> None:
    """One after another; a task that is killed starts again."""
    folder, env = tmp_path / "sweep", outside()
    options = [
        TINY,
        f"data.sources={images}",
        *FAST,
        f"run_dir={folder}",
        f"train.steps={LENGTH}",
        "checkpoint.every=10",
    ]
    said = launch("sweep", *options, "model.num_registers=0,2", "--cluster", "local", env=env)
    assert "2 of 2 runs submitted" in said
    first, second = (folder / f"num_registers={number}" for number in (0, 2))
    until(lambda: steps(first) >= 12, "step 12")
    assert not steps(second)
    os.kill(processes_of(first)[0], signal.SIGKILL)
    launch("cancel", second, env=env)
    until(lambda: steps(first) == LENGTH, "the end of the first")
    until(lambda: read_jobs(second)[0].ended, "the end of the other, which never began")
    words = [line.split() for line in launch("status", folder, env=env).splitlines()]
    assert [word[2] for word in words[1:3]] == ["finished", "cancelled"] and words[1][-1] == "1"
    assert not steps(second) and [start.step for start in read_jobs(first)[0].starts][1] in range(10, LENGTH, 10)
    assert "ended with 137; again" in launch("logs", first, env=env)

    said = launch("sweep", *options, "model.num_registers=0,2,1", "launch.array=2", "--cluster", "local", env=env)
    assert "num_registers=0: finished, left as it is" in said and "2 of 3 runs submitted" in said
    both = [second, folder / "num_registers=1"]
    until(lambda: all(steps(run) >= 1 for run in both), "both at once")
    assert set(leave_out({run.name: run for run in both}).values()) == {"running"}
    assert launch("cancel", folder, env=env).count("cancelled") == 2
    until(lambda: all(read_jobs(run)[-1].ended for run in both), "the end of both")
    assert "num_registers=1 | job " in launch("logs", folder, env=env)
    assert "no sbatch on PATH" in launch("resume", folder, env=outside(PATH="/nowhere"), fails=True)
    assert "watches one run" in launch("resume", folder, "--cluster", "debug", env=env, fails=True)
    assert launch("resume", folder, "--cluster", "local", env=env).count("job ") == 2
    assert "has no run to go on with: 1 finished, 2 " in launch(
        "resume", folder, "--cluster", "local", env=env, fails=True
    )
    launch("cancel", folder, env=env)
    until(lambda: all(read_jobs(run)[-1].ended for run in both), "the end of both again")


def test_a_folder_belongs_to_one_sweep(images: Path, tmp_path: Path) -> None:
    folder, env = tmp_path / "sweep", outside(PATH="/nowhere")
    finished_run(folder / "seed=0", {"seed": 0})
    finished_run(folder / "seed=1", {"seed": 1})
    write_sweep(folder, images, "seed")
    options = [TINY, f"data.sources={images}", f"run_dir={folder}", "--cluster", "local"]
    said = launch("sweep", *options, "optim.lr=1e-3,2e-3", env=env, fails=True)
    assert "is a sweep over seed, not over optim.lr; give another folder" in said
    said = launch("sweep", *options, "seed=0,1,2", "optim.lr=0.1", env=env, fails=True)
    assert "is a sweep with other options: optim.lr=0.1 (was 0.001)" in said
    (run := tmp_path / "run").mkdir()
    with editing(run, "1"):
        pass  # was launched
    said = launch("sweep", TINY, f"data.sources={images}", f"run_dir={run}", "seed=0,1", env=env, fails=True)
    assert "is a run; give another folder to the sweep" in said
    with (folder / "sweep.json.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = launch("sweep", *options, "seed=7,8", env=env, fails=True)
    assert "is in use by another sweep command; try again when that has ended" in said
    said = launch("sweep", "--table", tmp_path, env=env, fails=True)
    assert "is no folder of a sweep: it has no sweep.json" in said


def finished_run(run: Path, options: dict[str, object], loss: float = 2.0, score: float | None = None) -> None:
    """What a run that was launched leaves, as far as a table is made from it."""
    recipe = {"train": {"batch_size": 8, "steps": 20, "epochs": None, "images": None}, **options}
    (run / "checkpoints" / "step_00000020").mkdir(parents=True)
    (run / "launch.yaml").write_text(yaml.safe_dump(recipe))
    with editing(run, "1") as job:
        job.cluster, job.host = "local", "elsewhere"
    lines = [{"step": step, "loss/total": loss + (step < 20), "knn/top1": 0.25} for step in range(10, 21)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if score is not None:
        folder = run / "eval" / "knn" / "step_00000020"
        folder.mkdir(parents=True)
        said = {
            name: {"value": score, "low": score - 1, "high": score + 1, "unit": "%"} for name in ("top1", "top1_k5")
        }
        (folder / "results.json").write_text(json.dumps({"scores": said}))


def write_sweep(folder: Path, images: Path, *keys: str) -> None:
    """As if it had been submitted from tiny.yaml."""
    (folder / "sweep.json").write_text(json.dumps({"axes": {key: key for key in keys}}))
    (folder / "sweep.yaml").write_text(f"base: {TINY}\ndata: {{sources: {images}}}\nrun_dir: {folder}\n")


def test_the_table_holds_every_score_of_every_run(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "registers"
    for number in (16, 0, 4):
        score = None if number == 4 else 50.0 + number
        finished_run(folder / f"num_registers={number}", {"model": {"num_registers": number}}, 3 - number / 8, score)
    early = folder / "num_registers=0" / "eval" / "knn"
    (early / "step_00000020").rename(early / "step_00000010")
    write_sweep(folder, images, "model.num_registers")
    lines = launch("sweep", "--table", folder, env=outside()).splitlines()
    assert lines[0].split() == ["num_registers", "state", "step", "loss", "k-NN", "in", "training", "knn", "top1"]
    assert [line.split() for line in lines[1:4]] == [
        ["0", "finished", "20", "3.000", "25.0%", "50.0%", "at", "10"],
        ["4", "finished", "20", "2.500", "25.0%", "-"],
        ["16", "finished", "20", "1.000", "25.0%", "66.0%"],
    ]
    assert (folder / "table.md").read_text().splitlines()[2] == "| 0 | finished | 20 | 3.000 | 25.0% | 50.0% at 10 |"
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert rows[2]["knn top1_k5"] == "66.0" and rows[2]["knn top1 low"] == "65.0" and rows[1]["knn top1"] == ""
    assert Image.open(folder / "plot.png").size[0] > 1000
    assert "knn 66.0%" in launch("status", folder / "num_registers=16", env=outside())


@pytest.mark.parametrize("seconds", [3, 12])
def test_two_axes_are_drawn_as_lines_or_as_a_map(seconds: int, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    for seed in range(seconds):
        for lr in (0.1, 0.2):
            finished_run(folder / f"lr={lr},seed={seed}", {"optim": {"lr": lr}, "seed": seed}, loss=seed)
    write_sweep(folder, images, "optim.lr", "seed")
    lines = launch("sweep", "--table", folder, env=outside()).splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["0.1", "0"], ["0.1", "1"]]
    colours = Image.open(folder / "plot.png").convert("RGB").getcolors(1 << 20)
    assert colours is not None and len(colours) > 100
