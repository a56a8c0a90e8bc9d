"""dinoreg-launch on a real Slurm of two nodes: submit, preempt, lose a task, requeue, cancel, fail."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from launching import FAST, REPOSITORY, TINY, launch, launch_from, losses, metrics, steps, until
from slurm_lab import NODES, SlurmLab

from launch.record import read_jobs

LENGTH = 40  # steps of the long run


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody's checkout of dinoreg, with one change that is not committed."""
    folder = tmp_path_factory.mktemp("checkout") / "dinoreg"
    for part in ("dinoreg", "launch", "configs"):
        shutil.copytree(REPOSITORY / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    with (folder / "dinoreg" / "__init__.py").open("a") as file:
        file.write("\nMINE = True\n")
    return folder


def state(job: str, env: dict[str, str]) -> str:
    command = ["squeue", "-h", "-t", "all", "-j", job, "-o", "%T"]
    return subprocess.run(command, env=env, capture_output=True, text=True).stdout.strip()


def job_of(run_dir: Path) -> str:
    return read_jobs(run_dir)[-1].id


def task_of(run_dir: Path, rank: int) -> int:
    """The process of one rank: the nodes are on this machine."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:
            continue
        if f"{run_dir}/launch.yaml\0".encode() in words and f"\0SLURM_PROCID={rank}\0".encode() in variables:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.fixture(scope="module")
def survivor(
    images: Path, env: dict[str, str], checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A run on two nodes that was preempted, and lost a task; and the same run on this machine, undisturbed."""
    folder = tmp_path_factory.mktemp("runs")
    run_dir, calm = folder / "run", folder / "calm"
    options = [TINY, f"data.sources={images}", *FAST, f"train.steps={LENGTH}", "checkpoint.every=10"]
    where = [f"run_dir={run_dir}", "launch.nodes=2", "launch.cpus_a_task=1"]
    launch_from(checkout, "train", *options, *where, env=env | {"PYTHONPATH": str(checkout)})
    (checkout / "dinoreg" / "train" / "trainer.py").write_text("raise SystemExit('edited after the submission')\n")
    job = job_of(run_dir)
    until(lambda: steps(run_dir) >= 3, "step 3")
    subprocess.run(["srun", "-p", "high", "-N", "2", "--exclusive", "true"], env=env, check=True)
    until(lambda: len(read_jobs(run_dir)[-1].starts) == 2, "a second start")
    until(lambda: steps(run_dir) >= 12, "step 12")
    os.kill(task_of(run_dir, rank=1), signal.SIGKILL)
    launch("train", *options, f"run_dir={calm}", "launch.gpus_a_node=2", "--cluster", "local", env=env)
    for run in (run_dir, calm):
        until(lambda run=run: steps(run) == LENGTH, f"the end of {run}")
    until(lambda: state(job, env) == "COMPLETED", "the end of the job")
    until(lambda: "running" not in launch("status", calm, env=env), "the end of the calm one")
    return run_dir, calm


def test_a_run_that_was_preempted_and_lost_a_task_learns_what_an_undisturbed_one_does(
    survivor: tuple[Path, Path],
) -> None:
    """Bit for bit, in one metrics.jsonl, with the program as it was when it was submitted."""
    run_dir, calm = survivor
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, LENGTH + 1))
    assert losses(run_dir) == losses(calm)


def test_the_record_says_what_was_run_and_where_it_went_on(survivor: tuple[Path, Path]) -> None:
    run_dir, _ = survivor
    (job,) = read_jobs(run_dir)
    first, second, third = job.starts
    assert first.step == 0 and 3 <= second.step < 12 and third.step in (10, 20, 30)
    assert [start.nodes for start in job.starts] == ["127.0.0.[2-3]"] * 3
    code = run_dir / job.code
    assert job.commit == (code / "commit.txt").read_text().strip() and job.commit.endswith("+")
    assert "+MINE = True" in (code / "changes.diff").read_text()
    assert "max_requeues_without_progress: 5" in (run_dir / "launch.yaml").read_text()


def test_status_shows_the_finished_run(survivor: tuple[Path, Path], env: dict[str, str]) -> None:
    run_dir, calm = survivor
    header, quiet, survived = launch("status", run_dir.parent, env=env).splitlines()
    assert header.split()[:4] == ["RUN", "JOB", "STATE", "STEP"]
    words = survived.split()
    assert words[:4] == [str(run_dir), job_of(run_dir), "finished", f"{LENGTH}/{LENGTH}"] and words[-1] == "2"
    assert quiet.split()[0] == str(calm) and quiet.split()[2] == "finished"


def test_a_lost_node_costs_what_came_after_the_last_checkpoint(
    survivor: tuple[Path, Path], images: Path, lab: SlurmLab, env: dict[str, str], tmp_path: Path
) -> None:
    """Its power is cut; when it is back, the job goes on by itself."""
    run_dir, calm = tmp_path / "run", survivor[1]
    options = [TINY, f"data.sources={images}", *FAST, f"train.steps={LENGTH}", "checkpoint.every=10"]
    launch("train", *options, f"run_dir={run_dir}", "launch.nodes=2", "launch.cpus_a_task=1", env=env)
    until(lambda: steps(run_dir) >= 12, "step 12")
    lab.kill_node(NODES[1])
    until(lambda: state(job_of(run_dir), env) != "RUNNING", "the job's return to the queue")
    lab.start_node(NODES[1])
    until(lambda: steps(run_dir) == LENGTH, "the end")
    assert losses(run_dir) == losses(calm)
    (job,) = read_jobs(run_dir)
    assert [start.step for start in job.starts] == [0, 10] or job.starts[-1].step in (20, 30)
    assert "rank 1 (pid" in launch("logs", run_dir, env=env)


