"""dinoreg-launch sweep on a real Slurm: a grid as one array, of which one run is cancelled and one goes back."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from launching import FAST, TINY, launch, losses, steps, until

from launch.record import read_jobs

LENGTH = 60


@pytest.fixture(scope="module")
def sweep(images: Path, env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of which two are at work at once: the first is sent back to the queue, the second is cancelled."""
    folder = tmp_path_factory.mktemp("sweeps") / "registers"
    options = [TINY, f"data.sources={images}", *FAST, f"train.steps={LENGTH}", "checkpoint.every=10"]
    options += [f"run_dir={folder}", "launch.array=2", "launch.cpus_a_task=1"]
    said = launch("sweep", *options, "model.num_registers=0,1,2", env=env)
    assert "3 of 3 runs submitted" in said and "num_registers=2: job " in said
    first, second, third = (folder / f"num_registers={number}" for number in (0, 1, 2))
    until(lambda: steps(first) >= 2, "step 2")
    assert not steps(third)
    again = launch("sweep", *options, "model.num_registers=0,1,2", env=env)
    assert "num_registers=2: pending, left as it is" in again
    subprocess.run(["scancel", "--signal=USR2", job_of(first)], env=env, check=True)
    assert f"job {job_of(second)}: cancelled" in launch("cancel", second, env=env)
    until(lambda: steps(first) == steps(third) == LENGTH, "the end of both")
    until(lambda: "running" not in launch("status", folder, env=env), "the end of their jobs")
    return folder


def job_of(run_dir: Path) -> str:
    return read_jobs(run_dir)[0].id


def test_the_runs_are_elements_of_one_array(sweep: Path, env: dict[str, str]) -> None:
    array = job_of(sweep / "num_registers=0").partition("_")[0]
    assert [job_of(sweep / f"num_registers={number}") for number in (0, 1, 2)] == [f"{array}_{i}" for i in (0, 1, 2)]
    assert "#SBATCH --array=0-2%2\n" in (sweep / "jobs" / f"{array}_submission.sh").read_text()


def test_one_of_an_array_goes_back_to_the_queue_alone(sweep: Path, env: dict[str, str]) -> None:
    runs = {run.name: run for run in sweep.glob("num_registers=*")}
    starts = {name: [start.step for start in read_jobs(run)[0].starts] for name, run in runs.items()}
    assert len(starts["num_registers=0"]) == 2 and starts["num_registers=0"][1] >= 2
    assert starts["num_registers=2"] == [0]
    lines = [line.split() for line in launch("status", sweep, env=env).splitlines()]
    assert (lines[1][2], lines[1][3], lines[1][-1]) == ("finished", f"{LENGTH}/{LENGTH}", "1")
    assert [step for step, _ in losses(runs["num_registers=0"])] == list(range(1, LENGTH + 1))
    log = launch("logs", runs["num_registers=0"], env=env)
    assert "ended with 75; back to the queue" in log and f"job {job_of(runs['num_registers=0'])}, start 2, on" in log


def test_resume_brings_back_what_is_missing_and_the_table_has_all(sweep: Path, env: dict[str, str]) -> None:
    said = launch("resume", sweep, env=env)
    assert said.count("job ") == 1 and "num_registers=1" in said
    until(lambda: steps(sweep / "num_registers=1") == LENGTH, "the end of the one that was cancelled")
    until(lambda: launch("status", sweep, env=env).count("finished") == 3, "the end of its job")
    assert "3 finished" in launch("resume", sweep, env=env, fails=True)
    lines = [line.split() for line in launch("sweep", "--table", sweep, env=env).splitlines()]
    assert [line[:2] for line in lines[1:4]] == [[str(number), "finished"] for number in (0, 1, 2)]
    for number, line in enumerate(lines[1:4]):
        tail = [loss for _, loss in losses(sweep / f"num_registers={number}")][-LENGTH // 10 :]
        assert float(line[3]) == pytest.approx(sum(tail) / len(tail), abs=1e-3)
    assert (sweep / "plot.png").is_file()
