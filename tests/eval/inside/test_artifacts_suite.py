"""`dinoreg-eval artifacts` on networks whose outliers were planted: found where they are, as many, since that layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_ranks
from evaluating import run_suite, surroundings
from numpy.typing import NDArray
from planted import GRID, mark, planted_network, write_planted, write_planted_classes

from dinoreg.config import ConfigError, load
from dinoreg.models.vit import ModelConfig, build_vit
from dinoreg.models.weights import save_backbone
from dinoreg.parallel.mesh import Ranks
from eval.backbone import Backbone
from eval.inside.artifacts.shown import findings
from eval.inside.finding import Album, Seen
from eval.report.read import read_evaluation
from eval.results import Result, write_result
from eval.suites.artifacts import ArtifactsConfig

# The images are shown as they were written, and nothing is fitted longer than a test needs.
WORDS = ["zoom=1", "images=0", "train_images=0", "probe_images=40", "probe_tokens=16", "probe_iterations=60"]
WORDS += ["c_steps=2", "c_iterations=40", "resampled_images=10", "photos=2"]
COUNT, RATE = 40, 0.03


def look(folder: Path, data: Path, *words: str, weights: Path | None = None, **planted: Any) -> Result:
    context = surroundings(folder, data)
    context.weights = weights
    backbone = Backbone(planted_network(**planted), planted.get("home", "planted"))
    return run_suite("artifacts", backbone, context, *WORDS, *words)


@pytest.fixture(scope="module")
def marked() -> NDArray[np.bool_]:
    return mark(COUNT, RATE)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, marked: NDArray[np.bool_]) -> Path:
    return write_planted(tmp_path_factory.mktemp("images") / "photos", marked)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Result:
    return look(tmp_path_factory.mktemp("planted"), images, block=2)


def test_as_many_outliers_are_found_as_were_planted(planted: Result, marked: NDArray[np.bool_]) -> None:
    told, score = planted.details["norms"], planted.scores["outlier_share"]
    assert told["outliers"] == marked.sum()
    assert told["tokens"] == marked.size
    assert told["images_with"] == marked.any((1, 2)).sum()
    assert score.value == pytest.approx(100 * marked.mean())
    assert score.low < score.value < score.high
    assert score.per_image is not None
    np.testing.assert_allclose(score.per_image, 100 * marked.mean((1, 2)), rtol=1e-6)
    assert told["clouds"]["two"]
    assert planted.scores["norm_max_over_median"].value > 5


def test_they_are_found_where_they_were_planted(planted: Result, marked: NDArray[np.bool_]) -> None:
    np.testing.assert_array_equal(planted.arrays["places"].reshape(GRID, GRID), marked.sum(0))
    inside = marked[:, 1:-1, 1:-1]
    border = (marked.sum() - inside.sum()) / (marked[0].size - inside[0].size)
    expected = border / (inside.sum() / inside[0].size)
    assert planted.details["places"]["border_ratio"] == pytest.approx(expected)
    shown = planted.arrays["photo_norms"]
    cutoff = planted.details["cutoff"]["value"]
    np.testing.assert_array_equal(shown > cutoff, marked[[0, COUNT - 1]])


def test_the_layer_and_the_branch_that_make_them_are_found(planted: Result) -> None:
    rise = planted.details["layers"]["rise"]
    assert (rise["layer"], rise["branch"]) == (2, "feed-forward")
    assert rise["before"] < 1.3
    assert rise["after"] > 7
    assert planted.arrays["layers"].shape[:2] == (4, 2)
    assert (planted.arrays["layers"].sum(-1) == COUNT * GRID**2).all()


@pytest.mark.parametrize("block", [0, 1])
def test_another_layer_is_found_as_well(tmp_path: Path, images: Path, block: int) -> None:
    found = look(tmp_path, images, "probe_images=0", "resampled_images=0", block=block).details["layers"]["rise"]
    assert (found["layer"], found["branch"]) == (block, "feed-forward")


def test_outliers_are_told_at_the_layer_that_is_asked_for(tmp_path: Path, images: Path) -> None:
    found = look(tmp_path, images, "layer=1", "probe_images=0", "resampled_images=0", block=2)
    assert found.details["layer"] == 1
    assert found.scores["outlier_share"].value == 0
    with pytest.raises(ConfigError, match="layer: the network has 4 layers: no layer 4"):
        look(tmp_path, images, "layer=4")


@pytest.mark.parametrize("planted", [{"home": "nowhere"}, {"home": "registers", "registers": 2}])
def test_none_are_found_among_patches_where_none_were_planted(
    tmp_path: Path, images: Path, planted: dict[str, Any]
) -> None:
    result = look(tmp_path, images, "resampled_images=0", **planted)
    assert result.details["cutoff"]["value"] is None
    assert result.details["norms"]["outliers"] == 0
    score = result.scores["outlier_share"]
    assert score.value == score.low == 0 < score.high
    assert result.details["layers"]["rise"] is None
    assert result.details["neighbours"]["auroc"] is None
    assert not {"neighbour_auroc", "border_ratio", "position_top1_outlier"} & set(result.scores)
    assert "position_top1_normal" in result.scores
    json.dumps(result.details, allow_nan=False)


def test_the_register_that_took_over_is_seen(tmp_path: Path, images: Path) -> None:
    result = look(tmp_path, images, "probe_images=0", home="registers", registers=2)
    median = {each["type"]: each["percentiles"]["0.5"] for each in result.details["types"]}
    assert list(median) == ["CLS", "register 0", "register 1"]
    assert median["register 0"] > 5 * median["register 1"]
    assert max(each["cv"] for each in result.details["types"]) < 0.01
    assert result.arrays["types"].shape[0] == 3


def test_probes_read_places_from_normal_patches_better_than_from_outliers(planted: Result) -> None:
    normal, outlier = planted.details["probes"]["normal"], planted.details["probes"]["outlier"]
    assert normal["position_top1"] > 90 > 50 > outlier["position_top1"]
    assert normal["position_distance"] < outlier["position_distance"]
    assert normal["tokens"] == 20 * 16


def test_a_cutoff_by_hand_and_by_other_rules_is_exact_and_recorded(tmp_path: Path, images: Path) -> None:
    fixed = look(tmp_path, images, "cutoff=12", "probe_images=0", "resampled_images=0")
    assert fixed.details["cutoff"] == {"value": 12.0, "rule": "fixed", "how": "given by hand", "images": 0, "tokens": 0}
    assert "cutoff 12: given by hand" in fixed.notes
    rule = look(tmp_path, images, "cutoff=3std", "cutoff_images=10", "probe_images=0", "resampled_images=0")
    assert rule.details["cutoff"]["images"] == 10
    assert rule.details["cutoff"]["tokens"] == 10 * GRID**2


def test_single_tokens_show_the_class_where_they_took_it_in(tmp_path: Path) -> None:
    data = write_planted_classes(tmp_path / "data", train=40, test=12, rate=0.06)
    result = look(tmp_path, data, "probe_images=0", "resampled_images=0", "draws=2", gather=2)
    top1 = {name: column["top1"] for name, column in result.details["single"]["columns"].items()}
    assert top1["CLS"] > 95
    assert top1["outlier"] > 95
    assert top1["normal"] < 60
    assert result.data["classes"] == 4


def test_without_classes_single_tokens_are_left_out_and_that_is_said(planted: Result) -> None:
    assert "single" not in planted.details
    assert any("no classes" in note for note in planted.notes)


def test_antialiasing_is_tried_at_another_size_than_the_native_one(
    planted: Result, tmp_path: Path, images: Path
) -> None:
    told = planted.details["resampled"]
    assert (told["native"], told["side"], told["as_used"]) == (8, 3, False)
    assert told["gradient_std"][1] > 10 * told["gradient_std"][0]
    larger = look(tmp_path, images, "probe_images=0", image_size=64)
    assert (larger.details["resampled"]["side"], larger.details["resampled"]["as_used"]) == (7, False)
    asked = look(tmp_path, images, "probe_images=0", "image_size=32", image_size=64)
    assert (asked.details["resampled"]["side"], asked.details["resampled"]["as_used"]) == (8, True)


def test_the_training_of_a_run_is_followed(tmp_path: Path, images: Path) -> None:
    for step, home in ((100, "nowhere"), (200, "patches"), (300, "patches")):
        model = planted_network(home=home)
        save_backbone(tmp_path / f"run/teacher/step_{step:08d}.safetensors", model.state_dict(), model.config, {})
    result = look(tmp_path, images, "probe_images=0", "step_images=20", weights=tmp_path / "run")
    told = result.details["steps"]["told"]
    assert [each["step"] for each in told] == [100, 200, 300]
    assert [bool(each["own_share"]) for each in told] == [False, True, True]
    assert told[0]["share"] == 0
    assert told[2]["share"] == pytest.approx(0.03, abs=0.01)
    assert result.arrays["steps"].sum(-1).tolist() == [20 * GRID**2] * 3
    alone = look(tmp_path, images, "probe_images=0", weights=tmp_path / "elsewhere.safetensors")
    assert "steps" not in alone.details


def saved(folder: Path, result: Result, name: str, **planted: Any) -> Seen:
    backbone = Backbone(planted_network(**planted))
    backbone.found = "written by hand"
    return Seen(name, read_evaluation(write_result(folder, result, backbone, name, 1.0)))


def test_everything_is_told_and_drawn_side_by_side(tmp_path: Path) -> None:
    data = write_planted_classes(tmp_path / "data", train=12, test=8, rate=0.06)
    seen = []
    for name, planted in {"plain": {}, "4 registers": {"home": "registers", "registers": 4}}.items():
        result = look(tmp_path, data, "draws=1", "photos=1", "c_iterations=10", "probe_images=8", **planted)
        seen.append(saved(tmp_path / name, result, name, **planted))
    for group in (seen[1:2], seen):
        folder = tmp_path / str(len(group))
        told = findings(group, Album(folder))
        assert [each.number for each in told] == ["1.1", "1.2", "1.3", "1.4", "1.5", "1.6", "1.12"]
        for each in told:
            assert each.seen
            assert "image" in each.basis
            assert all(len(row) == len(each.head) for row in each.rows)
            assert all((folder / picture.png).is_file() for picture in each.pictures)
    types = next(each for each in told if each.number == "1.6")
    shares = {(row[0], row[1]): row[-1] for row in types.rows}
    assert shares["plain", "patches"] not in ("0 %", "–")
    assert shares["4 registers", "patches"] == "0 %"
    assert shares["4 registers", "register 0"] == "100.0 %"


def shared_out(ranks: Ranks, folder: Path, data: Path) -> tuple[Any, ...]:
    """Everything but floats that are added in another order."""
    context = surroundings(folder, data, ranks)
    backbone = Backbone(planted_network(gather=2, registers=1))
    result = run_suite("artifacts", backbone, context, *WORDS, "draws=2")
    values = {name: (score.value, score.low, score.high) for name, score in result.scores.items()}
    return values, result.details, result.arrays, result.data


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    data = write_planted_classes(tmp_path / "data", train=12, test=9, rate=0.06)
    first, second = run_ranks(shared_out, 2, tmp_path / "together", data)
    alone = shared_out(Ranks.alone(), tmp_path / "alone", data)
    for scores, details, arrays, about in (first, second):
        assert about == alone[3]
        assert details["norms"] == alone[1]["norms"]
        assert details["cutoff"] == alone[1]["cutoff"]
        assert details["single"] == alone[1]["single"]
        for name in ("layers", "outlier_layers", "types", "places", "cosines", "photos"):
            np.testing.assert_array_equal(arrays[name], alone[2][name])
        for name, values in scores.items():
            assert values == pytest.approx(alone[0][name], rel=1e-5)


@pytest.mark.parametrize(
    ("word", "key"),
    [("cutoff=high", "cutoff"), ("cutoff_images=0", "cutoff_images"), ("probe_c=0", "probe_c"), ("draws=-1", "draws"),
     ("c_low=6", "c_low"), ("heldout=1", "heldout"), ("most_steps=0", "most_steps"), ("neighbours=some", "neighbours")],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(word: str, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        load(ArtifactsConfig, None, [word])


def test_options_may_be_numbers_or_words() -> None:
    for word in ("cutoff=150", "cutoff=150.5", "cutoff=3std", "cutoff=q0.98", "cutoff=valley"):
        assert load(ArtifactsConfig, None, [word]).cutoff == word.partition("=")[2]


def test_a_network_whose_tokens_are_no_numbers_is_refused(tmp_path: Path, images: Path) -> None:
    model = planted_network()
    with torch.no_grad():
        model.cls_token.fill_(torch.nan)
    with pytest.raises(ConfigError, match="no finite numbers"):
        run_suite("artifacts", Backbone(model), surroundings(tmp_path, images), *WORDS, "cutoff=50")
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("kind", ["rotary", "clip", "swiglu"])
def test_networks_of_other_families_are_looked_at_as_well(tmp_path: Path, images: Path, kind: str) -> None:
    """With random weights: as DINOv3's, CLIP's and DINOv2 ViT-g's."""
    more: dict[str, Any] = {
        "rotary": {"rope_base": 100.0},
        "clip": {"pre_norm": True, "activation": "quick_gelu"},
        "swiglu": {"ffn": "swiglu"},
    }[kind]
    torch.manual_seed(0)
    model = build_vit(
        ModelConfig(embed_dim=64, depth=2, num_heads=2, patch_size=8, image_size=32, layerscale=1.0, **more)
    )
    model.init_weights()
    words = ["images=10", "neighbours=pairs", "neighbours_border=false", "neighbours_embedded=true", "normed=false"]
    result = run_suite("artifacts", Backbone(model), surroundings(tmp_path, images), *WORDS, *words)
    assert result.details["norms"]["tokens"] == 10 * 16
    assert result.details["rotary"] == (kind == "rotary")
    assert ("resampled" in result.details) == (kind != "rotary")
    assert any("rotary" in note for note in result.notes) == (kind == "rotary")
    # The 2 x 2 patches inside count once for each of their four neighbours, also for those on the border.
    assert result.details["neighbours"]["normal"] == 10 * 4 * 4


def test_one_image_is_enough(tmp_path: Path, images: Path) -> None:
    result = look(tmp_path, images, "images=1")
    assert result.details["norms"]["images"] == 1
    assert "probes" not in result.details
    json.dumps(result.details, allow_nan=False)
