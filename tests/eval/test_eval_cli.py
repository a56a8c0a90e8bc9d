"""`dinoreg-eval` from the command line to results.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from evaluating import write_data, write_weights

from dinoreg.models.vit import ModelConfig, build_vit
from dinoreg.models.weights import save_backbone
from eval.cli import main
from eval.results import commit, write_atomically


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("cli") / "colours", 12, 6)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "small.safetensors")


def run(*words: object) -> int:
    """The exit status."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_a_suite_writes_what_it_found_and_how(
    tmp_path: Path, data: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--weights", weights, "--data", data, "--output", tmp_path / "out", "--cache", tmp_path / "cache")
    assert run("knn", *words, "k=[1,3]", "main_k=3") == 0
    found = read(tmp_path / "out")
    assert found["suite"] == "knn"
    assert found["weights"] == str(weights)
    assert len(found["digest"]) == 16
    assert "4 registers" in found["found"]
    assert found["step"] is None
    assert list(found["scores"]) == ["top1", "top1_k1", "top1_k3"]
    top1 = found["scores"]["top1"]
    assert 0 <= top1["low"] <= top1["value"] <= top1["high"] <= 100
    assert (top1["unit"], top1["better"]) == ("%", "higher")
    assert found["protocol"]["k"] == [1, 3]
    assert found["protocol"]["preset"] == "published"
    assert found["data"]["name"] == "colours"
    assert (found["data"]["train"], found["data"]["test"]) == (48, 24)
    assert found["commit"] == commit()
    assert found["versions"]["torch"] == torch.__version__
    assert not list((tmp_path / "out").glob(".*"))
    out = capsys.readouterr().out
    assert str(tmp_path / "out" / "results.json") in out
    assert "interval" in out
    assert "4 registers" in out


def test_parts_of_the_data_can_be_named_one_after_the_other(tmp_path: Path, data: Path, weights: Path) -> None:
    words = ("--weights", weights, "--output", tmp_path / "out", "--cache", tmp_path / "cache", "max_train=20")
    assert run("knn", *words, "--data", f"train={data / 'train'}", f"test={data / 'val'}") == 0
    found = read(tmp_path / "out")
    assert (found["data"]["train"], found["data"]["test"]) == (20, 24)


