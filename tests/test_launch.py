"""The launcher without Slurm: its section of a recipe, its script, snapshots, records, reasons, and this machine."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launching import FAST, REPOSITORY, TINY, launch, outside, steps, until, write_images

from dinoreg.config import ConfigError, load
from dinoreg.train.recipe import RunConfig
from launch.checks import find_partition, why_local
from launch.config import LaunchConfig, minutes_of
from launch.glance import glance
from launch.local import gpus_of as own_gpus
from launch.logs import end_of, reason_in
from launch.record import Job, Start, editing, read_jobs
from launch.slurm import JobState, Partition, gpus_of
from launch.snapshot import take_snapshot
from launch.status import find_runs, rows, table
from launch.task import Task, peers


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("12:00:00", 720), ("2-12", 3600), ("1-00:00:30", 1441), ("5:30", 6), ("3h50m", 230), ("90s", 2)],
)
def test_times_are_read_as_people_and_slurm_write_them(text: str, minutes: int) -> None:
    assert minutes_of(text) == minutes


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"nodes": 0}, "nodes: must be at least 1"),
        ({"time": "soon"}, "time: not a time: 'soon'"),
        ({"time": "2m"}, "time: 2m is over before launch.signal_seconds 180"),
        ({"env": ["NCCL DEBUG"]}, "env: 'NCCL DEBUG' is not of the form NAME=value"),
        ({"sbatch": ["--qos=high"]}, "sbatch: --qos is said by launch.qos"),
        ({"sbatch": ["array=0-3"]}, "sbatch: --array is said by launch.array"),
    ],
)
def test_mistakes_in_the_section_are_one_line(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LaunchConfig(**options).check()  # type: ignore[arg-type]


def test_dinoreg_train_passes_over_the_section(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {TINY}\nseed: 3\nlaunch: {{nodes: 4, whatever: 1}}\n")
    assert load(RunConfig, recipe).seed == 3


def test_the_script_says_what_the_recipe_does(images: Path, tmp_path: Path) -> None:
    """Also on a machine without Slurm."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {TINY}\nrun_dir: {tmp_path}/my run\ndata: {{sources: {images}}}\n"
        "launch: {nodes: 2, gpus_a_node: 4, partition: gpu, account: lab, time: 12:00:00, memory: 320GB,\n"
        "  cpus_a_task: 10, env: [NCCL_SOCKET_IFNAME=ib0, 'WORDS=a b'], setup: [module load cuda],\n"
        "  container_image: /images/d.sqsh, container_mounts: ['/data:/data'], sbatch: [exclusive, reservation=big]}\n"
    )
    lines = launch("train", recipe, "launch.nodes=1", "--dry-run", env=outside(PATH="/nowhere")).splitlines()
    for option in ("nodes=1", "ntasks-per-node=4", "gpus-per-node=4", "partition=gpu", "account=lab", "time=720",
                   "mem=320GB", "cpus-per-task=10", "signal=USR2@180", "requeue", "exclusive", "reservation=big",
                   "job-name='my run'"):  # fmt: skip
        assert f"#SBATCH --{option}" in lines, option
    assert lines.index("module load cuda") < lines.index("export WORDS='a b'") < lines.index("# command")
    (srun,) = [line for line in lines if line.startswith("srun")]
    for word in ("--cpus-per-task=10", "--container-image=/images/d.sqsh", "--kill-on-bad-exit=0", " python3 -u -m"):
        assert word in srun
    assert f"--container-mounts={tmp_path}/my run:{tmp_path}/my run,/data:/data" in srun
    assert not (tmp_path / "my run").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["launch.nodes=3"], "train.batch_size: 8 images are not divided by 3 processes"),
        (["data.sources=/no/images"], "data.sources: no such file or folder: /no/images"),
        (["launch.nods=3"], "launch.nods: no such option; the nearest is launch.nodes"),
        (["optim.lr=-1"], "optim.lr: must be more than 0"),
        ([], "no sbatch on PATH: this is no machine of a Slurm cluster"),
        (["launch.nodes=2", "--cluster", "local"], "launch.nodes: this machine is one node, not 2"),
        (["launch.gpus_a_node=2", "--cluster", "debug"], "launch.gpus_a_node: a debugger watches one process"),
        (["run_dir=runs/50%j"], "run_dir: Slurm would read '%j' in the name of a log as something else"),
        (["run_dir=/proc/run", "--cluster", "local"], "run_dir: /proc/run: No such file or directory"),
    ],
)
def test_mistakes_are_found_before_anything_is_submitted(
    options: list[str], says: str, images: Path, tmp_path: Path
) -> None:
    words = [TINY, f"data.sources={images}", f"run_dir={tmp_path / 'run'}", *options]
    said = launch("train", *words, env=outside(PATH="/nowhere"), fails=True)
    assert said.startswith(f"dinoreg-launch: {says}") and said.count("\n") == 1
    assert not (tmp_path / "run" / "launch.json").exists()


