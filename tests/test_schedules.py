"""Schedules against arrays written out in float64 numpy, and lengths against their definitions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from dinoreg.config import ConfigError
from dinoreg.train.recipe import RunConfig
from dinoreg.train.schedules import Schedules, parse_duration, peak_lr, to_steps, total_steps


def array(peak: float, end: float, total: int, warmup: int = 0, start: float = 0.0) -> np.ndarray:
    """The whole schedule at once: inclusive line, then cosine; facts of DINOv2's utils."""
    line = np.linspace(start, peak, warmup, dtype=np.float64)
    i = np.arange(total - warmup, dtype=np.float64)
    return np.concatenate([line, end + 0.5 * (peak - end) * (1 + np.cos(np.pi * i / len(i)))])


def run(**train: float) -> RunConfig:
    config = RunConfig()
    config.train.batch_size = int(train.pop("batch_size", 64))
    for key, value in train.items():
        setattr(config.train, key, value)
    return config


@pytest.mark.parametrize(("steps", "warmup", "frozen", "heat"), [(1000, 100, 10, 300), (50, 1, 0, 50), (7, 7, 7, 0)])
def test_every_value_at_every_step(steps: int, warmup: int, frozen: int, heat: int) -> None:
    config = run(steps=steps, batch_size=256)
    config.optim.warmup = f"{warmup} steps"
    config.optim.freeze_last_layer = f"{frozen} steps"
    config.objective.targets.temperature_warmup = f"{heat} steps"
    schedules = Schedules(config, num_samples=None)
    values = [schedules.at(step) for step in range(steps)]

    lr = array(4e-3 * math.sqrt(256 / 1024), 1e-6, steps, warmup)
    last = np.where(np.arange(steps) < frozen, 0, lr)
    temperature = np.concatenate([np.linspace(0.04, 0.07, heat), np.full(steps - heat, 0.07)])
    for name, expected in (
        ("lr", lr),
        ("last_layer_lr", last),
        ("weight_decay", array(0.04, 0.4, steps)),
        ("teacher_momentum", array(0.994, 1.0, steps)),
        ("teacher_temperature", temperature),
    ):
        np.testing.assert_allclose([getattr(v, name) for v in values], expected, rtol=1e-12, atol=1e-15, err_msg=name)


def test_after_the_end_values_stay_at_their_ends() -> None:
    schedules = Schedules(run(steps=10), None)
    for step in (10, 11, 10_000):
        values = schedules.at(step)
        assert (values.lr, values.weight_decay, values.teacher_momentum) == (1e-6, 0.4, 1.0)
        assert values.teacher_temperature == 0.07


def test_vitl16_short_as_published() -> None:
    """125,000 steps of 2048 with lr 4e-3 at 1024 by the square root: 5.66e-3 at the peak."""
    config = run(steps=125_000, batch_size=2048)
    config.optim.warmup, config.objective.targets.temperature_warmup = "12500 steps", "37500 steps"
    schedules = Schedules(config, None)
    assert schedules.at(12_499).lr == pytest.approx(5.657e-3, rel=1e-4)
    assert schedules.at(0).lr == 0 and schedules.at(37_499).teacher_temperature == pytest.approx(0.07)
    assert schedules.at(0).teacher_temperature == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("scaling", "peak"), [("sqrt", 1e-3 * math.sqrt(0.25)), ("linear", 1e-3 * 0.25), ("none", 1e-3)]
)
def test_lr_scaling(scaling: str, peak: float) -> None:
    config = run()
    config.optim.lr, config.optim.lr_scaling = 1e-3, scaling  # type: ignore[assignment]
    assert peak_lr(config.optim, 256) == pytest.approx(peak, rel=1e-12)


# -- lengths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "parsed"),
    [
        ("10 epochs", (10.0, "epoch")),
        ("1 epoch", (1.0, "epoch")),
        ("0.5epochs", (0.5, "epoch")),
        ("5000 steps", (5000.0, "step")),
        (" 1e6  images ", (1e6, "image")),
        (0.1, (0.1, "run")),
        (0, (0.0, "run")),
        (1, (1.0, "run")),
    ],
)
def test_parse(written: int | float | str, parsed: tuple[float, str]) -> None:
    assert parse_duration(written) == parsed


@pytest.mark.parametrize(
    "written", [5, 1.5, -0.1, "10", "ten epochs", "10 hours", "-1 steps", "nan steps", "inf images", ""]
)
def test_unreadable_lengths(written: int | float | str) -> None:
    with pytest.raises(ConfigError, match="fraction of the run"):
        parse_duration(written)


@pytest.mark.parametrize(("samples", "batch", "total"), [(1000, 64, 160), (1_281_167, 1024, 125_000), (30, 64, 10)])
def test_steps_of_each_unit(samples: int, batch: int, total: int) -> None:
    def steps(duration: int | float | str) -> int:
        return to_steps(duration, total=total, batch_size=batch, num_samples=samples)

    assert steps("17 steps") == 17
    assert steps("10 epochs") == math.ceil(Fraction(10 * samples, batch))
    assert steps("1e5 images") == math.ceil(Fraction(100_000, batch))
    for tenth in range(11):
        assert steps(tenth / 10) == math.ceil(Fraction(tenth, 10) * total)


def test_a_pass_sees_every_image() -> None:
    for samples in (1, 63, 64, 65, 50_000):
        steps = total_steps(run(epochs=1).train, samples)
        assert (steps - 1) * 64 < samples <= steps * 64
    assert total_steps(run(epochs=0.001).train, 10) == 1
    assert total_steps(run(images=1e6).train, None) == 15_625


def test_the_machine_is_in_no_formula() -> None:
    """More parts, other sharding: nothing moves. The batch is global, so neither do more GPUs."""
    one, other = run(epochs=3), run(epochs=3)
    other.train.accumulate, other.efficiency.shard, other.data.workers = 8, "none", 3
    a, b = Schedules(one, 10_000), Schedules(other, 10_000)
    assert a.total_steps == b.total_steps and a.describe() == b.describe()
    assert all(a.at(step) == b.at(step) for step in range(a.total_steps))


def test_epochs_of_a_stream() -> None:
    with pytest.raises(ConfigError, match=r"^train.epochs: epochs need sources of known length"):
        Schedules(run(epochs=3), None)
    config = run(steps=100)
    config.optim.warmup = "1 epoch"
    with pytest.raises(ConfigError, match=r"^optim.warmup: epochs need sources"):
        Schedules(config, None)


@pytest.mark.parametrize("key", ["optim.warmup", "optim.freeze_last_layer", "objective.targets.temperature_warmup"])
def test_parts_longer_than_the_run(key: str) -> None:
    config = run(steps=100)
    *path, name = key.split(".")
    part: object = config
    for word in path:
        part = getattr(part, word)
    setattr(part, name, "101 steps")
    with pytest.raises(ConfigError, match=rf"^{key}: '101 steps' is 101 steps, longer than the run's 100$"):
        Schedules(config, None)
    setattr(part, name, "100 steps")
    Schedules(config, None)


def test_description_says_each_length_as_written_and_in_steps() -> None:
    config = run(epochs=10, batch_size=256)
    config.optim.warmup = "1 epoch"
    text = Schedules(config, 50_000).describe()
    assert "1,954 steps x 256 images = 500,224 images = 10 epochs of 50,000" in text
    assert "0 to 0.002 (0.004 at batch 1024) in 196 steps (1 epoch), then cosine to 1e-06" in text
    assert "0.04 to 0.07 in 587 steps (0.3 of the run)" in text
    assert "0.04 to 0.4, cosine" in text and "0.994 to 1, cosine" in text
