"""Artifacts, knock-outs and test-time registers of networks and images that leave little to measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluating import run_suite, surroundings, write_classes, write_data

from dinoreg.config import ConfigError
from dinoreg.models.vit import ModelConfig, VisionTransformer, build_vit
from eval.backbone import Backbone
from eval.inside.finding import Album, Finding, Seen
from eval.report.read import read_evaluation
from eval.results import write_result
from eval.suites import SUITES

WORDS = {
    "artifacts": ["c_steps=2", "c_iterations=10", "probe_iterations=10", "cutoff=q0.9", "photos=1"],
    "knockout": ["layers=1", "masked_images=2", "left_out_images=1", "steps=2", "orders=1", "photos=1"],
    "test-time-registers": ["cutoff=q0.9", "photos=1", "detect=-1"],
}


def network(**kind: Any) -> VisionTransformer:
    torch.manual_seed(0)
    small: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32}
    model = build_vit(ModelConfig(**{**small, "num_registers": 0, "layerscale": 1.0, **kind}))
    model.init_weights()
    return model.eval()


def told(suite: str, folder: Path, data: Path, model: VisionTransformer, *words: str) -> dict[str, Finding]:
    """The sections by number, from a results.json without NaN."""
    backbone = Backbone(model)
    backbone.found = "written by hand"
    context = surroundings(folder, data)
    result = run_suite(suite, backbone, context, *WORDS[suite], *words)
    path = write_result(context.output, result, backbone, "w", 1.0)
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    found = SUITES[suite].teller()([Seen("it", read_evaluation(path))], Album(folder))
    return {each.number: each for each in found}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("odd") / "data", 4, 3)


@pytest.mark.parametrize("suite", WORDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_networks_whose_tokens_are_no_numbers_are_refused_in_one_line(
    suite: str, value: float, data: Path, tmp_path: Path
) -> None:
    model = network()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias.fill_(value)
    with pytest.raises(ConfigError, match="no finite numbers"):
        told(suite, tmp_path, data, model)


@pytest.mark.parametrize("suite", WORDS)
def test_an_image_of_one_patch_has_no_neighbours_and_no_places(suite: str, data: Path, tmp_path: Path) -> None:
    found = told(suite, tmp_path, data, network(patch_size=32, num_registers=1))
    if suite == "artifacts":
        assert "No outliers to compare" in found["1.3"].seen


@pytest.mark.parametrize("suite", WORDS)
def test_images_of_one_class_say_nothing_of_accuracy(suite: str, tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_classes(tmp_path / "four" / part, 4)
        (tmp_path / "data" / part).mkdir(parents=True)
        (tmp_path / "four" / part / "class0").rename(tmp_path / "data" / part / "class0")
    found = told(suite, tmp_path, tmp_path / "data", network(num_registers=1))
    assert "1.5" not in found
    assert not any("accuracy" in each.seen for each in found.values())


def test_tokens_are_probed_in_bf16_on_a_cpu(data: Path, tmp_path: Path) -> None:
    assert "1.4" in told("artifacts", tmp_path, data, network(), "precision=bf16")


def test_a_network_of_zeros_makes_nothing_that_is_no_number(data: Path, tmp_path: Path) -> None:
    model = network(num_registers=1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert "No patch stands out" in told("artifacts", tmp_path, data, model, "cutoff=valley")["1.1"].seen


def test_patches_that_enter_as_outliers_are_said_to_be_made_by_no_layer(tmp_path: Path) -> None:
    """The patch embedding alone makes one class's patches many times as long, and the blocks add nothing."""
    data, model = write_data(tmp_path / "data", 4, 3), network(layerscale=1e-6)
    with torch.no_grad():
        model.pos_embed.zero_()
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.weight[0, 0] = 1.0  # how red it is: much in class 0 and 3, little elsewhere
        model.patch_embed.proj.bias.fill_(0.0)
        model.patch_embed.proj.bias[0] = 130.0
    found = told("artifacts", tmp_path, data, model, "cutoff=3", "draws=0", "probe_images=0", "resampled_images=0")
    assert "no layer makes them" in found["1.2"].seen


def test_the_end_of_one_cloud_is_said_to_be_no_artifacts(data: Path, tmp_path: Path) -> None:
    found = told("artifacts", tmp_path, data, network(), "draws=0", "probe_images=0", "resampled_images=0")
    assert "stand out" in found["1.1"].seen
    assert "one cloud, of which these are the end" in found["1.1"].seen
    assert "No difference can be told" in found["1.3"].seen  # of so few images
