"""Whole runs of a tiny model: what they write, and that nothing about the machine changes what they learn."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from slurm_lab import SlurmLab, missing

import dinoreg
from dinoreg.config import ConfigError, load
from dinoreg.parallel.mesh import Ranks
from dinoreg.train.knn import KnnMonitor
from dinoreg.train.pictures import look
from dinoreg.train.recipe import RunConfig
from dinoreg.train.replay import replay
from dinoreg.train.trainer import train

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = REPOSITORY / "tests" / "tiny.yaml"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of smooth noise, in two sizes."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(24):
        size = (48, 64) if i % 2 else (80, 56)
        pixels = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        pixels.save(folder / f"{i:02d}.jpg", quality=95)
    return folder


def run(
    images: Path, run_dir: Path, *overrides: str, processes: int = 1, slurm: SlurmLab | None = None
) -> dict[str, torch.Tensor]:
    """Train as a user would, from the command line; the last teacher's weights."""
    launcher = [sys.executable, "-m"]
    if slurm is not None:
        launcher = ["srun", f"-N{processes}", f"-n{processes}", *launcher]
    elif processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [*launcher, "dinoreg", "train", str(TINY), f"data.sources={images}", f"run_dir={run_dir}", *overrides]
    env = (slurm.env if slurm else os.environ) | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-1000:]
    return load_file(sorted((run_dir / "teacher").iterdir())[-1])


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def baseline(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    run_dir = tmp_path_factory.mktemp("baseline") / "run"
    return run_dir, run(images, run_dir)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_run_directory_holds_everything(baseline: tuple[Path, dict[str, torch.Tensor]]) -> None:
    run_dir, _ = baseline
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]
    assert sorted(p.name for p in (run_dir / "teacher").iterdir()) == [
        "step_00000002.safetensors",
        "step_00000004.safetensors",
    ]
    assert (run_dir / "config.yaml").exists() and (run_dir / "logs" / "rank0.log").exists()
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["images"] == 32 and lines[-1]["epoch"] == pytest.approx(32 / 24)
    for name in ("loss/total", "loss/dino_global", "loss/dino_local", "loss/ibot", "loss/koleo", "grad_norm/backbone",
                 "lr", "weight_decay", "teacher_momentum", "throughput/images_per_second", "data/bad"):  # fmt: skip
        assert name in lines[-1], name
    assert {"features/rankme", "norms/patch_q50", "teacher/entropy"} <= lines[-1].keys()
    assert lines[0]["plateau/dino"] == pytest.approx(np.log(64))