def test_gpus_are_counted_as_slurm_lists_them() -> None:
    for text, count in {"(null)": 0, "gpu:8": 8, "gpu:a100:4(S:0-1),nvme:1": 4, "gpu:a:2,gpu:b:3": 5}.items():
        assert gpus_of(text) == count


def test_the_default_partition_is_the_clusters() -> None:
    known = {"cpu": Partition(4, 0, 64, frozenset(), True), "gpu": Partition(2, 8, 96, frozenset(), False)}
    assert find_partition(LaunchConfig(nodes=4), known) is known["cpu"]
    assert find_partition(LaunchConfig(partition="cpu,gpu", gpus_a_node=8), known) is known["gpu"]
    with pytest.raises(ConfigError, match=r"8 tasks with 16 CPUs each, but the nodes of partition gpu have 96"):
        find_partition(LaunchConfig(partition="gpu", gpus_a_node=8, cpus_a_task=16), known)
    with pytest.raises(ConfigError, match=r"there is no default; give one of gpu"):
        find_partition(LaunchConfig(), {"gpu": known["gpu"]})


def test_folders_of_one_machine_are_known() -> None:
    mounts = "/dev/vda / ext4 rw 0 0\nnas:/home /home nfs rw 0 0\ntmpfs /fast\\040disk tmpfs rw 0 0\n"
    assert why_local(Path("/home/me/runs"), mounts) is None and why_local(Path("/data/runs"), mounts) is None
    assert why_local(Path("/fast disk/run"), mounts) == "in memory (tmpfs at /fast disk)"
    assert why_local(Path("/tmp/run"), mounts) == "in /tmp of this machine"


