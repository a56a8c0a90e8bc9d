"""metrics.jsonl through crashes, and wandb without key or network."""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path

import pytest
from offline_wandb import sent_to_wandb

from dinoreg.train import tracking
from dinoreg.train.tracking import EVALUATIONS, Tracker, TrackingConfig, known_run_id, read_metrics, send_evaluations


@pytest.fixture(autouse=True)
def no_wandb_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def steps(run_dir: Path) -> list[int]:
    return [int(line["step"]) for line in read_metrics(run_dir / "metrics.jsonl")]


def test_every_line_is_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    tracker = Tracker(TrackingConfig(), tmp_path, {})
    tracker.log(10, {"loss/total": 1.5})
    assert steps(tmp_path) == [10]  # read while the tracker is still open
    tracker.close()
    tracker.close()


def test_numbers_that_json_lacks_come_back(tmp_path: Path) -> None:
    tracker = Tracker(TrackingConfig(), tmp_path, {})
    tracker.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.25, "step": 99})
    tracker.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"step": 1, "a": "nan", "b": "inf", "c": "-inf", "d": 0.25}
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == -math.inf


def test_resuming_drops_what_was_lost_and_the_broken_last_line(tmp_path: Path) -> None:
    tracker = Tracker(TrackingConfig(), tmp_path, {})
    for step in (10, 20, 30, 40):
        tracker.log(step, {"loss/total": float(step)})
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "loss/to')  # the machine died here
    assert steps(tmp_path) == [10, 20, 30, 40]
    again = Tracker(TrackingConfig(), tmp_path, {}, start_step=20)
    again.log(30, {"loss/total": 31.0})
    again.close()
    assert steps(tmp_path) == [10, 20, 30]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["loss/total"] == 31.0


