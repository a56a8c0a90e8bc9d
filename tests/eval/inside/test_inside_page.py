"""The page of experiments: what networks are called on it, what it warns of, and what is left out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from evaluating import write_classes, write_weights

from dinoreg.config import ConfigError
from eval.cli import main
from eval.inside.maps import times
from eval.inside.page import gather, inside_page, short_names
from eval.report.page import main as report
from eval.report.read import Evaluation

BUILT = {"depth": 4, "embed_dim": 64, "patch_size": 8, "registers": 0}
SCORE = {"value": 1.0, "low": 0.5, "high": 1.5}


def group(suite: str = "attention", digest: str = "images", **built: Any) -> list[Evaluation]:
    data = {"name": "photos", "hash": digest, "test": 5, "bad": {}}
    weights = built.pop("weights", "net.safetensors")
    content: dict[str, Any] = {
        "suite": suite, "weights": weights, "digest": str(built), "found": "ours", "scores": {"s": SCORE},
        "protocol": {}, "data": data, "architecture": BUILT | built,
    }  # fmt: skip
    return [Evaluation(Path("results.json"), content)]


def test_networks_are_called_by_their_registers_where_they_differ_in_nothing_else() -> None:
    assert short_names([group(), group(registers=4), group(registers=1)]) == [
        "no registers", "4 registers", "1 register",
    ]  # fmt: skip
    wider = group(registers=4, embed_dim=128, weights="wide.pth")
    assert short_names([group(), wider]) == ["net", "wide"]
    assert short_names([group(), group()]) == ["net (1)", "net (2)"]
    assert short_names([group(weights="_$a_{$ b.pth"), group(weights="$_")]) == ["a_{ b", "network"]


def test_other_images_are_warned_of_whatever_the_experiment(tmp_path: Path) -> None:
    first = group("artifacts") + group("attention")
    for digest, warned in (("images", False), ("others", True)):
        second = copy.deepcopy(group("artifacts")) + group("attention", digest)
        content = inside_page([first, second], ["a", "b"], [], tmp_path)
        assert ("were not shown the same images" in content) == warned


def test_numbers_of_any_size_are_written_without_powers_of_ten() -> None:
    said = [times(value) for value in (0.012345, 1.5, 5.456, 140.4, 999.6, 12345.0, 0.0, -0.0444)]
    assert said == ["0.0123", "1.5", "5.46", "140", "1,000", "12,300", "0", "-0.0444"]
    assert times(99.7, 2) == "100" and times(2500, 2) == "2,500"


def test_names_that_figures_cannot_hold_and_a_page_of_a_folder_with_two_networks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(tmp_path / "data", 2)
    weights = [str(write_weights(tmp_path / f"{name}.safetensors", seed)) for seed, name in enumerate(("$x^{$", "_y"))]
    words = ["attention", "--weights", weights[0], "--compare", weights[1], "--data", str(tmp_path / "data")]
    with pytest.raises(SystemExit) as left:
        main([*words, "--output", str(tmp_path / "out"), "photos=1"])
    assert left.value.code == 0
    content = (tmp_path / "out" / "$x^{$" / "inside.html").read_text()
    assert "<strong>x^{</strong>" in content and "<strong>y</strong>" in content
    capsys.readouterr()
    assert report([str(tmp_path / "out")]) == 0
    assert "holds experiments on 2 networks" in capsys.readouterr().out
    assert len(gather(tmp_path / "out")) == 1
    assert report([str(tmp_path / "out" / "$x^{$"), "--compare", str(tmp_path / "out" / "_y")]) == 0
    assert "holds experiments" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no results"):
        report([str(tmp_path / "out" / "_y"), "--compare", str(tmp_path / "data")])


def test_two_steps_of_a_run_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_classes(tmp_path / "data", 2)
    run = tmp_path / "run"
    (run / "teacher").mkdir(parents=True)
    (run / "config.yaml").touch()
    early, late = (
        str(write_weights(run / "teacher" / f"step_{step:08d}.safetensors", step, step)) for step in (10, 20)
    )
    for other, code in ((early, 0), (late, 2)):
        with pytest.raises(SystemExit) as left:
            main(["features", "--weights", late, "--compare", other, "--data", str(tmp_path / "data"), "photos=1"])
        assert left.value.code == code
    assert "in the same folder" in capsys.readouterr().err
    content = (run / "eval" / "inside.html").read_text()
    assert "run, step 20" in content and "run, step 10" in content
    assert report([str(run)]) == 0 and "shows run, step 20, the newest" in capsys.readouterr().out