def test_the_logged_total_is_the_weighted_sum_of_the_logged_terms(
    baseline: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    for line in metrics(baseline[0]):
        pairs_global, pairs_local = 2, 4  # 2 globals, 2 locals
        dino = (pairs_global * line["loss/dino_global"] + pairs_local * line["loss/dino_local"]) / 6
        # iBOT's mean is over masked crops, half of all; KoLeo's is over the two crops, and their sum is optimised.
        total = dino + 0.5 * line["loss/ibot"] + 0.1 * 2 * line["loss/koleo"]
        assert line["loss/total"] == pytest.approx(total, rel=1e-5)


def test_the_config_written_is_the_run(images: Path, baseline: tuple[Path, dict[str, torch.Tensor]]) -> None:
    cfg = load(RunConfig, baseline[0] / "config.yaml")
    assert cfg == load(RunConfig, TINY, [f"data.sources={images}", f"run_dir={baseline[0]}"])


def test_the_teacher_file_opens_by_itself(baseline: tuple[Path, dict[str, torch.Tensor]]) -> None:
    backbone = dinoreg.load_backbone(baseline[0] / "teacher" / "step_00000004.safetensors")
    features = backbone.forward_features(torch.zeros(2, 3, 48, 32))
    assert features.cls.shape == (2, 32) and features.registers.shape == (2, 4, 32) and features.grid == (6, 4)


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (1, ["train.accumulate=4"]),
        (1, ["data.workers=2", "efficiency.activation_checkpointing=full"]),
        (2, ["efficiency.shard=full", "efficiency.activation_checkpointing=full"]),
        (2, ["efficiency.shard=none", "efficiency.activation_checkpointing=selective", "train.accumulate=2"]),
        (2, ["efficiency.shard=hybrid", "efficiency.reshard=false"]),
        pytest.param(
            *(2, ["efficiency.compile=true", "efficiency.activation_checkpointing=selective"]),
            marks=pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here"),
        ),
    ],
    ids=[
        "accumulate",
        "workers-checkpointing",
        "fsdp-checkpointing",
        "replicated-selective-accumulate",
        "hybrid",
        "compile",
    ],
)
def test_the_machine_changes_nothing(
    processes: int,
    overrides: list[str],
    images: Path,
    baseline: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    """Processes, sharding, recomputation (FSDP with several crop sizes is pytorch #153354), accumulation, workers."""
    assert_same(run(images, tmp_path / "run", *overrides, processes=processes), baseline[1], 1e-5)
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(baseline[0]), strict=True):
        for name in ("loss/total", "loss/dino_global", "loss/dino_local", "loss/ibot", "loss/koleo"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
        assert ours["grad_norm/backbone"] == pytest.approx(theirs["grad_norm/backbone"], rel=1e-4)


@pytest.mark.skipif(bool(missing()), reason=f"a real Slurm is not installed: {', '.join(missing())} missing")
def test_the_same_under_srun(images: Path, baseline: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """Two nodes of a real Slurm, without a flag: weights sharded within a node and replicated across."""
    with SlurmLab() as lab:
        weights = run(images, tmp_path / "run", "efficiency.shard=hybrid", processes=2, slurm=lab)
    assert_same(weights, baseline[1], 1e-5)


def test_a_run_goes_on_from_its_last_checkpoint(
    images: Path, baseline: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """With what a run that died after step 2 leaves behind, on two processes instead of one."""
    run_dir = tmp_path / "run"
    shutil.copytree(baseline[0], run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000004")
    (run_dir / "teacher" / "step_00000004.safetensors").unlink()
    assert_same(run(images, run_dir, processes=2), baseline[1], 1e-5)
    assert [line["step"] for line in metrics(run_dir)] == [1, 2, 3, 4]


def test_a_finished_run_is_left_alone(images: Path, baseline: tuple[Path, dict[str, torch.Tensor]]) -> None:
    before = (baseline[0] / "metrics.jsonl").read_text()
    run(images, baseline[0])
    assert (baseline[0] / "metrics.jsonl").read_text() == before


def test_bf16_learns_on_a_cpu(images: Path, tmp_path: Path) -> None:
    weights = run(images, tmp_path / "run", "train.precision=bf16")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights.values())


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, reddish and bluish noise, 20 images each."""
    folder, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(1)
    for name, tint in (("red", (90, 0, 0)), ("blue", (0, 0, 90))):
        (folder / name).mkdir()
        for i in range(20):
            pixels = rng.integers(0, 166, (32, 32, 3)) + np.array(tint)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_started_from_weights_step_0_is_the_source(
    images: Path, labelled: Path, baseline: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """The same features and the same k-NN; the log names what was taken."""
    source = baseline[0] / "teacher" / "step_00000004.safetensors"
    cfg = load(
        RunConfig,
        TINY,
        [
            *(f"data.sources={images}", f"run_dir={tmp_path / 'run'}", f"model.init_from={source}"),
            *("train.steps=1", "optim.lr=1e-30", "optim.lr_end=0"),
            *(f"monitor.knn_train={labelled}", "monitor.knn_every=1", "monitor.knn_k=5"),
        ],
    )
    assert_same(load_file(train(cfg)), load_file(source), 1e-6)
    first = metrics(tmp_path / "run")[0]
    knn = KnnMonitor(cfg.monitor, cfg.model, cfg.photometric, Ranks.alone())
    assert first["step"] == 0 and first["knn/top1"] == knn(dinoreg.load_backbone(source))
    log = (tmp_path / "run" / "logs" / "rank0.log").read_text()
    assert "100.00% of the parameters" in log and "taken    register_tokens" in log


def test_pictures_and_metrics_reach_wandb_offline(images: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run(images, run_dir, "tracking.wandb=offline", "tracking.pictures_every=2")
    names = sorted(path.name for path in (run_dir / "pictures").iterdir())
    assert names == [f"{kind}_{step:08d}.png" for kind in ("attention", "crops") for step in (1, 2, 4)]
    (offline,) = (run_dir / "wandb").glob("offline-run-*")
    sent = {path.name.rsplit("_", 2)[0] for path in (offline / "files" / "media" / "images" / "pictures").iterdir()}
    assert sent == {"crops", "attention"}


def test_a_grey_model_is_looked_at_with_its_own_normalisation(images: Path, tmp_path: Path) -> None:
    grey = ["model.in_channels=1", "photometric.mean=[0.4]", "photometric.std=[0.3]", "train.steps=1"]
    weights = train(load(RunConfig, TINY, [f"data.sources={images}", f"run_dir={tmp_path / 'run'}", *grey]))
    assert dinoreg.load_backbone(weights).normalisation == ([0.4], [0.3])
    assert look(weights, [images / "00.jpg"], tmp_path / "look.png").exists()


def test_a_run_directory_is_not_taken_over_by_another_run(images: Path, tmp_path: Path) -> None:
    options = [f"data.sources={images}", f"run_dir={tmp_path / 'run'}", "train.steps=2"]
    train(load(RunConfig, TINY, options))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.suffix in (".yaml", ".jsonl")}
    for change in ("model.depth=4", "train.steps=4", "optim.lr=0.002", "seed=1", "train.batch_size=4"):
        key, _, value = change.partition("=")
        with pytest.raises(ConfigError, match=rf"other options: {key}={value} \(was .*train.go_on_from="):
            train(load(RunConfig, TINY, [*options, change]))
    assert {path: path.read_bytes() for path in before} == before


def test_other_images_do_not_go_on_in_the_same_run(images: Path, tmp_path: Path) -> None:
    mine = tmp_path / "images"
    shutil.copytree(images, mine)
    options = [f"data.sources={mine}", f"run_dir={tmp_path / 'run'}", "train.steps=2", "checkpoint.every=1"]
    train(load(RunConfig, TINY, options))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000002")
    moved = mine.rename(tmp_path / "moved")
    options[0] = f"data.sources={moved}"
    (moved / "00.jpg").rename(moved / "xx.jpg")
    with pytest.raises(ConfigError, match="these are other images"):
        train(load(RunConfig, TINY, options))
    (moved / "xx.jpg").rename(moved / "00.jpg")
    train(load(RunConfig, TINY, options))  # from another place, but the same


def test_a_new_run_goes_on_from_another_under_other_options(images: Path, tmp_path: Path) -> None:
    options = [f"data.sources={images}", "train.steps=2"]
    train(load(RunConfig, TINY, [*options, f"run_dir={tmp_path / 'old'}"]))
    other = [f"run_dir={tmp_path / 'new'}", f"train.go_on_from={tmp_path / 'old'}", "train.steps=4", "optim.lr=0.002"]
    train(load(RunConfig, TINY, [*options, *other]))
    assert [line["step"] for line in metrics(tmp_path / "new")] == [3, 4]
    assert [line["step"] for line in metrics(tmp_path / "old")] == [1, 2]
    assert sorted(p.name for p in (tmp_path / "old" / "checkpoints").iterdir()) == ["step_00000002"]
    other[0] = f"run_dir={tmp_path / 'newer'}"
    with pytest.raises(ValueError, match=r"cannot resume from .*step_00000002: "):
        train(load(RunConfig, TINY, [*options, *other, "model.depth=4"]))


def test_a_batch_of_one_image_trains(images: Path, tmp_path: Path) -> None:
    weights = run(images, tmp_path / "run", "train.batch_size=1")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert metrics(tmp_path / "run")[-1]["skipped/total"] == 0


@pytest.fixture(scope="module")
def fault(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves whose weights the first step makes huge: every loss after it is infinite or worse."""
    run_dir = tmp_path_factory.mktemp("fault") / "run"
    options = ["optim.lr=1e20", "optim.clip=0", "train.max_skipped=2", "train.steps=9"]
    with pytest.raises(FloatingPointError, match=r"2 steps in a row, from step 2 on, had no finite.*dinoreg replay"):
        train(load(RunConfig, TINY, [f"data.sources={images}", f"run_dir={run_dir}", *options]))
    assert not list((run_dir / "checkpoints").glob("step_00000003*"))
    return run_dir / "faults" / "step_00000002"


def test_a_run_gives_up_and_leaves_what_is_needed_to_see_why(fault: Path, images: Path) -> None:
    told = json.loads((fault / "fault.json").read_text())
    assert [step["step"] for step in told["steps"]] == [2, 3] and told["world"] == 1
    rank = told["steps"][0]["ranks"][0]
    assert len(rank["images"]) == 8 and all(name.startswith(str(images)) for name in rank["images"])
    assert not np.isfinite(float(rank["metrics"]["loss/total"]))
    assert [p.name for p in (fault / "checkpoints").iterdir()] == ["step_00000003"]


def test_replay_says_where_a_step_broke(fault: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay(fault) == 1
    out = capsys.readouterr().out
    assert "step 2, the first of 2 in a row" in out and "first after student.backbone" in out and "all 8" in out
    (report,) = json.loads((fault / "report.json").read_text())
    told = json.loads((fault / "fault.json").read_text())["steps"][0]["ranks"][0]
    assert str(report["losses"]["loss/total"]) == told["metrics"]["loss/total"]  # it happened again
    assert report["modules"] and report["largest"][1] > 1e19 and set(report["images"]) == set(told["images"])
    assert (fault / "crops.png").exists()


def test_what_is_no_fault_is_not_replayed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no fault of a run"):
        replay(tmp_path)


def test_a_damaged_checkpoint_is_not_gone_on_from(images: Path, tmp_path: Path) -> None:
    options = [f"data.sources={images}", "train.steps=2"]
    train(load(RunConfig, TINY, [*options, f"run_dir={tmp_path / 'old'}"]))
    checkpoint = tmp_path / "old" / "checkpoints" / "step_00000002"
    file = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    other = [f"run_dir={tmp_path / 'new'}", f"train.go_on_from={checkpoint}", "train.steps=4"]
    with pytest.raises(ValueError, match=rf"step_00000002 cannot be gone on from: {file.name} has changed"):
        train(load(RunConfig, TINY, [*options, *other]))


def test_a_teacher_that_was_not_written_is_written_at_the_next_start(
    images: Path, baseline: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(baseline[0], run_dir)
    (run_dir / "teacher" / "step_00000004.safetensors").unlink()
    train(load(RunConfig, TINY, [f"data.sources={images}", f"run_dir={run_dir}"]))
    assert_same(load_file(run_dir / "teacher" / "step_00000004.safetensors"), baseline[1], 0)


def test_a_picture_without_room_on_the_disk_is_no_reason_to_stop(images: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "pictures").mkdir(parents=True)
    (tmp_path / "run" / "pictures" / "crops_00000002.png").symlink_to("/dev/full")
    options = [f"data.sources={images}", f"run_dir={tmp_path / 'run'}", "train.steps=2", "tracking.pictures_every=2"]
    train(load(RunConfig, TINY, options))
    assert "pictures of step 2 cannot be written" in (tmp_path / "run" / "logs" / "rank0.log").read_text()