def test_a_snapshot_runs_by_itself_and_is_one_folder_for_one_content(tmp_path: Path) -> None:
    first, second = take_snapshot(tmp_path), take_snapshot(tmp_path)
    assert first == second and [first.folder.name] == [path.name for path in (tmp_path / "code").iterdir()]
    shown = subprocess.run(
        [sys.executable, first.folder, "train", "--help"], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    assert "own_images_1gpu" in shown.stdout
    assert not list(first.folder.glob("tests")) and (first.folder / "launch" / "task.py").is_file()


def test_starts_without_progress_are_counted_from_the_last_progress() -> None:
    job = Job("1", starts=[Start(number, "", step, "") for number, step in enumerate((0, 0, 4, 4, 4))])
    assert job.vain_starts(Start(5, "", 4, "")) == 3
    assert job.vain_starts(Start(5, "", 6, "")) == 0
    assert job.vain_starts(Start(1, "", 0, "")) == 1  # seen by another task: later ones do not count


def test_a_job_that_starts_in_vain_once_too_often_ends(tmp_path: Path) -> None:
    with editing(tmp_path, "7") as job:
        job.starts = [Start(number, "", 0, "node1") for number in range(3)]
    end = Task(str(tmp_path), "", "", "slurm", 2).begin("7", 3, "node1", True, io.StringIO())
    assert end is not None and "3 requeues brought nothing new: still at step 0" in end
    assert Task(str(tmp_path), "", "", "slurm", 3).begin("7", 3, "node1", True, log := io.StringIO()) is None
    assert log.getvalue() == "job 7, start 4, on node1: from step 0\n" and len(read_jobs(tmp_path)[0].starts) == 5


def test_local_peers_find_each_other_and_no_others() -> None:
    first, second, other = (peers(job, rank, 2) for job, rank in (("4711", 0), ("4711", 1), ("4712", 0)))
    assert first["MASTER_PORT"] == second["MASTER_PORT"] != other["MASTER_PORT"] and second["RANK"] == "1"


def test_local_jobs_that_run_at_once_have_gpus_of_their_own() -> None:
    assert [own_gpus(slot, 2, None) for slot in (0, 1)] == ["0,1", "2,3"]
    assert [own_gpus(slot, 1, "5,7") for slot in (0, 1, 2)] == ["5", "7", ""]
    assert own_gpus(0, 0, "5,7") == ""


@pytest.mark.parametrize(
    ("log", "why"),
    [
        ("Traceback\n  File x\nValueError: bad\nsrun: error: n1: task 0: Exited with exit code 1\n", "ValueError: bad"),
        ("dinoreg: run_dir: /x is in use\nsrun: error: n: task 1: Killed\n", "run_dir: /x is in use"),
        (
            "rank 1 (pid 7 on n2) is gone: no sign of life\nsrun: error: n2: task 1: Killed\n",
            "rank 1 (pid 7 on n2) is gone: no sign of life",
        ),
        ("slurmstepd: error: *** JOB 9 ON n1 CANCELLED AT 12:00 DUE TO TIME LIMIT ***\n", None),
        ("slurmstepd-n1: error: execve(): /no/python: No such file\n", None),
        ("/var/spool/job7/slurm_script: line 20: module: command not found\n", None),
        (
            "/r/step_00000004.safetensors: dinoreg: 3 blocks\nsrun: error: n: task 0: Killed\n",
            "srun: error: n: task 0: Killed",
        ),
        ("[rank0]: Traceback\n[rank0]: RuntimeError: bad\nsrun: error: n: task 0: Exited\n", "RuntimeError: bad"),
        ("step 1/4 | loss 3\n", ""),
    ],
)
def test_the_reason_is_the_runs_own_line(log: str, why: str | None) -> None:
    assert (reason_in(log) or "") == (log.strip() if why is None else why)


def test_a_glance_at_a_run_of_epochs(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {batch_size: 8, steps: null, epochs: 2.0, images: null}\n")
    lines = [
        {"step": 5, "images": 40, "epoch": 0.4, "throughput/images_per_second": 16.0, "knn/top1": 0.25},
        {"step": 10, "images": 80, "epoch": 0.8, "throughput/images_per_second": 4.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1')
    (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000015.partial").mkdir()
    seen = glance(tmp_path)
    assert (seen.step, seen.total, seen.checkpoint, seen.score) == (10, 25, 10, "k-NN 25.0%")
    assert seen.seconds_left == 15 * 8 / 4.0 and not seen.finished


@pytest.mark.parametrize(
    ("log", "note"),
    [
        (
            "dinoreg: stopped by SIGTERM; step 10 is saved\nsrun: error: n: task 1: Killed",
            "stopped by SIGTERM; step 10",
        ),
        ("step 12/25\nsrun: error: n: task 1: Killed", "it had no time to save what came after step 10"),
    ],
)
def test_status_says_whether_a_cancelled_run_was_saved(log: str, note: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "99999999_0_log.out").write_text(f"job 99999999, start 1, on n: from step 0\n{log}\n")
    with editing(tmp_path, "99999999") as job:
        job.cluster, job.host, job.cancelled = "local", socket.gethostname(), "today"
        job.starts = [Start(0, "", 0, "n")]
    shown = table(rows(find_runs([tmp_path]))).splitlines()
    assert shown[1].split()[:4] == [str(tmp_path), "99999999", "cancelled", "10/?"]
    assert shown[2].startswith(f"    {note}")


def slurm_job(run_dir: Path, number: str) -> None:
    with editing(run_dir, number) as job:
        job.cluster = "slurm"


def test_a_slurm_that_does_not_answer_is_no_reason_to_submit_again(images: Path, tmp_path: Path) -> None:
    run_dir, commands = tmp_path / "run", tmp_path / "bin"
    run_dir.mkdir()
    commands.mkdir()
    slurm_job(run_dir, "7")
    (commands / "squeue").write_text("#!/bin/sh\necho squeue: error: Unable to contact slurm controller >&2\nexit 1\n")
    (commands / "squeue").chmod(0o755)
    env = outside(PATH=f"{commands}:{os.environ['PATH']}")
    _, line, note = launch("status", run_dir, env=env).splitlines()
    assert line.split()[1:3] == ["7", "unknown"] and note == "    squeue: error: Unable to contact slurm controller"
    again = ["train", TINY, f"data.sources={images}", f"run_dir={run_dir}"]
    for words in (again, ["cancel", run_dir]):
        said = launch(*words, env=env, fails=True)
        assert said == "dinoreg-launch: squeue: error: Unable to contact slurm controller\n"
    (commands / "squeue").write_text(f"#!/bin/sh\n[ \"$6 $7\" = '-u {os.getuid()},1234' ] && echo '7|RUNNING|None'\n")
    os.chown(run_dir / "launch.json", 1234, -1)  # a colleague's run
    assert f"{run_dir} has job 7 already" in launch(*again, env=env, fails=True)


def test_a_job_that_is_submitted_from_another_job_inherits_nothing_of_it(images: Path, tmp_path: Path) -> None:
    commands, run_dir = tmp_path / "bin", tmp_path / "run"
    commands.mkdir()
    answers = {"sbatch": f"env > {tmp_path}/env; echo Submitted batch job 7", "srun": "", "squeue": "",
               "sinfo": f"echo 'main*|(null)|2|{socket.gethostname().split(chr(46))[0]}'",
               "scancel": f"echo $1 > {tmp_path}/end"}  # fmt: skip
    for name, answer in answers.items():
        (commands / name).write_text(f"#!/bin/sh\n{answer}\n")
        (commands / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "6", "SLURM_MEM_PER_CPU": "1024", "SLURM_CONF": "/slurm.conf"}
    env = outside(PATH=f"{commands}:{os.environ['PATH']}", **job)
    words = [TINY, f"data.sources={images}"]
    assert "job 7: " in launch("train", *words, f"run_dir={run_dir}", env=env)
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert "SLURM_CONF" in names and not names & {"SLURM_JOB_ID", "SLURM_MEM_PER_CPU"}
    (tmp_path / "other" / "launch.json.new").mkdir(parents=True)  # so that the record cannot be written
    assert "its jobs are cancelled" in launch("train", *words, f"run_dir={tmp_path / 'other'}", env=env, fails=True)
    assert (tmp_path / "end").read_text() == "7\n"


def test_a_job_that_was_cancelled_before_it_began_has_lost_nothing(tmp_path: Path) -> None:
    slurm_job(tmp_path, "7")
    with editing(tmp_path, "7") as job:
        job.cancelled = "today"
    assert launch("status", tmp_path, env=outside(PATH="/nowhere")).splitlines()[2] == "    it had not begun"
    (tmp_path / "jobs").mkdir()
    starts = "\njob 9, start 1, on n: from step 0\nValueError: bad\njob 9, start 2, on n: from step 0\n"
    (tmp_path / "jobs" / "9_0_log.out").write_text(f"{starts}dinoreg-launch: 1 requeues brought nothing new: still\n")
    assert end_of(tmp_path, Job("9"), None) == "1 requeues brought nothing new: still; the last one: ValueError: bad"
    assert end_of(tmp_path, Job("8"), JobState("OUT_OF_MEMORY")) == "out of memory"
    assert end_of(tmp_path, Job("8"), JobState("CANCELLED")) == "cancelled"


def test_damaged_records_are_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "launch.json").write_text('{"jobs": [{"id')
    said = f"dinoreg-launch: {tmp_path}/launch.json is damaged; see that no job of the run is left, and remove it\n"
    for words in (["status"], ["cancel"], ["logs"]):
        assert launch(*words, tmp_path, env=outside(PATH="/nowhere"), fails=True) == said
    (tmp_path / "sweep.json").write_text("[")
    said = f"dinoreg-launch: {tmp_path}/sweep.json is damaged; see that no job of the run is left, and remove it\n"
    assert launch("sweep", "--table", tmp_path, env=outside(PATH="/nowhere"), fails=True) == said


def test_whoever_reads_only_the_head_of_a_table_sees_no_traceback(tmp_path: Path) -> None:
    slurm_job(tmp_path, "7")
    end, reader = os.pipe()
    os.close(end)
    command = [sys.executable, "-m", "launch", "status", tmp_path]
    done = subprocess.run(command, env=outside(), cwd=REPOSITORY, stdout=reader, stderr=subprocess.PIPE, text=True)
    os.close(reader)
    assert done.stderr == ""


def test_status_counts_the_requeues_of_all_jobs_of_a_run(tmp_path: Path) -> None:
    for number, starts in (("99999998", 3), ("99999999", 2)):
        with editing(tmp_path, number) as job:
            job.cluster, job.host = "local", socket.gethostname()
            job.starts = [Start(restart, "", 0, "n") for restart in range(starts)]
    assert table(rows([tmp_path])).splitlines()[1].split()[-1] == "3"


def test_tasks_of_this_machine_run_stop_and_go_on(images: Path, tmp_path: Path) -> None:
    run_dir, env = tmp_path / "run", outside()
    options = [TINY, f"data.sources={images}", *FAST, f"run_dir={run_dir}", "train.steps=400", "checkpoint.every=200"]
    launch("train", *options, "launch.gpus_a_node=2", "launch.setup=[export WORD=set]", "--cluster", "local", env=env)
    until(lambda: steps(run_dir) >= 2, "step 2")
    assert launch("status", run_dir, env=env).splitlines()[1].split()[2] == "running"
    launch("cancel", run_dir, env=env)
    followed = launch("logs", run_dir, "-f", env=env)
    done = steps(run_dir)
    assert f"stopped by SIGTERM; step {done} is saved" in followed
    until(lambda: "cancelled" in launch("status", run_dir, env=env), "the end")
    launch("resume", run_dir, "launch.gpus_a_node=0", "train.time_limit=5s", "--cluster", "local", env=env)
    # Of a busy machine the first two seconds may be over before the first step.
    until(lambda: any(start.step > done for start in read_jobs(run_dir)[-1].starts), "a start that goes on from there")
    assert int(launch("status", run_dir, env=env).splitlines()[1].split()[-1]) >= 1  # requeues
    launch("cancel", run_dir, env=env)
    until(lambda: "cancelled" in launch("status", run_dir, env=env), "the end of the second job")
    first, second = read_jobs(run_dir)
    assert second.starts[0].step == done and second.code == first.code
    assert "again, to go on from the last checkpoint" in launch("logs", run_dir, env=env)


def test_of_two_commands_at_once_one_submits_the_run(images: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    options = [f"data.sources={images}", f"run_dir={run_dir}", "launch.setup=[sleep 60]", "--cluster", "local"]
    command = [sys.executable, "-m", "launch", "train", str(TINY), *options]
    both = [
        subprocess.Popen(command, env=outside(), cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in both]
    (job,) = read_jobs(run_dir)
    assert sorted(process.returncode for process in both) == [0, 2]
    assert "".join(said).startswith(f"dinoreg-launch: run_dir: {run_dir} has job {job.id} already")
    launch("cancel", run_dir, env=outside())
    until(lambda: read_jobs(run_dir)[0].ended, "the end")


def test_debug_becomes_the_run_in_this_process(images: Path, tmp_path: Path) -> None:
    options = [f"data.sources={images}", f"run_dir={tmp_path / 'run'}", "train.steps=1", "--cluster", "debug"]
    process = subprocess.Popen([sys.executable, "-m", "launch", "train", TINY, *options], env=outside(), cwd=REPOSITORY)
    assert process.wait(300) == 0
    (job,) = read_jobs(tmp_path / "run")
    assert job.id == str(process.pid) and job.cluster == "debug" and steps(tmp_path / "run") == 1
