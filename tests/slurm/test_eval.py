"""dinoreg-launch eval on a real Slurm: teachers are evaluated as they appear, each once, and wandb hears of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import FAST, TINY, launch, until, write_images
from offline_wandb import sent_to_wandb

from launch.record import read_jobs

EVERY, LENGTH = 40, 80  # steps between teachers, and of the run


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    for part in ("train", "test"):
        for name in ("a", "b"):
            write_images(folder / part / name, 4)
    return folder


@pytest.fixture(scope="module")
def followed(
    images: Path, labelled: Path, env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A run that was followed from its submission to its end, and what was said meanwhile."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    options = [TINY, f"data.sources={images}", *FAST, f"run_dir={run_dir}", "tracking.wandb=offline"]
    length = [f"train.steps={LENGTH}", f"checkpoint.every={EVERY}", "launch.cpus_a_task=1", "launch.signal_seconds=120"]
    launch("train", *options, *length, env=env)
    said = launch("eval", "knn", *knn(run_dir, labelled), "--follow", "--every", 0.5, env=env)
    return run_dir, said


def knn(run_dir: Path, labelled: Path) -> list[object]:
    return ["--run", run_dir, "--data", labelled, "k=[1,3]", "main_k=3"]


def results(run_dir: Path) -> dict[int, float]:
    paths = run_dir.glob("eval/knn/step_*/results.json")
    return {int(path.parent.name[5:]): json.loads(path.read_text())["scores"]["top1"]["value"] for path in paths}


def test_every_teacher_is_evaluated_once(followed: tuple[Path, str], labelled: Path, env: dict[str, str]) -> None:
    run_dir, said = followed
    assert sorted(results(run_dir)) == [EVERY, LENGTH]
    assert f"run step {EVERY}: evaluated, top1" in said and f"run step {LENGTH}: evaluated, top1" in said
    lines = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert {line["step"]: line["eval/knn/top1"] for line in lines} == results(run_dir) and len(lines) == 2
    again = launch("eval", "knn", *knn(run_dir, labelled), "--all", env=env)
    assert again.count("left as it is") == 2 and "job" not in again


def test_it_ran_on_what_the_run_was_given_with_the_program_of_then(followed: tuple[Path, str]) -> None:
    run_dir, _ = followed
    folder = run_dir / "eval" / "knn" / f"step_{EVERY:08d}"
    (job,) = read_jobs(folder)
    script = (run_dir / "jobs" / f"{job.id.partition('_')[0]}_submission.sh").read_text()
    assert "#SBATCH --cpus-per-task=1\n" in script and "#SBATCH --job-name=run-knn\n" in script
    assert f"cd {run_dir}/code/" in script and (folder / job.code / "__main__.py").is_file()


def test_wandb_has_every_score_at_its_step(followed: tuple[Path, str]) -> None:
    run_dir, _ = followed
    files = list(run_dir.glob("wandb/offline-run-*/*.wandb"))
    scores = [sent_to_wandb(path, "eval/knn/top1") for path in files]
    assert {step: value for each in scores for step, value in each.items()} == results(run_dir)
    assert sum(map(len, scores)) == 2  # each of them once
    (identity,) = {path.parent.name.rpartition("-")[2] for path in files}
    assert identity == (run_dir / "wandb_id.txt").read_text().strip()


def test_status_says_the_last_score_and_why_an_evaluation_failed(
    followed: tuple[Path, str], labelled: Path, env: dict[str, str]
) -> None:
    run_dir, _ = followed
    shown = launch("status", run_dir, env=env).splitlines()
    assert f"knn {results(run_dir)[LENGTH]:.1f}%" in shown[1] and len(shown) == 2
    words = ["--name", "knn-33", "image_size=33", "--steps", EVERY]
    assert "job" in launch("eval", "knn", *knn(run_dir, labelled), *words, env=env)
    until(lambda: "33 pixels" in launch("status", run_dir, env=env), "the failure")
    assert f"    eval knn-33, step {EVERY}: image_size: 33 pixels" in launch("status", run_dir, env=env)
    assert "33 pixels" in launch("logs", run_dir / "eval" / "knn-33" / f"step_{EVERY:08d}", env=env)
