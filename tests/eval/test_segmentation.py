"""The suites on masks: from pairs of files to scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_scenes import Dying, Seeing, write_masks
from evaluating import run_suite, surroundings
from PIL import Image

from dinoreg.config import ConfigError, load
from dinoreg.data.images import DataError
from dinoreg.models.vit import ModelConfig, build_vit
from eval.backbone import Backbone, Tokens
from eval.results import Result, write_result
from eval.suites import SUITES
from eval.suites.segmentation import AdeLinearConfig, AdeMsConfig

SHORT = ("steps=60", "batch_size=4", "patches=6", "every=2", "rate=3e-2", "pictures=2")
SMALL = (
    "augment=true",
    "patches=0",
    "every=1",
    "short_side=45",
    "crop=40",
    "whole=false",
    "stride=25",
    "ratio=[0.9,1.1]",
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_masks(tmp_path_factory.mktemp("scenes"))


def test_the_defaults_are_those_of_the_protocol() -> None:
    linear, ms = load(AdeLinearConfig, None, []), load(AdeMsConfig, None, [])
    assert (linear.steps, linear.batch_size, linear.rate, linear.weight_decay) == (40000, 16, 1e-3, 1e-4)
    assert (linear.warmup, linear.warmup_ratio, linear.cat_max_ratio) == (1500, 1e-6, 0.75)
    assert (linear.short_side, linear.ratio, linear.crop, linear.stride) == (512, (0.5, 2.0), 512, 341)
    assert (linear.layers, linear.scales, linear.flip, linear.every, linear.whole) == (1, [1.0], False, 1, False)
    assert (ms.layers, ms.short_side, ms.ratio, ms.crop, ms.stride) == (4, 640, (1.0, 3.0), 640, 320)
    assert (ms.scales, ms.flip, ms.steps) == ([1.0, 1.32, 1.73, 2.28, 3.0], True, 40000)
    for schema in (AdeLinearConfig, AdeMsConfig):
        assert load(schema, None, schema.quick()).patches == 16


def test_classes_that_patches_show_are_learnt(tmp_path: Path, scenes: Path) -> None:
    backbone = Seeing()
    result = run_suite("ade20k-linear", backbone, surroundings(tmp_path, scenes), *SHORT)
    assert result.scores["miou"].value > 85  # areas meet within patches, where nobody can know
    assert result.scores["pixel_accuracy"].value > 92
    assert [row["class"] for row in result.details["by_class"]] == [f"class {n}" for n in range(4)]
    assert min(row["iou"] for row in result.details["by_class"]) > 75
    assert backbone.images == 16  # each image once
    assert (result.data["train"], result.data["test"], result.data["classes"]) == (12, 4, 4)
    entry = result.details["pictures"][0]
    shown = {part: Image.open(tmp_path / "out" / entry[part]) for part in ("image", "truth", "prediction")}
    assert len(result.details["pictures"]) == 2
    same = np.array(shown["truth"]) == np.array(shown["prediction"])
    assert same.all(2).mean() > 0.9
    json.dumps(write_result(tmp_path / "out", result, backbone, "w", 1.0).read_text(), allow_nan=False)
    assert not list((tmp_path / "cache").glob("dense-*.pt"))


def test_they_are_learnt_in_crops_and_told_in_windows(tmp_path: Path, scenes: Path) -> None:
    result = run_suite("ade20k-linear", Seeing(), surroundings(tmp_path, scenes), *SHORT, *SMALL)
    # Colours are distorted in training, so less is learnt of them.
    assert result.scores["pixel_accuracy"].value > 80
    assert result.protocol["tested"] == "windows of 40, every 25 pixels, logits averaged"


def test_four_blocks_and_many_sizes_tell_them_too(tmp_path: Path, scenes: Path) -> None:
    words = (*SMALL, "scales=[1.0,1.5]", "flip=true", "stride=20")
    result = run_suite("ade20k-ms", Seeing(), surroundings(tmp_path, scenes), *SHORT, *words)
    assert (result.suite, result.protocol["blocks"]) == ("ade20k-ms", [0, 1, 2, 3])
    assert result.scores["pixel_accuracy"].value > 75
    shallow = run_suite("ade20k-ms", Seeing(2), surroundings(tmp_path, scenes), *SHORT)
    assert "2 blocks instead of 4: the network has no more" in shallow.notes
    assert shallow.scores["pixel_accuracy"].value > 85


def test_classes_that_no_test_mask_holds_are_named(tmp_path: Path, scenes: Path) -> None:
    result = run_suite("ade20k-linear", Seeing(), surroundings(tmp_path, scenes), *SHORT, "classes=6", "steps=2")
    assert any(
        note.startswith("2 classes have no pixel in the test images (class 4, class 5)") for note in result.notes
    )
    assert result.details["by_class"][5]["accuracy"] is None


def test_files_that_cannot_be_read_are_counted_and_left_out(tmp_path: Path) -> None:
    root = write_masks(tmp_path / "data")
    (root / "images" / "train" / "003.png").write_bytes(b"no image")
    (root / "annotations" / "val" / "001.png").write_bytes(b"")
    for words in ((), SMALL):
        context = surroundings(tmp_path / str(len(words)), root)
        result = run_suite("ade20k-linear", Seeing(), context, *SHORT, *words, "steps=6", "max_bad_share=0.3")
        assert {Path(name).name: reason.partition(":")[0] for name, reason in result.data["bad"].items()} == {
            "003.png": "not-an-image", "001.png": "empty",
        }  # fmt: skip
        assert "2 images could not be read and were left out" in result.notes
    with pytest.raises(ConfigError, match=r"1 of 12 images or their targets .*003.png \(not-an-image\)"):
        run_suite("ade20k-linear", Seeing(), surroundings(tmp_path / "strict", root), *SHORT)


def test_labels_outside_the_set_end_the_run_in_one_line(tmp_path: Path, scenes: Path) -> None:
    with pytest.raises(DataError, match="holds the label 3"):
        run_suite("ade20k-linear", Seeing(), surroundings(tmp_path, scenes), *SHORT, "classes=3")


def test_processes_that_decode_say_what_is_wrong_in_one_line_too(tmp_path: Path, scenes: Path) -> None:
    context = surroundings(tmp_path, scenes)
    context.workers = 1
    with pytest.raises(DataError, match=r"^[^\n]*holds the label 3[^\n]*$"):
        run_suite("ade20k-linear", Seeing(), context, *SHORT, *SMALL, "classes=3", "steps=500")


class Loud(Seeing):
    """Its features are `factor` times as large."""

    factor = 1e6  # beyond fp16

    def layers(self, *args: Any, **kwargs: Any) -> Any:
        found = super().layers(*args, **kwargs)
        return [Tokens(t.cls * self.factor, t.registers, t.patches * self.factor, t.grid) for t in found]


def test_features_beyond_half_precision_are_kept_and_what_is_no_number_is_refused(tmp_path: Path, scenes: Path) -> None:
    loud = Loud()
    result = run_suite("ade20k-linear", loud, surroundings(tmp_path / "loud", scenes), *SHORT)
    assert result.scores["pixel_accuracy"].value > 92
    loud.factor = float("nan")
    with pytest.raises(ConfigError, match=r"--weights: the features of .*000.png are not finite"):
        run_suite("ade20k-linear", loud, surroundings(tmp_path / "nan", scenes), *SHORT)
    with pytest.raises(ConfigError, match="the loss is not finite at step 0"):
        run_suite("ade20k-linear", loud, surroundings(tmp_path / "crops", scenes), *SHORT, *SMALL)


def values(result: Result) -> dict[str, float]:
    return {name: score.value for name, score in result.scores.items()}


@pytest.mark.parametrize("words", [(), SMALL])
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, scenes: Path, words: tuple[str, ...]) -> None:
    words = (*SHORT, *words, "steps=12", "save_every=5")
    whole = run_suite("ade20k-linear", Seeing(), surroundings(tmp_path / "whole", scenes), *words)
    context = surroundings(tmp_path / "broken", scenes)
    dying = Dying(30 if "augment=true" in words else 14)  # in the eighth step, or among the maps of test images
    with pytest.raises(KeyboardInterrupt):
        run_suite("ade20k-linear", dying, context, *words)
    assert list(context.cache.glob("dense-*.pt"))
    again = Seeing()
    result = run_suite("ade20k-linear", again, context, *words)
    assert values(result) == values(whole)
    # The maps that were there, or the first five steps, were not made again; four images have four windows each.
    assert again.images == (2 if "augment=true" not in words else (12 - 5) * 4 + 4 * 4)


def test_real_masks_are_labelled(tmp_path: Path, shared_data: Path) -> None:
    backbone = Backbone(random_network())
    words = ("steps=20", "patches=6", "max_train=12", "max_test=4", "ignore=[11]", "batch_size=4")
    result = run_suite("ade20k-linear", backbone, surroundings(tmp_path, shared_data / "seg_camvid"), *words)
    assert result.data["classes"] == 11
    assert result.scores["pixel_accuracy"].value > 20
    ade = shared_data / "seg_ade20k_samples"
    place = surroundings(tmp_path / "ade", ade)
    place.data.parts.update(train=str(ade), test=str(ade))
    place.data = type(place.data)(None, place.data.parts)
    result = run_suite("ade20k-linear", backbone, place, "steps=2", "patches=6", "batch_size=2")
    assert (result.data["classes"], result.data["class_names"][:3]) == (150, ["wall", "building", "sky"])


def random_network() -> Any:
    torch.manual_seed(0)
    model = build_vit(ModelConfig(embed_dim=64, depth=2, num_heads=2, patch_size=14, image_size=56, layerscale=1.0))
    model.init_weights()
    return model


def test_all_suites_are_registered() -> None:
    assert [SUITES[name].data for name in ("ade20k-linear", "ade20k-ms", "nyud-linear")] == ["ade20k", "ade20k", "nyud"]
