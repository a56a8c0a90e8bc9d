"""The shipped recipes: each loads, says what it should in its header, and holds the published values."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import pytest

import dinoreg
from dinoreg.config import load, to_yaml
from dinoreg.train.recipe import RunConfig, check_world
from dinoreg.train.schedules import Schedules

CONFIGS = Path(dinoreg.__file__).parents[1] / "configs"
RECIPES = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
IMAGENET = 1_281_167

# Read in DINOv2's configs (train/vitl16_short, vitl14, vitg14 over ssl_default_config) and DINO's main_dino.py.
PUBLISHED: dict[str, dict[str, Any]] = {
    "vitl16_short_in1k": {
        "model.arch": "vit_large",
        "model.patch_size": 16,
        "model.ffn": "mlp",
        "model.drop_path": 0.3,
        "model.drop_path_shape": "uniform",
        "model.layerscale": 1e-5,
        "crops.local_size": 96,
        "crops.global_scale": (0.32, 1.0),
        "crops.local_scale": (0.05, 0.32),
        "photometric.blur": (0.0, 0.9, 0.5),
        "objective.dino.head.prototypes": 65536,
        "objective.dino.head.bottleneck_dim": 256,
        "objective.ibot.separate_head": False,
        "objective.ibot.weight": 1.0,
        "objective.koleo.weight": 0.1,
        "objective.koleo.group": 64,
        "objective.targets.centering": "centering",
        "objective.teacher.momentum": 0.992,
        "optim.lr": 4e-3,
        "optim.layer_decay": 0.9,
        "optim.patch_embed_lr": 0.2,
        "optim.weight_decay_end": 0.4,
        "optim.clip": 3.0,
        "train.batch_size": 2048,
    },
    "vitl14_in22k": {
        "model.arch": "vit_large",
        "model.patch_size": 14,
        "model.ffn": "swiglu",
        "model.drop_path": 0.4,
        "crops.local_size": 98,
        "objective.dino.head.prototypes": 131072,
        "objective.dino.head.bottleneck_dim": 384,
        "objective.ibot.separate_head": True,
        "objective.ibot.head.prototypes": 131072,
        "objective.ibot.head.bottleneck_dim": 256,
        "objective.koleo.group": 32,
        "objective.targets.centering": "sinkhorn",
        "objective.teacher.momentum": 0.994,
        "optim.lr": 2e-4,
        "optim.layer_decay": 1.0,
        "optim.weight_decay": 0.04,
        "optim.weight_decay_end": 0.2,
        "train.batch_size": 3072,
    },
    "vitg14": {
        "model.arch": "vit_giant",
        "model.ffn": "swiglu",
        "objective.koleo.group": 12,
        "objective.dino.head.bottleneck_dim": 384,
        "train.batch_size": 3072,
    },
    "dino_vits16_in1k": {
        "model.num_registers": 0,
        "model.layerscale": 0.0,
        "model.drop_path": 0.1,
        "model.drop_path_shape": "linear",
        "crops.global_scale": (0.4, 1.0),
        "crops.local_scale": (0.05, 0.4),
        "photometric.blur": (1.0, 0.1, 0.5),
        "objective.dino.head.train_scale": False,
        "objective.ibot.weight": 0.0,
        "objective.koleo.weight": 0.0,
        "objective.targets.centering": "centering",
        "objective.targets.temperature": 0.04,
        "objective.teacher.momentum": 0.996,
        "optim.weight_decay_end": 0.4,
        "train.batch_size": 512,
    },
}


def recipe(name: str, *overrides: str) -> RunConfig:
    return load(RunConfig, name, ["data.sources=/images", *overrides])


def test_the_recipes_that_were_promised() -> None:
    assert set(RECIPES) == {
        *("demo", "cifar10_vits4", "own_images_1gpu", "own_images_8gpu", "vits14_in1k"),
        *("vitl16_short_in1k", "vitl14_in22k", "vitg14", "dino_vits16_in1k"),
    }


@pytest.mark.parametrize("name", RECIPES)
def test_loads_by_name_and_survives_being_written(name: str, tmp_path: Path) -> None:
    config = recipe(name)
    written = tmp_path / "config.yaml"
    written.write_text(to_yaml(config))
    assert load(RunConfig, written) == config == load(RunConfig, CONFIGS / f"{name}.yaml", ["data.sources=/images"])
    assert config.run_dir == f"runs/{name}"


@pytest.mark.parametrize("name", RECIPES)
def test_header(name: str) -> None:
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    for heading in ("Command", "Hardware", "Time", "Score", "Differs"):
        assert any(line.startswith(f"# {heading} ") for line in header), f"{name} does not say its {heading}"
    assert name in "".join(header) or name == "demo"
    assert all(len(line) <= 120 for line in lines)


@pytest.mark.parametrize("name", RECIPES)
def test_four_registers_settable_to_any_number(name: str) -> None:
    assert recipe(name).model.num_registers == (0 if name == "dino_vits16_in1k" else 4)
    for count in (0, 1, 2, 4, 8, 16):
        config = recipe(name, f"model.num_registers={count}")
        assert config.model.num_registers == count
        if name != "dino_vits16_in1k":  # the control keeps the resampling that the registers paper always applies
            assert config.model.pos_antialias and config.model.pos_offset == 0


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, values in PUBLISHED.items() for key in values])
def test_published_values(name: str, key: str) -> None:
    assert reduce(getattr, key.split("."), recipe(name)) == PUBLISHED[name][key]


@pytest.mark.parametrize(
    ("name", "steps", "peak", "warmup", "temperature_warmup", "frozen"),
    [
        ("vitl16_short_in1k", 125_000, 5.657e-3, 12_500, 37_500, 1250),
        ("vitl14_in22k", 625_000, 3.464e-4, 100_000, 37_500, 1250),
        ("vitg14", 625_000, 3.464e-4, 100_000, 37_500, 1250),
        ("dino_vits16_in1k", 250_228, 1e-3, 25_023, 0, 2503),
    ],
)
def test_published_lengths(
    name: str, steps: int, peak: float, warmup: int, temperature_warmup: int, frozen: int
) -> None:
    schedules = Schedules(recipe(name), IMAGENET)
    assert schedules.total_steps == steps
    assert schedules.lr.peak == pytest.approx(peak, rel=1e-3)
    assert (schedules.lr_warmup, schedules.temperature_warmup, schedules.frozen) == (warmup, temperature_warmup, frozen)


@pytest.mark.parametrize(
    ("name", "world"),
    [
        ("own_images_1gpu", 1),
        ("own_images_8gpu", 8),
        ("vits14_in1k", 8),
        ("vitl16_short_in1k", 32),
        ("vitl14_in22k", 96),
        ("vitg14", 256),
        ("dino_vits16_in1k", 8),
    ],
)
def test_batch_suits_the_hardware_of_the_header(name: str, world: int) -> None:
    check_world(recipe(name), world)
    check_world(recipe(name), 1)


@pytest.mark.parametrize("name", ["own_images_1gpu", "own_images_8gpu"])
def test_own_images_keep_the_prototypes_to_batch_ratio(name: str) -> None:
    config, reference = recipe(name), recipe("vitl16_short_in1k")
    ratio = reference.objective.dino.head.prototypes / reference.train.batch_size
    assert config.objective.dino.head.prototypes == ratio * config.train.batch_size
