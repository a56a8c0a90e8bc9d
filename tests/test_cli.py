"""The front: what each command says, and that mistakes end in one line and status 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoreg import cli
from dinoreg.config import ConfigError


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    return int(stopped.value.code or 0)


def test_overview(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ((), ("--help",), ("-h",), ("help",)):
        assert run(*words) == 0
        text = capsys.readouterr().out
        assert all(f"\n  {name}  " in text for name in cli.COMMANDS)


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_each_command_explains_itself_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*name.split(), "--help") == 0
    text = capsys.readouterr().out
    assert f"usage: dinoreg {name}" in text and "example" in text
    assert text.count(f"dinoreg {name} ") > 1 or name == "demo"


def test_train_help_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    run("train", "--help")
    text = capsys.readouterr().out
    assert "  own_images_1gpu      ViT-S/14 on your own images with one GPU\n" in text and "vitg14" in text


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, dinoreg.cli as c\ntry: c.main(['train', '--help'])\nexcept SystemExit: pass\n"
    check = "heavy = {'torch', 'numpy', 'wandb', 'PIL', 'rich'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code + check], check=True, capture_output=True, cwd=Path(__file__).parents[1])


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trian", "demo") == 2
    assert "no command 'trian demo'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("train", "dmeo"), "no recipe 'dmeo'"),
        (("train", "demo"), "data.sources: no images"),
        (("train", "demo", "optim.lrr=1", "--dry-run"), "optim.lrr: no such option; the nearest is optim.lr"),
        (("train", "demo", "--dry-run", "model.patch_size=7"), "model.patch_size"),
        (("doctor", "/no/such/run"), "/no/such/run/metrics.jsonl: No such file or directory"),
        (("look", "/no/such/file.pth", "x.jpg"), "no such file"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("dinoreg: ") and error.count("\n") == 1


def test_dry_run_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "demo", "--dry-run", "train.steps=77") == 0
    text = capsys.readouterr().out
    assert "77 steps" in text and "by fvcore" in text and "memory a GPU" in text


def test_train_hands_over_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setitem(sys.modules, "dinoreg.train.trainer", SimpleNamespace(train=seen.append))
    assert run("train", "demo", "data.sources=/my/images", "train.steps=5", "run_dir=runs/x") == 0
    assert (seen[0].data.sources, seen[0].train.steps, seen[0].run_dir) == (["/my/images"], 5, "runs/x")


def test_doctor_reads_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"step": step, "loss/total": 8.0 - step / 100, "lr": 1e-3} for step in range(1, 50)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert run("doctor", str(tmp_path)) == 0
    assert f"{tmp_path}: nothing looks wrong in 49 records up to step 49" in capsys.readouterr().out
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 50, "loss/total": "nan", "lr": 1e-3}) + "\n")
    assert run("doctor", str(tmp_path)) == 1
    assert "Likely cause" in capsys.readouterr().out


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "doctor", lambda words: int(words[0]))
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["doctor", "x"])


def test_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(words: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "doctor", stop)
    assert run("doctor") == 130


def test_own_words_about_input_come_without_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(words: object) -> int:
        raise ConfigError("must be positive", key="optim.lr")

    monkeypatch.setitem(cli.COMMANDS, "doctor", refuse)
    assert run("doctor") == 2
    assert capsys.readouterr().err == "dinoreg: optim.lr: must be positive\n"


def test_a_length_on_the_command_line_replaces_the_recipes() -> None:
    assert cli.other_lengths_off(["train.steps=100"]) == ["train.epochs=null", "train.images=null"]
    assert cli.other_lengths_off(["train.steps=100", "train.epochs=null"]) == []
    assert cli.other_lengths_off(["seed=1"]) == []