def test_all_runs_every_suite_for_which_data_are_given(
    tmp_path: Path, data: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--weights", weights, "--data-imagenet", data, "--output", tmp_path / "out", "--cache", tmp_path / "cache")
    assert run("all", "--preset", "quick", *words, "imagenet-linear.steps=5", "logreg.c_steps=2", "knn.k=[20]") == 0
    found = {name: read(tmp_path / "out" / name) for name in ("imagenet-linear", "knn", "logreg")}
    assert found["imagenet-linear"]["protocol"]["steps"] == 5
    assert len(found["logreg"]["details"]["grid"]) == 2
    assert all(each["protocol"]["preset"] == "quick" for each in found.values())
    assert all("quick preset" in each["notes"][0] for each in found.values())
    # One data set, seen in one way: its features were computed once.
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_results_lie_beside_the_run_that_made_the_weights(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for step in (5, 40):
        write_weights(tmp_path / "run" / "teacher" / f"step_{step:08d}.safetensors", seed=step, step=step)
    (tmp_path / "run" / "config.yaml").write_text("{}")
    assert run("knn", "--weights", tmp_path / "run", "--data", data) == 0
    assert read(tmp_path / "run" / "eval" / "knn" / "step_00000040")["step"] == 40
    first = tmp_path / "run" / "teacher" / "step_00000005.safetensors"
    assert run("knn", "--weights", first, "--data", data) == 0
    assert read(tmp_path / "run" / "eval" / "knn" / "step_00000005")["step"] == 5
    assert (tmp_path / "home" / "dinoreg" / "features").is_dir()
    elsewhere = write_weights(tmp_path / "mine.safetensors")
    monkeypatch.chdir(tmp_path)
    assert run("knn", "--weights", elsewhere, "--data", data) == 0
    assert read(tmp_path / "results" / "mine" / "knn")["step"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nearest"], "dinoreg-eval: no command 'nearest'"),
        (["knn", "--weights", "W", "--data", "/no/such"], "dinoreg-eval: --data: no such file or folder: /no/such"),
        (["knn", "--weights", "/no/such", "--data", "D"], "dinoreg-eval: /no/such: no such file or folder"),
        (["knn", "--weights", "W", "--data", "D", "kk=3"], "dinoreg-eval: kk: no such option; the nearest is k"),
        (["all", "--weights", "W"], "dinoreg-eval: no data: give some of --data-imagenet"),
        (["all", "--weights", "W", "--data-imagenet", "D", "k=3"], "'k=3' begins with the name of no suite that runs"),
        (["all", "--weights", "W", "--data-imagenet", "D", "knn.kk=3"], "knn.kk: no such option; the nearest is k"),
        (["all", "--weights", "W", "--data-imagenet", "D", "knn.k"], "knn: 'k' is not of the form key=value"),
        (["knn", "--weights", "EMPTY", "--data", "D"], "EMPTY"),
    ],
)
def test_mistakes_are_told_in_one_line(
    tmp_path: Path, data: Path, weights: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (tmp_path / "EMPTY").write_bytes(b"nothing of the kind")
    places = {"W": str(weights), "D": str(data), "EMPTY": str(tmp_path / "EMPTY")}
    assert (
        run(*[places.get(word, word) for word in words], *["--output", tmp_path / "out"][: 2 * (len(words) > 1)]) == 2
    )
    said = capsys.readouterr()
    told = said.err.strip() or said.out.splitlines()[0]
    assert message in told
    assert "\n" not in told
    assert not (tmp_path / "out").exists()


def test_help_names_the_suites_and_costs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    overview = capsys.readouterr().out
    assert all(name in overview for name in ("knn", "logreg", "imagenet-linear", "all"))
    assert run("imagenet-linear", "--help") == 0
    assert "LinearConfig in eval/suites/linear.py" in capsys.readouterr().out


def test_a_random_network_clears_chance_on_real_images(tmp_path: Path, shared_data: Path) -> None:
    """Caltech's 40 classes: 2.5 % by chance."""
    torch.manual_seed(0)
    config = ModelConfig(embed_dim=64, depth=4, num_heads=2, patch_size=8, image_size=56, layerscale=1.0)
    model = build_vit(config)
    model.init_weights()
    save_backbone(tmp_path / "random.safetensors", model.state_dict(), config)
    words = ("--weights", tmp_path / "random.safetensors", "--data-imagenet", shared_data / "cls_caltech101")
    places = ("--output", tmp_path / "out", "--cache", tmp_path / "cache")
    assert run("all", "--preset", "quick", *words, *places, "imagenet-linear.steps=100", "logreg.c_steps=3") == 0
    for name in ("imagenet-linear", "knn", "logreg"):
        found = read(tmp_path / "out" / name)
        assert found["scores"]["top1"]["low"] > 2.5, name
        assert (found["data"]["train"], found["data"]["test"]) == (960, 480)


def test_results_of_another_suite_are_not_replaced_and_those_of_other_weights_are_said(
    tmp_path: Path, data: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--data", data, "--output", tmp_path / "out", "--cache", tmp_path / "cache")
    assert run("knn", "--weights", weights, *words) == 0
    before = read(tmp_path / "out")
    assert run("logreg", "--weights", weights, *words) == 2
    assert "--output: " in (said := capsys.readouterr().err) and "is of knn: name another folder for logreg" in said
    assert read(tmp_path / "out") == before
    assert run("knn", "--weights", write_weights(tmp_path / "other.safetensors", seed=1), *words) == 0
    assert "is of other weights, and will be replaced" in capsys.readouterr().out
    assert read(tmp_path / "out")["digest"] != before["digest"]


def test_an_output_that_cannot_be_written_is_told_before_anything_is_computed(
    tmp_path: Path, data: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = ("--weights", weights, "--data", data, "--cache", tmp_path / "cache")
    assert run("knn", *words, "--output", tmp_path / "file" / "out") == 2
    assert capsys.readouterr().err == f"dinoreg-eval: {tmp_path}/file/out: Not a directory\n"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 128 vs 64")])
def test_a_full_disk_is_told_with_the_file(tmp_path: Path, error: Exception) -> None:
    def write(file: BinaryIO) -> None:
        raise error  # the second is how torch.save says it

    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(tmp_path / "results.json", write)
    assert caught.value.filename == str(tmp_path / "results.json")
    assert list(tmp_path.iterdir()) == []


def test_files_that_everybody_calls_model_get_results_of_their_own(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "v1.5"):
        write_weights(tmp_path / name / "model.safetensors")
    words = ("--data", data, "--cache", tmp_path / "cache")
    assert run("knn", "--weights", "one/model.safetensors", *words) == 0
    assert run("knn", "--weights", "v1.5", *words) == 0
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"one", "v1.5"}


def test_what_was_measured_before_a_mistake_is_shown(
    tmp_path: Path, data: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--weights", weights, "--output", tmp_path / "out", "--cache", tmp_path / "cache", "--preset", "quick")
    small = ("imagenet-linear.steps=2", "logreg.c_steps=1", "logreg.max_iter=2", "knn.k=[20]")
    assert run("all", *words, *small, "--data-imagenet", data, "--data-ade20k", data) == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("dinoreg-eval: --data: ")
    assert "top1_k20" in said.out and (tmp_path / "out" / "report.html").is_file()
