"""The suite on depths: from pairs of files to scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from dense_scenes import Dying, Seeing, write_depths
from evaluating import run_suite, surroundings
from PIL import Image

from dinoreg.config import ConfigError, load
from dinoreg.models.vit import ModelConfig, build_vit
from eval.backbone import Backbone
from eval.results import write_result
from eval.suites.depth import EIGEN, Judge, NyudConfig, four_blocks

SHORT = ("steps=200", "batch_size=4", "patches=6", "every=2", "rate=3e-2", "pictures=2", "max_depth=6")
SMALL = ("augment=true", "patches=0", "every=1", "crop=[36,50]", "flip=true", "bins=32", "upsample=4")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_depths(tmp_path_factory.mktemp("scenes"))


def test_the_defaults_are_those_of_the_protocol() -> None:
    cfg = load(NyudConfig, None, [])
    assert (cfg.steps, cfg.batch_size, cfg.rate, cfg.weight_decay, cfg.clip) == (38400, 16, 1e-4, 0.01, 35)
    assert (cfg.warmup, cfg.warmup_ratio, cfg.loss_warmup, cfg.loss_group) == (12800, 1e-3, 100, 2)
    assert (cfg.bins, cfg.min_depth, cfg.max_depth, cfg.upsample, cfg.gradient_weight) == (256, 1e-3, 10, 4, 0.5)
    assert (cfg.crop, cfg.flip, cfg.layers) == ((416, 544), True, [1, 4])
    assert four_blocks(12) == [2, 5, 8, 11]
    assert four_blocks(24) == [4, 11, 17, 23]
    assert four_blocks(40) == [9, 19, 29, 39]
    assert four_blocks(32) == [7, 15, 23, 31]
    assert (four_blocks(2), four_blocks(1)) == ([0, 1], [0])


@pytest.mark.parametrize("words", [(), SMALL], ids=["maps", "crops"])
def test_depths_that_patches_show_are_learnt(tmp_path: Path, scenes: Path, words: tuple[str, ...]) -> None:
    backbone = Seeing()
    result = run_suite("nyud-linear", backbone, surroundings(tmp_path, scenes), *SHORT, *words)
    scores = result.scores
    assert list(scores)[:2] == ["rmse_lin1", "absrel_lin1"]
    for head in ("lin1", "lin4"):
        assert scores[f"absrel_{head}"].value < (0.2 if not words else 0.3)
        assert scores[f"delta1_{head}"].value > (0.75 if not words else 0.55)
        assert scores[f"delta3_{head}"].value >= scores[f"delta2_{head}"].value >= scores[f"delta1_{head}"].value
    assert result.protocol["blocks"] == [0, 1, 2, 3]
    assert result.protocol["values_a_metre"] == [1000, 1000]
    assert result.data["unit"].startswith("millimetres")
    assert any("whole images: Eigen's crop is for NYU" in note for note in result.notes)
    entry = result.details["pictures"][0]
    assert 1 <= entry["low_m"] < entry["high_m"] <= 4
    shown = np.array(Image.open(tmp_path / "out" / entry["prediction_lin1"]))
    truth = np.array(Image.open(tmp_path / "out" / entry["truth"]))
    assert shown.shape == truth.shape
    assert (truth[0] == 0).all()
    assert (truth[2:] > 0).any()
    write_result(tmp_path / "out", result, backbone, "w", 1.0)


def test_the_crop_of_eigen_is_for_frames_of_nyu(tmp_path: Path, scenes: Path) -> None:
    class Probe:
        cfg = load(NyudConfig, None, [])

    truth = torch.ones(480, 640)
    truth[100, 100] = 0
    counted = Judge(Probe(), {}, None, eigen=True).counted(truth)  # type: ignore[arg-type]
    assert counted.sum() == (471 - 45) * (601 - 41) - 1
    assert counted[EIGEN].sum() == counted.sum()
    assert Judge(Probe(), {}, None, eigen=True).counted(torch.ones(48, 64)).all()  # type: ignore[arg-type]
    result = run_suite(
        "nyud-linear", Seeing(), surroundings(tmp_path, scenes), *SHORT, "steps=2", "eigen_crop=yes"
    )  # fmt: skip
    assert not any("Eigen" in note for note in result.notes)


def test_a_mirrored_view_is_turned_back(tmp_path: Path, scenes: Path) -> None:
    """Of a backbone that shows colours alone, both views say the same."""
    words = (*SHORT, *SMALL, "steps=30")
    one = run_suite("nyud-linear", Seeing(), surroundings(tmp_path / "a", scenes), *words, "flip=false")
    two = run_suite("nyud-linear", Seeing(), surroundings(tmp_path / "b", scenes), *words)
    assert two.scores["rmse_lin1"].value == pytest.approx(one.scores["rmse_lin1"].value, rel=0.05)


def test_one_head_alone_learns_as_beside_the_other(tmp_path: Path, scenes: Path) -> None:
    both = run_suite("nyud-linear", Seeing(), surroundings(tmp_path / "a", scenes), *SHORT, "steps=20")
    alone = run_suite("nyud-linear", Seeing(), surroundings(tmp_path / "b", scenes), *SHORT, "steps=20", "layers=[1]")
    assert "rmse_lin4" not in alone.scores
    assert alone.scores["rmse_lin1"].value == pytest.approx(both.scores["rmse_lin1"].value, rel=1e-5)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, scenes: Path) -> None:
    words = (*SHORT, *SMALL, "steps=25", "save_every=10")
    whole = run_suite("nyud-linear", Seeing(), surroundings(tmp_path / "whole", scenes), *words)
    context = surroundings(tmp_path / "broken", scenes)
    with pytest.raises(KeyboardInterrupt):
        run_suite("nyud-linear", Dying(13 * 4), context, *words)
    again = Seeing()
    result = run_suite("nyud-linear", again, context, *words)
    assert {n: s.value for n, s in result.scores.items()} == {n: s.value for n, s in whole.scores.items()}
    assert again.images == (25 - 10) * 4 + 4 * 2


def test_images_without_depths_in_range_are_counted(tmp_path: Path) -> None:
    root = write_depths(tmp_path / "data")
    Image.fromarray(np.zeros((45, 60), dtype=np.uint16)).save(root / "val" / "001.depth.png")
    result = run_suite("nyud-linear", Seeing(), surroundings(tmp_path / "a", root), *SHORT, "steps=3")
    assert "1 test images have no depth in range and do not count" in result.notes
    assert np.isfinite(result.scores["rmse_lin1"].value)
    with pytest.raises(ConfigError, match="no test image has a depth between"):
        run_suite(
            "nyud-linear", Seeing(), surroundings(tmp_path / "b", root), *SHORT, "steps=3", "max_depth=0.5",
        )  # fmt: skip


def test_shares_that_groups_of_images_do_not_fill_are_refused(tmp_path: Path, scenes: Path) -> None:
    with pytest.raises(ConfigError, match="loss_group: each process's share of batch_size=5 is no multiple"):
        run_suite("nyud-linear", Seeing(), surroundings(tmp_path, scenes), *SHORT, "batch_size=5")


def test_real_depths_are_told(tmp_path: Path, shared_data: Path) -> None:
    torch.manual_seed(0)
    model = build_vit(ModelConfig(embed_dim=64, depth=2, num_heads=2, patch_size=14, image_size=56, layerscale=1.0))
    model.init_weights()
    words = ("steps=20", "patches=6", "max_train=8", "max_test=4", "batch_size=4")
    context = surroundings(tmp_path, shared_data / "depth_7scenes_redkitchen")
    result = run_suite("nyud-linear", Backbone(model), context, *words)
    assert result.data["unit"].startswith("millimetres")
    assert result.scores["rmse_lin1"].value < 3
    assert "2 blocks instead of 4: the network has no more" in result.notes
