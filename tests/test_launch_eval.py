"""Evaluations without Slurm: which teachers, with what, and where their scores go."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launching import FAST, REPOSITORY, TINY, launch, outside, steps, until, write_images
from offline_wandb import sent_to_wandb

from dinoreg.config import load, to_yaml
from dinoreg.train.rundir import RunLock
from launch import jobs
from launch.config import LaunchConfig
from launch.evaluate import make_suite, plan, share
from launch.evaluating import publish
from launch.evaluations import collect, main_scores, scores
from launch.recipe import LaunchedRun
from launch.record import editing, read_jobs


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    for part in ("train", "test"):
        for name in ("a", "b"):
            write_images(folder / part / name, 4)
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """As a run leaves it that was launched on two nodes of eight GPUs, with teachers of steps 100 and 200."""
    folder = tmp_path / "run"
    (folder / "teacher").mkdir(parents=True)
    for step in (100, 200):
        (folder / "teacher" / f"step_{step:08d}.safetensors").touch()
    config = load(LaunchedRun, TINY, [f"run_dir={folder}", "tracking.wandb=offline"])
    config.launch = LaunchConfig(nodes=2, gpus_a_node=8, partition="gpu", memory="900GB", cpus_a_task=12)
    (folder / "launch.yaml").write_text(to_yaml(config))
    (folder / "config.yaml").write_text(to_yaml(config.run()))
    return folder


def write_result(run_dir: Path, step: int, value: float, name: str = "knn") -> None:
    folder = run_dir / "eval" / name / f"step_{step:08d}"
    folder.mkdir(parents=True)
    said = {"top1": {"value": value, "low": value - 1, "high": value + 1, "unit": "%"}, "top1_k5": {"value": 1.0}}
    (folder / "results.json").write_text(json.dumps({"scores": said}))


def test_an_evaluation_is_given_one_gpu_and_its_share_of_a_node(run_dir: Path, labelled: Path) -> None:
    words = ["--run", run_dir, "--data", labelled, "--all", "--dry-run", "launch.time=1h", "launch.array=2"]
    lines = launch("eval", "knn", *words, env=outside(PATH="/nowhere")).splitlines()
    assert lines[:2] == ["run step 100: not evaluated", "run step 200: not evaluated"]
    for option in ("array=0-1%2", "nodes=1", "ntasks-per-node=1", "gpus-per-node=1", "partition=gpu", "mem=113GB",
                   "cpus-per-task=12", "time=60", "job-name=run-knn"):  # fmt: skip
        assert f"#SBATCH --{option}" in lines, option
    assert share("1000", 3) == "334" and share("320G", 8) == "40G"
    assert not (run_dir / "eval").exists()


def test_the_newest_teacher_is_evaluated_unless_others_are_named(run_dir: Path, labelled: Path) -> None:
    made = plan(run_dir, make_suite("knn", None, [str(labelled)], "quick", ["k=[1]", "main_k=1"], "C"), [], "local")
    assert [target.step for target in made.newest()] == [200]
    assert [target.step for target in made.targets()] == [100, 200]
    assert [target.step for target in made.targets([100])] == [100]
    words = made.suite.words(Path("W"), Path("O"))
    assert words[:7] == ("knn", "--weights", "W", "--output", "O", "--cache", str(Path("C").absolute()))
    assert words[7:] == ("--data", str(labelled), "--preset", "quick", "k=[1]", "main_k=1")


@pytest.mark.parametrize(
    ("suite", "words", "says"),
    [
        ("kn", [], "there is no suite 'kn', only "),
        ("knn", ["--steps", "100,150"], "has no teacher of step 150; there are 100, 200"),
        ("knn", ["--steps", "new"], "--steps: 'new' are no numbers, as in 100,200"),
        ("knn", ["kk=3"], "kk: no such option; the nearest is k"),
        ("knn", ["launch.tim=3"], "launch.tim: no such option; the nearest is launch.time"),
        ("knn", ["--name", "a/b"], "--name: 'a/b' is no name of a folder"),
        ("knn", ["--run", "/no/run"], "--run: /no/run is no run: it has neither launch.yaml nor config.yaml"),
        ("knn", ["--data", "/no/images"], "--data: no such file or folder: /no/images"),
        ("knn", [], "no sbatch on PATH"),
        ("knn", ["--cluster", "debug", "--all"], "--cluster: a debugger watches one process, not 2"),
    ],
)
def test_mistakes_are_found_before_anything_is_submitted(
    suite: str, words: list[str], says: str, run_dir: Path, labelled: Path
) -> None:
    said = launch("eval", suite, "--run", run_dir, "--data", labelled, *words, env=outside(PATH="/nowhere"), fails=True)
    assert says in said and said.startswith("dinoreg-launch: ") and said.count("\n") == 1
    assert not (run_dir / "eval").exists()


def test_a_run_without_teachers_is_said_so(run_dir: Path, labelled: Path) -> None:
    for path in run_dir.glob("teacher/*"):
        path.unlink()
    said = launch("eval", "knn", "--run", run_dir, "--data", labelled, env=outside(), fails=True)
    assert "has no teacher/step_*.safetensors yet; --follow waits for them" in said


def test_results_are_collected_once_and_the_newest_count(run_dir: Path) -> None:
    write_result(run_dir, 200, 60.0)
    assert (collect(run_dir), collect(run_dir)) == (1, 0)
    write_result(run_dir, 100, 50.0)
    write_result(run_dir, 100, 40.0, "knn-10")
    assert collect(run_dir) == 2
    found = {score.name: (score.step, score.value, score.low, score.unit) for score in scores(run_dir)}
    assert found["knn top1"] == (200, 60.0, 59.0, "%") and found["knn-10 top1"][0] == 100
    assert [str(score) for score in main_scores(run_dir)] == ["60.0%", "40.0%"]
    lines = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 200, "eval/knn/top1": 60.0, "eval/knn/top1_k5": 1.0}


def test_while_a_training_has_the_directory_it_alone_talks_to_wandb(run_dir: Path) -> None:
    pytest.importorskip("wandb")
    write_result(run_dir, 100, 50.0)
    said: list[str] = []
    training = RunLock(run_dir)
    assert jobs.in_use([run_dir])
    publish(run_dir, said.append)
    assert not said and not (run_dir / "wandb").exists() and (run_dir / "evaluations.jsonl").exists()
    training.close()
    assert not jobs.in_use([run_dir])
    publish(run_dir, said.append)
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    assert sent_to_wandb(file, "eval/knn/top1") == {100: 50.0}, said
    assert len(said) == 1
    assert not jobs.in_use([run_dir])
    publish(run_dir, said.append)
    assert len(said) == 1


def test_what_was_evaluated_by_hand_is_published(run_dir: Path) -> None:
    pytest.importorskip("wandb")
    write_result(run_dir, 100, 50.0)
    assert f"{run_dir}: 1 new evaluations\n" in launch("publish", run_dir, env=outside())
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    assert sent_to_wandb(file, "eval/knn/top1") == {100: 50.0}
    assert "no run: it has no config.yaml" in launch("publish", run_dir / "eval", env=outside(), fails=True)


def test_status_tells_how_evaluations_are(run_dir: Path) -> None:
    with editing(run_dir, "1") as job:
        job.cluster, job.host = "local", socket.gethostname()
    write_result(run_dir, 100, 50.0)
    collect(run_dir)
    for step, log in ((200, "dinoreg-eval: --data: no such file or folder: /x\n"), (300, "")):
        folder = run_dir / "eval" / "knn" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        with editing(folder, f"99999999_{step}") as job:
            job.cluster, job.host, job.logs = "local", socket.gethostname(), "../../../jobs"
        (run_dir / "jobs").mkdir(exist_ok=True)
        (run_dir / "jobs" / f"99999999_{step}_0_log.out").write_text(f"job 99999999_{step}, start 1, on n: x\n{log}")
    shown = launch("status", run_dir, env=outside(PATH="/nowhere")).splitlines()
    assert "knn 50.0%" in shown[1]
    assert launch("cancel", run_dir / "eval" / "knn", env=outside()).endswith("knn: none of its runs waits or runs\n")
    assert shown[-1] == "    eval knn, step 300, and 1 more: it had not begun"


def test_results_made_in_different_ways_are_kept_apart(run_dir: Path, labelled: Path) -> None:
    folder = run_dir / "eval" / "knn"
    for step in (100, 200):
        write_result(run_dir, step, 50.0)
    suite = make_suite("knn", None, [str(labelled)], "published", [])
    (folder / "asked.json").write_text(suite.to_json())
    words, env = ["--run", run_dir, "--data", labelled, "--all", "--cluster", "local"], outside()
    assert launch("eval", "knn", *words, env=env).count("evaluated, top1 50.0%, left as it is") == 2
    said = launch("eval", "knn", *words, "temperature=0.1", env=env, fails=True)
    assert "was made with other options (--data " in said and "as in --name knn-2" in said


def test_a_run_of_this_machine_is_followed_and_ctrl_c_leaves_it_alone(
    labelled: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run_dir, env = tmp_path / "run", outside()
    options = [TINY, f"data.sources={labelled / 'train' / 'a'}", *FAST, f"run_dir={run_dir}", "train.batch_size=4"]
    launch("train", *options, "train.steps=40", "checkpoint.every=20", "--cluster", "local", env=env)
    words = ["eval", "knn", "--run", run_dir, "--data", labelled, "k=[1]", "main_k=1", "--follow", "--every", "0.5"]
    words += ["--cluster", "local"]
    command = [sys.executable, "-m", "launch", *map(str, words)]
    following = subprocess.Popen(command, env=env, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    folder = run_dir / "eval" / "knn"
    until(lambda: read_jobs(folder / "step_00000020"), "the first evaluation")
    os.kill(following.pid, signal.SIGINT)
    said, _ = following.communicate(timeout=60)
    assert following.returncode == 130 and "jobs in the queue stay there, and the same command goes on" in said
    said = launch(*words, env=env)
    assert "run step 40: evaluated, top1" in said and steps(run_dir) == 40
    for step in (20, 40):
        assert (folder / f"step_{step:08d}" / "results.json").is_file()
        assert len(read_jobs(folder / f"step_{step:08d}")) == 1
