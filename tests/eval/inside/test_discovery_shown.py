"""What the page tells of object discovery, for one network and for two."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluating import run_suite, surroundings
from objects import object_network, write_objects

from eval.backbone import Backbone
from eval.inside.discovery.pictures import draw_features, side_by_side
from eval.inside.discovery.shown import findings
from eval.inside.finding import Album, Finding, Seen
from eval.report.read import read_evaluation
from eval.results import write_result


def measured(folder: Path, data: Path, *words: str, **network: float) -> Seen:
    """The results of one network, written and read again."""
    name = "-".join(f"{value:g} {key}" for key, value in network.items())
    backbone = Backbone(object_network(**network), name)  # type: ignore[arg-type]
    backbone.found = "planted"
    result = run_suite(
        "discovery", backbone, surroundings(folder / name, data), "image_size=-1", "tune_share=0.5", *words
    )
    return Seen(name, read_evaluation(write_result(folder / name, result, backbone, name, 1.0)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_objects(tmp_path_factory.mktemp("data"), 8, sizes=((64, 48), (46, 63)))


def told(seen: list[Seen], folder: Path) -> dict[str, Finding]:
    found = {each.number: each for each in findings(seen, Album(folder))}
    for finding in found.values():
        for picture in finding.pictures:
            assert (folder / picture.png).stat().st_size > 1000 and (folder / picture.pdf).is_file()
        assert all(len(row) == len(finding.head) for row in finding.rows)
    return found


def test_two_networks_side_by_side(data: Path, tmp_path: Path) -> None:
    seen = [measured(tmp_path, data, "photos=2", offset=20.0), measured(tmp_path, data, "photos=2", registers=4)]
    found = told(seen, tmp_path)
    assert list(found) == ["1.9", "2"] and len(found["2"].pictures) == 2
    scores = found["1.9"]
    assert "20 offset: right in 100.0 % of images with the chosen bias" in scores.seen
    assert "0.0 % without a bias" in scores.seen and "clearly more than a box drawn without looking" in scores.seen
    assert "4 registers less 20 offset, with the chosen bias: +0.0 points" in scores.seen
    assert "may be chance" in scores.seen
    assert scores.rows[1][:2] == ["4 registers", "100.0 (67.6–100.0)"]
    assert "8 images" in scores.basis and "chosen on 4 of them, judged on 4" in scores.basis
    assert not any("published" in row[0] for row in scores.rows)
    assert "No patch stands out" in found["2"].seen or "of the patches stand out by their norm" in found["2"].seen
    assert "best were the queries of block 2" in found["2"].seen or "best were the keys of block 2" in found["2"].seen


def test_maps_of_features_say_which_bias_they_have(data: Path, tmp_path: Path) -> None:
    words = ("photos=2", "features=[k,v]", "biases=[0.0]")
    seen = [measured(tmp_path, data, "tune_share=0.0", *words, registers=0)]
    assert "each centred." in draw_features(seen, Album(tmp_path))[0].caption


def test_one_network_without_a_choice_and_without_photos(data: Path, tmp_path: Path) -> None:
    found = told([measured(tmp_path, data, "tune_share=0.0", "photos=0", "features=[v]", registers=0)], tmp_path)
    assert "without a bias (67.6 to 100.0 %)" in found["1.9"].seen
    assert not found["2"].pictures and found["2"].rows[0][-1] == "–"


def test_biases_in_other_units_have_a_figure_of_their_own(data: Path, tmp_path: Path) -> None:
    words = ("photos=0", "features=[k]")
    seen = [
        measured(tmp_path, data, *words, "biases=[0.0,-0.2]", registers=0),
        measured(tmp_path, data, *words, "biases=[-5.0]", "bias_unit=absolute", registers=1),
        measured(tmp_path, data, *words, "biases=[-0.9]", registers=4),
    ]
    pictures = told(seen, tmp_path)["1.9"].pictures
    assert [each.png for each in pictures] == ["figures/discovery_bias.png", "figures/discovery_bias_absolute.png"]


def test_published_figures_stand_beside_scores_on_the_same_images(data: Path, tmp_path: Path) -> None:
    seen = measured(tmp_path, data, "photos=0", registers=0)
    seen.evaluation.data["test"] = 5011  # as many as VOC 2007 has
    rows = told([seen], tmp_path)["1.9"].rows
    assert ["published, VOC07: DINOv2 L/14", "", "", "", "35.3", ""] in rows
    assert ["published, VOC07: DINO S/16 (LOST paper, keys, no bias)", "61.9", "", "", "", ""] in rows


def test_networks_that_were_shown_other_images_are_not_compared(data: Path, tmp_path: Path) -> None:
    other = write_objects(tmp_path / "other", 8, sizes=((64, 48), (46, 63)), seed=1)
    words = ("photos=1", "features=[k]", "biases=[0.0]")
    seen = [measured(tmp_path, data, *words, registers=0), measured(tmp_path, other, *words, registers=4)]
    names = [each.details["photos"][0]["name"] for each in seen]  # type: ignore[index]
    assert names[0] == names[1] and list(side_by_side(seen)) == [[0], [1]]  # other photos of the same name
    found = told(seen, tmp_path)
    assert "was not shown the same images" in found["1.9"].seen


def test_choices_that_were_judged_on_other_images_are_not_compared(data: Path, tmp_path: Path) -> None:
    words = ("photos=0", "features=[k]", "biases=[0.0]")
    seen = [measured(tmp_path, data, *words, registers=0), measured(tmp_path, data, *words, "seed=1", registers=4)]
    assert "4 registers less 0 registers, without a bias: " in told(seen, tmp_path)["1.9"].seen