def test_a_cancelled_run_is_saved_and_stays_away(images: Path, env: dict[str, str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    options = [TINY, f"data.sources={images}", *FAST, "train.steps=5000", "checkpoint.every=5000"]
    launch("train", *options, f"run_dir={run_dir}", env=env)
    until(lambda: steps(run_dir) >= 3, "step 3")
    assert f"has job {job_of(run_dir)} already" in launch("resume", run_dir, env=env, fails=True)
    assert "cancelled" in launch("cancel", run_dir, env=env)
    until(lambda: state(job_of(run_dir), env) == "CANCELLED", "the end of the job")
    status = launch("status", run_dir, env=env).splitlines()
    done = steps(run_dir)
    assert status[1].split()[2:4] == ["cancelled", f"{done}/5000"] and f"step {done} is saved" in status[2]
    assert (run_dir / "checkpoints" / f"step_{done:08d}").is_dir()
    assert len(read_jobs(run_dir)[-1].starts) == 1


def test_requeues_that_bring_nothing_end(images: Path, env: dict[str, str], tmp_path: Path) -> None:
    """The time limit is over before the first step, each time."""
    run_dir = tmp_path / "run"
    options = [TINY, f"data.sources={images}", *FAST, "train.time_limit=0.01s"]
    launch("train", *options, f"run_dir={run_dir}", "launch.max_requeues_without_progress=0", env=env)
    until(lambda: state(job_of(run_dir), env) == "FAILED", "the end of the job")
    last = launch("status", run_dir, env=env).splitlines()[-1]
    assert last.startswith("    1 requeues brought nothing new: still at step 0. Find out why")
    log = launch("logs", run_dir, env=env)
    assert f"job {job_of(run_dir)}, start 2, on" in log and "stopped by train.time_limit; nothing was done yet" in log


def test_a_job_that_dies_in_its_first_second_says_why(images: Path, env: dict[str, str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    launch("train", TINY, f"data.sources={images}", f"run_dir={run_dir}", "launch.python=/no/python", env=env)
    until(lambda: state(job_of(run_dir), env) == "FAILED", "the end of the job")
    _, line, why = launch("status", run_dir, env=env).splitlines()
    assert line.split()[2] == "failed" and "/no/python" in why and "No such file or directory" in why


def test_one_task_a_gpu_with_all_that_was_asked_for(images: Path, env: dict[str, str], tmp_path: Path) -> None:
    """The GPUs of this cluster cannot compute, so the processes do it on the CPU."""
    run_dir = tmp_path / "run"
    asked = ["partition=gpu", "gpus_a_node=2", "cpus_a_task=4", "memory=20GB", "time=30m", "comment=try"]
    options = [f"data.sources={images}", *FAST, f"run_dir={run_dir}", "train.steps=2"]
    launch("train", TINY, *options, *(f"launch.{each}" for each in asked), "launch.sbatch=[exclusive]", env=env)
    until(lambda: state(job_of(run_dir), env) in ("COMPLETED", "FAILED"), "the end of the job")
    assert steps(run_dir) == 2, launch("logs", run_dir, env=env)
    shown = subprocess.run(["scontrol", "show", "job", job_of(run_dir)], env=env, capture_output=True, text=True).stdout
    for word in ("NumTasks=2", "CPUs/Task=4", "MinMemoryNode=20G", "TimeLimit=00:30:00", "TresPerNode=gres:gpu:2",
                 "OverSubscribe=NO", "Comment=try", "NodeList=127.0.0.4"):  # fmt: skip
        assert word in shown, shown
    assert "on 127.0.0.4: from step 0" in launch("logs", run_dir, env=env)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("launch.partition=gpus", "launch.partition: there is no 'gpus' here, only gpu, high, main"),
        ("launch.gpus_a_node=2", "launch.gpus_a_node: 2 GPUs on a node, but those of partition main have none"),
        (
            "launch.partition=gpu launch.gpus_a_node=4",
            "launch.gpus_a_node: 4 GPUs on a node, but those of partition gpu have 2",
        ),
        ("launch.nodes=4", "launch.nodes: partition main has 2 nodes, not 4"),
        ("launch.sbatch=[reservation=mine]", "nothing is queued, for sbatch says: Batch job submission failed: Req"),
    ],
)
def test_what_the_cluster_cannot_do_is_one_line_and_no_job(
    option: str, says: str, images: Path, env: dict[str, str], tmp_path: Path
) -> None:
    words = [f"data.sources={images}", f"run_dir={tmp_path / 'run'}", *option.split()]
    said = launch("train", TINY, *words, env=env, fails=True)
    assert said.startswith(f"dinoreg-launch: {says}") and said.count("\n") == 1
    assert not read_jobs(tmp_path / "run")
