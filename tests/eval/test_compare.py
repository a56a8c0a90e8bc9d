"""Checkpoints side by side: which figures may stand beside each other, and which differences are more than chance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from results_on_disk import IMAGENET, KNN, read_content, write_content, write_knn, write_run
from test_report import stands_alone

from eval.cli import main
from eval.compare import gather
from eval.dense.metrics import mask_scores
from eval.published import PUBLISHED
from eval.report.grid import Grid
from eval.report.paired import Difference, difference
from eval.report.read import Evaluation, read_evaluation

RNG = np.random.default_rng(0)
RIGHT = RNG.random(400) < 0.6
ALMOST = RIGHT ^ (RNG.random(400) < 0.03)  # the same network but for a few images


def evaluation(folder: Path) -> Evaluation:
    return read_evaluation(folder / "results.json")


def against(tmp_path: Path, one: np.ndarray, other: np.ndarray) -> Difference:
    return difference(evaluation(write_knn(tmp_path / "b", one)), evaluation(write_knn(tmp_path / "a", other)), "top1")


def compare(*words: object) -> object:
    """The exit code of the command."""
    with pytest.raises(SystemExit) as ended:
        main(["compare", *map(str, words)])
    return ended.value.code


def test_the_paired_interval_is_that_of_a_slow_bootstrap(tmp_path: Path) -> None:
    found = against(tmp_path, ALMOST, RIGHT)
    gaps = 100.0 * (ALMOST.astype(float) - RIGHT)
    rng = np.random.default_rng(1)
    slow = [np.mean([gaps[place] for place in rng.integers(0, len(gaps), len(gaps))]) for _ in range(1000)]
    assert found.paired and found.value == pytest.approx(np.mean(gaps))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])), abs=0.3)


def test_pairs_find_a_difference_that_two_intervals_hide(tmp_path: Path) -> None:
    better = RIGHT | (np.arange(400) < 25)  # right wherever the other is, and a little more often
    paired = against(tmp_path / "paired", better, RIGHT)
    for folder in (tmp_path / "paired").iterdir():
        (folder / "outcomes.npz").unlink()
        content = read_content(folder)
        score = content["scores"]["top1"]
        score |= {"low": score["value"] - 4.8, "high": score["value"] + 4.8}
        write_content(folder, content)
    one, other = (evaluation(tmp_path / "paired" / name) for name in "ba")
    unpaired = difference(one, other, "top1")
    assert paired.verdict == "better" and unpaired.verdict == "within" and not unpaired.paired
    assert unpaired.high - unpaired.low == pytest.approx(2 * 4.8 * 2**0.5)


def test_less_is_better_for_errors() -> None:
    assert Difference(-0.02, -0.03, -0.01, True, "lower").verdict == "better"
    assert Difference(0.02, 0.01, 0.03, True, "lower").verdict == "worse"
    assert Difference(0.02, -0.01, 0.05, True, "lower").verdict == "within"


def test_mean_ious_are_compared_by_the_areas_of_each_image(tmp_path: Path) -> None:
    truth = torch.randint(20, 50, (30, 4))
    found = []
    for name, share in (("a", 0.5), ("b", 0.55)):
        score = mask_scores(torch.stack([(truth * share).long(), truth, truth], dim=1))["miou"]
        assert score.per_image is not None
        folder = write_knn(tmp_path / name, 0.5, scores={"miou": score.plain()})
        np.savez_compressed(folder / "outcomes.npz", miou=score.per_image.numpy())
        found.append(evaluation(folder))
    gap = difference(found[1], found[0], "miou")
    assert gap.paired and gap.verdict == "better"
    assert gap.low <= found[1].scores["miou"].value - found[0].scores["miou"].value <= gap.high
    assert difference(found[0], found[0], "miou").value == 0


def test_other_data_and_other_protocols_get_columns_of_their_own_and_it_is_said(tmp_path: Path) -> None:
    write_knn(tmp_path / "a", 0.8)
    write_knn(tmp_path / "b", 0.7, data={**IMAGENET, "name": "mine", "hash": "cc-dd", "test": 10})
    write_knn(tmp_path / "c", 0.6, protocol={**KNN, "temperature": 0.1, "batch": 7})
    grid = Grid.of(gather([tmp_path / name for name in "abc"]))
    assert [[grid.at(row, column) is not None for column in grid.columns] for row in grid.rows] == np.eye(3).tolist()
    data, protocol = grid.remarks()
    assert "imagenet1k" in data and "mine (1,281,167 training, 10 test images" in data
    assert "temperature = 0.07 and 0.1" in protocol and "batch" not in protocol


def test_published_figures_stand_only_beside_their_own_protocol(tmp_path: Path) -> None:
    write_knn(tmp_path / "a", 0.8)
    write_knn(tmp_path / "b", 0.8, protocol={**KNN, "temperature": 0.1})
    write_knn(tmp_path / "c", np.ones(10, dtype=bool))
    (known,), (other,), (small,) = (Grid.of(gather([tmp_path / name])).columns for name in "abc")
    assert {row.scores["knn/top1"] for row in known.rows} == {79.0, 79.1, 82.1, 82.0, 83.5, 83.8, 83.7}
    assert other.rows == [] and other.obstacles == ["the protocol has other temperature"]
    assert small.rows == [] and "the images are those of imagenet1k" in small.obstacles


def test_table_2_of_the_paper_is_whole() -> None:
    rows = [row for row in PUBLISHED if row.source.short == "Registers, Table 2"]
    assert [row.registers for row in rows] == [0, 4] * 3
    assert [tuple(row.scores.values()) for row in rows][-2:] == [(84.3, 46.6, 0.378), (84.8, 47.9, 0.366)]


def test_a_run_is_a_row_with_its_newest_step_and_a_line_in_the_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "plain", {100: 0.3, 200: 0.45, 300: 0.5})
    write_run(tmp_path / "reg", {100: 0.35, 300: 0.6})
    page = tmp_path / "table.html"
    assert not compare(tmp_path / "plain", tmp_path / "reg", "--output", page)
    said = capsys.readouterr().out
    assert "3 more steps" in said and str(page) in said.replace("\n", "")
    content = stands_alone(page)
    assert "Score against step" in content and "plain: 45 at 200" in content and "reg: 35 at 100" in content
    assert "+10.0 ▲ better" in content and "Registers, Table 2" in content
    assert "DINOv2 ViT-g/14" in content.split("published figures, for orientation")[0]


def test_steps_of_a_run_that_are_named_are_rows(tmp_path: Path) -> None:
    steps = write_run(tmp_path / "run", {100: 0.3, 200: 0.45, 300: 0.5}) / "eval" / "knn"
    grid = Grid.of(gather([steps / "step_00000300", steps / "step_00000100"]))
    assert [row.name for row in grid.rows] == ["run, step 300", "run, step 100"]


def test_names_that_several_have_are_told_apart(tmp_path: Path) -> None:
    places = [write_knn(tmp_path / name, 0.5, weights="same.safetensors", digest=9 * name) for name in "ab"]
    names = {row.name for row in Grid.of(gather(places)).rows}
    assert len(names) == 2 and all(name.startswith("same (") for name in names)


def test_scores_are_plotted_against_registers(tmp_path: Path) -> None:
    for count, accuracy in ((0, 0.5), (4, 0.6), (16, 0.55)):
        folder = write_knn(tmp_path / f"r{count}", accuracy)
        content = read_content(folder)
        content["architecture"]["registers"] = count
        write_content(folder, content)
    assert not compare(tmp_path, "--output", tmp_path / "table.html")
    content = stands_alone(tmp_path / "table.html")
    assert "Score against registers" in content and "55 at 16" in content


@pytest.mark.parametrize(
    ("words", "said"),
    [(["nowhere"], "no such file"), (["."], "no results.json"), (["a", "--output", "x.json"], "end it with .html")],
)
def test_mistakes_are_one_line(
    tmp_path: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if words[0] == "a":
        write_knn(tmp_path / "a", 0.5)
    assert compare(*words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_damaged_outcomes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_knn(tmp_path / name, RIGHT) for name in "ab"]
    stored = folders[0] / "outcomes.npz"
    stored.write_bytes(stored.read_bytes()[:100])
    assert compare(*folders) == 2
    assert "outcomes.npz is damaged" in capsys.readouterr().err


def test_results_from_before_outcomes_were_kept_are_compared_unpaired(tmp_path: Path) -> None:
    folders = [write_knn(tmp_path / name, RIGHT) for name in "ab"]
    (folders[0] / "outcomes.npz").unlink()
    content = json.loads((folders[0] / "results.json").read_text())
    del content["architecture"]
    write_content(folders[0], content)
    assert not difference(evaluation(folders[1]), evaluation(folders[0]), "top1").paired
    assert Grid.of(gather(folders)).rows[0].registers is None
