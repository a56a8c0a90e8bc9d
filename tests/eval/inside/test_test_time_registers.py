"""Test-time registers: the planted neuron is found, and the register takes over what it did to patches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluating import run_suite, surroundings
from planted import as_images, mark, planted_network, planted_pixels, write_planted_classes
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.models.vit import ModelConfig, build_vit
from dinoreg.models.weights import save_backbone
from dinoreg.parallel.mesh import Ranks
from eval.backbone import Backbone
from eval.inside.testtime.network import (
    AddedRegisters,
    Neurons,
    RegisteredBackbone,
    move,
    open_weights,
    read_neurons,
    with_test_time_registers,
)
from eval.inside.testtime.neurons import onset
from eval.inside.walk import walk
from eval.results import Result

WORDS = ["zoom=1", "top_k=1", "cutoff=60", "batch=7", "image_size=32", "images=40", "train_images=60", "photos=2"]


def pictures(count: int = 8) -> Tensor:
    return as_images(planted_pixels(mark(count, 0.05, 3), 3))


def test_activations_are_moved_in_every_image() -> None:
    hidden = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))  # CLS, a register, 4 patches
    neurons, register = torch.tensor([1, 4]), slice(1, 2)
    moved = move(hidden, neurons, register, "strongest", "patches")
    assert move(hidden, neurons, register, "max", "patches").equal(
        torch.stack([move(each[None], neurons, register, "max", "patches")[0] for each in hidden])
    )
    for image in range(3):
        for neuron in range(5):
            column = hidden[image, :, neuron].tolist()
            if neuron in (1, 4):
                column[1] = max(column[2:], key=abs)
                column[2:] = [0.0] * 4
            assert moved[image, :, neuron].tolist() == column
    everywhere = move(hidden, neurons, register, "max", "all")
    assert everywhere[:, 0, neurons].abs().max() == 0
    assert everywhere[:, 1, neurons].equal(hidden[:, 2:, neurons].amax(1))


def test_the_register_takes_the_norm_and_the_patches_lose_it() -> None:
    plain = Backbone(planted_network())
    with_register = RegisteredBackbone(plain, Neurons(((1, 3),)))
    assert (with_register.num_registers, plain.num_registers) == (1, 0)
    before, after = (each.layers(pictures(), [-1], norm=False)[0] for each in (plain, with_register))
    longest = before.patches.norm(dim=-1).amax(1)
    assert longest.min() > 80
    assert after.patches.norm(dim=-1).max() < 40
    torch.testing.assert_close(after.registers.norm(dim=-1)[:, 0], longest, rtol=0.15, atol=5.0)
    # The same for one image at a time, and however the network is run.
    alone = torch.cat([with_register.layers(each[None], [-1], norm=False)[0].patches for each in pictures()])
    torch.testing.assert_close(alone, after.patches, rtol=1e-4, atol=1e-4)
    steps = list(walk(with_register.model, pictures()))
    torch.testing.assert_close(steps[-1].leaving[:, 2:], after.patches)
    features = with_register.model.forward_features(pictures())
    torch.testing.assert_close(features.prenorm[:, 2:], after.patches)
    assert features.patches.shape == before.patches.shape
    assert with_register.attention(pictures(), -1).shape[-1] == 66


@pytest.mark.parametrize(
    "kind", [{}, {"rope_base": 100.0}, {"ffn": "swiglu"}, {"num_registers": 2}, {"pre_norm": True}]
)
def test_added_tokens_enter_as_zeros_without_a_place_behind_the_trained_ones(kind: dict[str, Any]) -> None:
    cfg = replace(
        ModelConfig(embed_dim=32, depth=2, num_heads=2, patch_size=7, image_size=28, num_registers=0, layerscale=0),
        **kind,
    )
    model = build_vit(cfg)
    model.init_weights()
    trained, images = cfg.num_registers, torch.randn(2, 3, 28, 28)
    made = AddedRegisters.of(model.eval(), Neurons(((0, 1),), registers=2))
    x, packing, _ = made.embed([images])
    plain = model.embed([images])[0].unflatten(0, (2, -1))
    tokens = packing.split(x)[0]
    assert tokens[:, 1 + trained : 3 + trained].abs().max() == 0
    assert torch.equal(torch.cat([tokens[:, : 1 + trained], tokens[:, 3 + trained :]], 1), plain)
    features = made.forward_features(images)
    assert features.registers.shape == (2, trained + 2, 32)
    assert features.patches.shape == (2, 16, 32)
    if packing.turns is not None:
        assert (packing.split(packing.turns)[0][:, : 3 + trained, 1] == 0).all()


def test_outliers_rise_where_they_are_first_half_as_high_as_at_last() -> None:
    others = torch.ones(6)
    assert onset(torch.stack([torch.tensor([1.0, 1, 1.2, 6, 9, 10]), others]), 4) == 2
    assert onset(torch.stack([torch.tensor([1.0, 9, 9, 9, 9, 2]), others]), 4) == 0


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted_classes(tmp_path_factory.mktemp("planted") / "data")


def measured(ranks: Ranks, folder: Path, data: Path, *words: str) -> Result:
    return run_suite(
        "test-time-registers", Backbone(planted_network(gather=3)), surroundings(folder, data, ranks), *WORDS, *words
    )


def test_the_suite_finds_the_planted_neuron_and_empties_the_patches(scene: Path, tmp_path: Path) -> None:
    result = measured(Ranks.alone(), tmp_path, scene)
    found = result.details["neurons"]
    assert [(each["block"], each["neuron"]) for each in found] == [(1, 3)]
    assert found[0]["outliers"] > 10 * found[0]["others"]
    assert result.scores["outliers_before"].value == pytest.approx(5, abs=2)
    assert result.scores["outliers_after"].value == 0
    variants = result.details["variants"]
    assert variants["register added"]["norm_registers"]["value"] > 80
    assert variants["register added"]["norm_longest"]["value"] < 40
    assert variants["random neurons moved"]["share"]["value"] == variants["as it is"]["share"]["value"]
    assert variants["as it is"]["mass_registers"] is None
    assert variants["as it is"]["cosine"]["value"] == pytest.approx(1)
    assert {"top1_before", "top1_after"} <= set(result.scores)
    # What was written is what other experiments open, and it demands the same weights.
    plain = Backbone(planted_network(gather=3))
    opened = with_test_time_registers(plain, tmp_path / "out" / "neurons.json")
    assert opened.num_registers == 1
    assert opened.digest != plain.digest
    again = run_suite("test-time-registers", opened, surroundings(tmp_path / "again", scene), *WORDS, "top_k=9")
    assert again.scores == result.scores
    with pytest.raises(ConfigError, match="found in other weights"):
        with_test_time_registers(Backbone(planted_network(seed=1)), tmp_path / "out" / "neurons.json")


def test_a_network_without_outliers_is_left_as_it_is(scene: Path, tmp_path: Path) -> None:
    result = measured(Ranks.alone(), tmp_path, scene, "cutoff=1e6")
    assert result.details["neurons"] == []
    assert any("nothing to move" in note for note in result.notes)
    assert result.scores["outliers_before"].value == 0
    assert not (tmp_path / "out" / "neurons.json").exists()


@pytest.mark.parametrize("rule", ["valley", "3std", "q0.97", "60"])
def test_the_cutoff_is_told_by_the_rules_of_artifacts(scene: Path, tmp_path: Path, rule: str) -> None:
    words = [f"cutoff={rule}", "cutoff_images=30"]
    told = measured(Ranks.alone(), tmp_path, scene, *words).details
    assert told["cutoff"]["rule"] == ("fixed" if rule == "60" else rule)
    assert told["cutoff"]["images"] == (0 if rule == "60" else 30)
    assert [(each["block"], each["neuron"]) for each in told["neurons"]] == [(1, 3)]
    assert told["variants"]["register added"]["share"]["value"] == 0


def test_a_share_of_nothing_has_an_interval(scene: Path, tmp_path: Path) -> None:
    score = measured(Ranks.alone(), tmp_path, scene).scores["outliers_after"]
    assert (score.value, score.low) == (0, 0)
    assert score.high > 5  # of 40 images


def test_all_patches_beyond_the_cutoff_are_told(scene: Path, tmp_path: Path) -> None:
    result = measured(Ranks.alone(), tmp_path, scene, "cutoff=1e-3")
    assert result.details["neurons"] == []
    assert any("all patches" in note for note in result.notes)


def test_a_file_of_neurons_is_opened_like_weights(tmp_path: Path) -> None:
    model = planted_network()
    weights = tmp_path / "plain.safetensors"
    save_backbone(weights, model.state_dict(), model.config, {})
    plain = open_weights(weights)
    found = Neurons(((1, 3),), digest=plain.digest, weights=str(weights))
    opened = open_weights(found.write(tmp_path / "neurons.json"))
    assert isinstance(opened, RegisteredBackbone)
    assert opened.layers(pictures(), [-1], norm=False)[0].patches.norm(dim=-1).max() < 40
    assert (opened.num_registers, plain.num_registers) == (1, 0)


@pytest.mark.parametrize("content", ["nonsense", "{}", json.dumps({"neurons": [], "registers": 1})])
def test_a_file_without_neurons_is_told_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "n.json").write_text(content)
    with pytest.raises(ConfigError, match=r"n\.json"):
        read_neurons(tmp_path / "n.json")


def test_neurons_that_are_not_there_are_told() -> None:
    with pytest.raises(ConfigError, match="block 9"):
        RegisteredBackbone(Backbone(planted_network()), Neurons(((9, 3),)))