def test_a_run_that_starts_anew_starts_an_empty_file(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        tracker = Tracker(TrackingConfig(), tmp_path, {})
        tracker.log(5, {"loss/total": value})
        tracker.close()
    assert [line["loss/total"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [2.0]


def test_wandb_asked_online_goes_offline_by_itself_and_keeps_its_identity(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    said: list[str] = []
    run_dir = tmp_path / "my_run"
    begun = time.monotonic()
    for start_step in (0, 10):
        tracker = Tracker(TrackingConfig(wandb="online"), run_dir, {"seed": 3}, start_step, said.append)
        tracker.log(start_step + 10, {"loss/total": math.nan, "lr": 0.1})
        tracker.log_picture(start_step + 10, "crops", _png(tmp_path))
        tracker.close()
    assert time.monotonic() - begun < 30
    assert len(said) == 2
    assert all("offline" in line and "no API key" in line and "\n" not in line for line in said)
    identity = (run_dir / tracking.RUN_ID_FILE).read_text().strip()
    folders = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(f"-{identity}" in folder.name for folder in folders)
    assert all(list(folder.glob("*.wandb")) for folder in folders)
    assert list(run_dir.glob("wandb/offline-run-*/files/media/images/pictures/crops*.png"))


def test_a_key_without_a_network_goes_offline_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    begun = time.monotonic()
    assert "does not answer" in (tracking._why_not_online() or "")
    assert time.monotonic() - begun < tracking.NETWORK_PATIENCE + 2


def test_a_silent_network_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "NETWORK_PATIENCE", 0.2)

    def keep_silent(*_: object, **__: object) -> None:
        time.sleep(3)
        raise TimeoutError

    monkeypatch.setattr(tracking.urllib.request, "urlopen", keep_silent)
    begun = time.monotonic()
    assert not tracking._answers("http://silent.example")
    assert time.monotonic() - begun < 1


def test_a_key_in_netrc_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not tracking._has_key("api.wandb.ai")
    file = tmp_path / "netrc"
    file.write_text("machine api.wandb.ai login user password abc\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    assert tracking._has_key("api.wandb.ai")
    assert not tracking._has_key("other.example")


def test_disabled_never_imports_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # an import would raise
    tracker = Tracker(TrackingConfig(), tmp_path, {})
    tracker.log_picture(1, "crops", tmp_path / "none.png")
    tracker.close()
    said: list[str] = []
    Tracker(TrackingConfig(wandb="offline"), tmp_path, {}, say=said.append).close()
    assert len(said) == 1 and "not installed" in said[0]


def _png(folder: Path) -> Path:
    from PIL import Image

    path = folder / "picture.png"
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def test_lines_without_room_on_the_disk_wait_for_it(tmp_path: Path) -> None:
    said: list[str] = []
    tracker = Tracker(TrackingConfig(), tmp_path, {}, say=said.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    tracker.log(1, {"loss/total": 1.0})
    try:
        # Room for half a line more: what Linux does on a full disk too is to write a part of it.
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 12, hard))
        tracker.log(2, {"loss/total": 2.0})
        tracker.log(3, {"loss/total": 3.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(said) == 1 and "metrics.jsonl" in said[0] and "wait until they can be written" in said[0]
    tracker.log(4, {"loss/total": 4.0})
    tracker.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_trouble_with_wandb_ends_wandb_and_not_the_training(tmp_path: Path) -> None:
    class Broken:
        def log(self, content: object) -> None:
            raise ConnectionError("the service is gone")

        def finish(self, exit_code: int) -> None:
            raise AssertionError("nobody should ask a broken service to finish")

    said: list[str] = []
    tracker = Tracker(TrackingConfig(), tmp_path, {}, say=said.append)
    tracker._wandb = Broken()
    tracker.log(1, {"loss/total": 1.0})
    tracker.log(2, {"loss/total": 2.0})
    tracker.close()
    assert said == ["wandb: ended by ConnectionError: the service is gone; metrics still go to metrics.jsonl"]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_checkpoint_knows_the_run_at_wandb(tmp_path: Path) -> None:
    Tracker(TrackingConfig(wandb="offline"), tmp_path / "a", {}).close()
    identity = known_run_id(tmp_path / "a")
    assert identity is not None
    Tracker(TrackingConfig(wandb="offline"), tmp_path / "b", {}, wandb_id=identity).close()
    assert known_run_id(tmp_path / "b") == identity


def test_evaluations_reach_wandb_once_whoever_sends_them(tmp_path: Path) -> None:
    """The training while it runs, of earlier steps too; somebody else afterwards."""
    pytest.importorskip("wandb")
    cfg, run_dir = TrackingConfig(wandb="offline"), tmp_path / "run"
    tracker = Tracker(cfg, run_dir, {})
    tracker.log(10, {"loss/total": 1.0})
    with (run_dir / EVALUATIONS).open("a") as file:
        file.write('{"step": 4, "eval/knn/top1": 40.5}\n{"step": 8, "eval/kn')
        file.flush()
        tracker.log(20, {"loss/total": 0.5})
        file.write('n/top1": 50.0}\n')
    tracker.log(30, {"loss/total": 0.4})
    tracker.close()
    send_evaluations(cfg, run_dir, {})  # nothing is new
    with (run_dir / EVALUATIONS).open("a") as file:
        file.write('{"step": 12, "eval/knn/top1": 60.0}\n')
    send_evaluations(cfg, run_dir, {})
    first, second = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert sent_to_wandb(first, "loss/total") == {10: 1.0, 20: 0.5, 30: 0.4}
    assert sent_to_wandb(first, "eval/knn/top1") == {4: 40.5, 8: 50.0}
    assert sent_to_wandb(second, "eval/knn/top1") == {12: 60.0}
    (run_dir / EVALUATIONS).write_text('{"step": 4, "eval/knn/top1": 41.0}\n')  # anew, and shorter
    send_evaluations(cfg, run_dir, {})
    third = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))[2]
    assert sent_to_wandb(third, "eval/knn/top1") == {4: 41.0}


def test_evaluations_of_a_run_without_wandb_wait_for_one_with_it(tmp_path: Path) -> None:
    (tmp_path / EVALUATIONS).write_text('{"step": 4, "eval/knn/top1": 40.5}\n')
    tracker = Tracker(TrackingConfig(), tmp_path, {})
    tracker.log(10, {"loss/total": 1.0})
    tracker.close()
    send_evaluations(TrackingConfig(), tmp_path, {})
    assert not list(tmp_path.glob("wandb")) and not list(tmp_path.glob("evaluations.sent"))
