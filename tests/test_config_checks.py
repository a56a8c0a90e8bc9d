"""What a recipe must satisfy before anything starts: each rule is broken once."""

from __future__ import annotations

import dataclasses
from functools import reduce

import pytest

from dinoreg.config import ConfigError, leaf_keys, load
from dinoreg.train.recipe import RunConfig, check_world

RUN = ("data.sources=/images", "train.steps=100", "model.image_size=224", "crops.local_size=98")


def mistake(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(RunConfig, None, [*RUN, *overrides])
    text = str(caught.value)
    assert "\n" not in text and "the command line" in text
    return text


def test_the_defaults_need_only_a_length() -> None:
    config = load(RunConfig, None, RUN)
    assert config.train.steps == 100 and config.data.sources == ["/images"]
    with pytest.raises(ConfigError, match=r"^train.steps: give the length of the run: steps, epochs or images"):
        load(RunConfig, None, ["data.sources=/images"])


@pytest.mark.parametrize(
    ("overrides", "key", "says"),
    [
        ("crops.global_size=225", "crops.global_size", "225 pixels are not a multiple of model.patch_size 14"),
        ("crops.local_size=96", "crops.local_size", "the nearest are 84 and 98"),
        ("crops.local_size=9", "crops.local_size", "the nearest are 14"),
        ("model.patch_size=0", "model.patch_size", ""),
        ("model.patch_size=15", "model.patch_size", "224"),
        ("model.num_heads=5", "model.num_heads", "5 heads do not divide the width 384"),
        ("model.embed_dim=385", "model.num_heads", "do not divide the width 385"),
        ("model.drop_path=1", "model.drop_path", ""),
        ("model.in_channels=4", "photometric.mean", "has 3 values for model.in_channels 4"),
        ("photometric.std=[1,1]", "photometric.std", "photometric.mean"),
        ("masks.ratio=[0.5,0.1]", "masks.ratio", ""),
        ("masks.probability=0", "masks.probability", "objective.ibot.weight=0"),
        ("crops.global_scale=[0.9,0.3]", "crops.global_scale", ""),
        ("crops.flip=1.5", "crops.flip", ""),
        ("photometric.blur=[0,2,0]", "photometric.blur", ""),
        ("train.accumulate=3", "train.accumulate", "3 parts do not divide train.batch_size 64"),
        ("train.epochs=10", "train.steps", "give one of steps and epochs, and set the other to null"),
        ("train.steps=0", "train.steps", "must be more than 0"),
        ("train.precision=fp16", "train.precision", "expected one of ['auto', 'bf16', 'fp32']"),
        ("objective.koleo.group=48", "objective.koleo.group", "48 does not divide train.batch_size 64"),
        ("objective.koleo.group=1", "objective.koleo.group", "1 image has no neighbours"),
        ("objective.koleo.group=1", "objective.koleo.group", "has no neighbours"),
        ("objective.targets.temperature=0", "objective.targets.temperature", "must be more than 0"),
        ("objective.targets.temperature_warmup=2", "objective.targets.temperature_warmup", "fraction of the run"),
        ("objective.targets.temperature_warmup=200 steps", "objective.targets.temperature_warmup", "longer than"),
        ("objective.teacher.momentum=1.1", "objective.teacher.momentum", "must be between 0 and 1"),
        ("optim.betas=[0.9,1]", "optim.betas", "less than 1"),
        ("optim.warmup=5", "optim.warmup", "'5 steps'"),
        ("optim.warmup=101 steps", "optim.warmup", "101 steps, longer than the run's 100"),
        ("optim.freeze_last_layer=1e5 images", "optim.freeze_last_layer", "longer than the run's 100"),
        ("optim.lr=0", "optim.lr", "must be more than 0"),
        ("monitor.knn_every=100", "monitor.knn_every", "needs monitor.knn_train"),
        ("data.workers=-2", "data.workers", "must be at least -1"),
        ("seed=9223372036854775808", "seed", "less than 2**63"),
        ("train.time_limit=90", "train.time_limit", "not a time: '90'"),
        ("checkpoint.keep_every=1500", "checkpoint.keep_every", "multiple of checkpoint.every"),
        ("watch.stall=5", "watch.stall", "must be at least watch.silence"),
    ],
)  # fmt: skip
def test_each_rule(overrides: str, key: str, says: str) -> None:
    text = mistake(overrides)
    assert text.startswith(f"{key}: ") and says in text


def test_both_weights_zero() -> None:
    assert mistake("objective.dino.weight=0", "objective.ibot.weight=0").startswith(
        "objective.dino.weight: nothing to learn"
    )


def test_what_is_off_is_not_checked() -> None:
    assert load(RunConfig, None, [*RUN, "crops.local_count=0", "crops.local_size=97"]).crops.local_size == 97
    assert load(RunConfig, None, [*RUN, "objective.koleo.weight=0", "train.batch_size=1"]).train.batch_size == 1
    assert load(RunConfig, None, [*RUN, "objective.ibot.weight=0", "masks.probability=0"]).masks.probability == 0
    later = load(RunConfig, None, [*RUN, "optim.warmup=10 epochs"])  # compared once the number of images is known
    assert later.optim.warmup == "10 epochs"


def numeric_leaves() -> list[tuple[str, str]]:
    """Every number of the schema, with a value that none of them may have."""
    found = []
    for key in leaf_keys(RunConfig):
        value = reduce(getattr, key.split("."), RunConfig())
        if isinstance(value, bool) or (isinstance(value, str) and key.rpartition(".")[2] != "warmup"):
            continue
        if isinstance(value, tuple):
            found.append((key, f"[{', '.join(['-7'] * len(value))}]"))
        elif isinstance(value, int | float) or (value is None and key.startswith(("train.", "model."))):
            found.append((key, "-7"))
    return [(key, value) for key, value in found if key not in ("model.init_from", "train.go_on_from")]


@pytest.mark.parametrize(("key", "value"), numeric_leaves(), ids=str)
def test_no_number_may_be_minus_seven(key: str, value: str) -> None:
    length = [] if key not in ("train.epochs", "train.images") else ["train.steps=null"]
    with pytest.raises(ConfigError) as caught:
        load(RunConfig, None, [*RUN, *length, f"{key}={value}"])
    assert "\n" not in str(caught.value) and key in str(caught.value)


@pytest.mark.parametrize(("world", "accumulate", "nearest"), [(3, 1, 63), (8, 3, 72), (100, 1, 100)])
def test_world_must_divide_the_batch(world: int, accumulate: int, nearest: int) -> None:
    config = RunConfig()
    config.train = dataclasses.replace(config.train, batch_size=64, accumulate=accumulate)
    with pytest.raises(ConfigError, match=rf"^train.batch_size: 64 images .*the nearest batch is {nearest}$"):
        check_world(config, world)
    for good in (1, 2, 8, 64):
        check_world(dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=1)), good)
