"""Many classifiers at once learn as each would alone; the best is found; a killed training goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluating import Counting, Planted, run_suite, surroundings, write_classes, write_data, write_weights
from PIL import Image

from dinoreg.config import ConfigError, load
from dinoreg.data.counter import Purpose, generator
from dinoreg.data.crops import CropConfig, draw_boxes
from dinoreg.parallel.mesh import Ranks
from eval.augment import Augmented, Order, numbers_of
from eval.features import Features
from eval.forward import PATCH_MEAN, cls_of
from eval.heads import FeatureSet, Heads
from eval.images import Images, Part, hold_out
from eval.probe import Probe, all_alike
from eval.results import Result
from eval.suites.linear import LinearConfig
from eval.training import FromFeatures, Schedule, _resume, train

QUICK = ("steps=60", "batch_size=32", "rates=[0.001, 0.1]")
KILLED = ("steps=12", "batch_size=16", "augment=true", "save_every=5", "precision=fp32", "layers=[1]")


def test_the_published_protocol_is_the_default() -> None:
    cfg = load(LinearConfig, None)
    expected = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1]
    np.testing.assert_allclose(cfg.rates, expected)
    assert (cfg.steps, cfg.batch_size, cfg.layers, cfg.avgpool) == (12500, 1024, [1, 4], [False, True])


def test_each_classifier_learns_as_it_would_alone() -> None:
    sets = {FeatureSet(1, False): 8, FeatureSet(2, True): 24}
    rates, steps, batch = [0.01, 0.5], 20, 16
    heads = Heads(sets, rates, 5, torch.device("cpu"), seed=3)
    alone = {}
    for which, dim in sets.items():
        for row, rate in enumerate(rates):
            linear = torch.nn.Linear(dim, 5)
            linear.weight.data.copy_(heads.weights[which][row])
            linear.bias.data.zero_()
            optimizer = torch.optim.SGD(linear.parameters(), rate, momentum=0.9, weight_decay=0)
            alone[which, row] = linear, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    schedule = Schedule(steps, batch, 0, 10)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        values = torch.randn(3, batch, 8, generator=generator)
        features = {cls_of(1): values[0], cls_of(2): values[1], PATCH_MEAN: values[2]}
        labels = torch.randint(5, (batch,), generator=generator)
        heads.step(features, labels, schedule.factor(step), batch, Ranks.alone())
        for (which, _), (linear, optimizer, scheduler) in alone.items():
            inputs = values[0] if which.layers == 1 else torch.cat([values[1], values[0], values[2]], 1)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(linear(inputs), labels).backward()
            optimizer.step()
            scheduler.step()
    for (which, row), (linear, _, _) in alone.items():
        torch.testing.assert_close(heads.weights[which][row], linear.weight.data, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(heads.biases[which][row], linear.bias.data, rtol=1e-4, atol=1e-6)


def test_images_that_do_not_count_teach_nothing() -> None:
    which = FeatureSet(1, False)
    one, other = (Heads({which: 4}, [0.1], 3, torch.device("cpu")) for _ in range(2))
    features, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, -1, -1])
    one.step({cls_of(1): features}, labels, 1.0, 6, Ranks.alone())
    other.step({cls_of(1): features[:4]}, labels[:4], 1.0, 6, Ranks.alone())
    torch.testing.assert_close(one.weights[which], other.weights[which])


@pytest.mark.parametrize(
    ("where", "layers", "avgpool"),
    [("cls-1", {1, 4}, {False, True}), ("cls-3", {4}, {False, True}), ("patches", {1, 4}, {True})],
)
def test_a_known_answer_is_found_where_it_is(tmp_path: Path, where: str, layers: set[int], avgpool: set[bool]) -> None:
    """The network shows colours at one place alone, and a quarter of the test images have a wrong one."""
    data, weights = write_data(tmp_path / "data", 30, 20, wrong=5), write_weights(tmp_path / "small.safetensors")
    result = run_suite("imagenet-linear", Planted(weights, where), surroundings(tmp_path, data), *QUICK)
    assert result.scores["top1"].value == 75
    chosen = result.details["chosen"]
    assert chosen["layers"] in layers
    assert chosen["avgpool"] in avgpool
    for trial in result.details["grid"]:
        if trial["layers"] not in layers or trial["avgpool"] not in avgpool:
            assert trial["chosen_by"] < 70


def test_with_select_val_all_training_images_are_trained_on_and_it_is_said(tmp_path: Path) -> None:
    data, weights = write_data(tmp_path / "data", 10, 5), write_weights(tmp_path / "small.safetensors")
    backbone = Planted(weights, "cls-1")
    result = run_suite("imagenet-linear", backbone, surroundings(tmp_path, data), *QUICK, "select=val")
    assert "chosen on the test images, as published" in result.notes[0]
    assert all(trial["chosen_by"] == trial["test"] for trial in result.details["grid"])


def test_more_layers_than_the_network_has_are_left_out(tmp_path: Path) -> None:
    data, weights = write_data(tmp_path / "data", 10, 5), write_weights(tmp_path / "small.safetensors")
    backbone, context = Planted(weights, "cls-1"), surroundings(tmp_path, data)
    result = run_suite("imagenet-linear", backbone, context, *QUICK, "layers=[1,9]")
    assert "layers=[9] left out: the network has 4 blocks" in result.notes
    with pytest.raises(ConfigError, match="layers: the network has only 4 blocks"):
        run_suite("imagenet-linear", backbone, context, *QUICK, "layers=[9]")


def test_crops_depend_on_the_number_alone_and_every_pass_sees_every_image(tmp_path: Path) -> None:
    write_classes(tmp_path / "images", 3)
    images = Images(tmp_path / "images")
    part = Part(images, np.arange(12))
    crops, again = Augmented(part, 24, seed=5), Augmented(part, 24, seed=5)
    assert all(torch.equal(crops[number][0], again[number][0]) for number in (0, 7, 30))
    assert not torch.equal(crops[0][0], Augmented(part, 24, seed=6)[0][0])
    order = Order(12, seed=5)
    passes = [[order.place(12 * turn + i) for i in range(12)] for turn in range(3)]
    assert all(sorted(each) == list(range(12)) for each in passes)
    assert passes[0] != passes[1]
    pixels, label, place = crops[4]
    assert pixels.shape == (3, 24, 24)
    assert label == images.labels[place]


def test_ranks_share_each_batch() -> None:
    ranks = [Ranks(rank, 2, rank, 2, torch.device("cpu")) for rank in range(2)]
    first, second = (numbers_of(3, 5, 8, each) for each in ranks)
    assert [list(one) + list(other) for one, other in zip(first, second, strict=True)] == [
        list(range(24, 32)), list(range(32, 40))
    ]  # fmt: skip


def train_killed(folder: Path, data: Path, weights: Path) -> None:
    run_suite("imagenet-linear", Counting(weights, die_after=16 * 8), surroundings(folder, data), *KILLED)


def test_after_a_kill_training_goes_on_and_ends_as_without_it(tmp_path: Path) -> None:
    data, weights = write_data(tmp_path / "data", 10, 10), write_weights(tmp_path / "small.safetensors")
    process = multiprocessing.get_context("spawn").Process(target=train_killed, args=(tmp_path / "a", data, weights))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "a" / "cache").glob("linear-*.pt"))) == 1

    def go_on(folder: str) -> tuple[Result, int]:
        backbone = Counting(weights)
        return run_suite("imagenet-linear", backbone, surroundings(tmp_path / folder, data), *KILLED), backbone.images

    (resumed, passed), (whole, all_of_it) = go_on("a"), go_on("b")
    assert all_of_it - passed == 5 * 16  # eight steps were made, five of them saved
    assert (resumed.scores, resumed.details) == (whole.scores, whole.details)
    assert not list((tmp_path / "a" / "cache").glob("linear-*.pt"))


def test_images_that_cannot_be_read_are_left_out_of_training_and_named(tmp_path: Path) -> None:
    data, weights = write_data(tmp_path / "data", 25, 5), write_weights(tmp_path / "small.safetensors")
    for number in range(2):
        (data / "train" / "class2" / f"{number:03d}.png").write_bytes(b"")
    words = ("steps=8", "batch_size=32", "augment=true", "layers=[1]", "max_bad_share=0.2")
    result = run_suite("imagenet-linear", Counting(weights), surroundings(tmp_path, data), *words)
    assert set(result.data["bad"].values()) == {"empty"}
    assert "2 images could not be read and were left out" in result.notes
    with pytest.raises(ConfigError, match=r"cannot be read, more than max_bad_share=0.001"):
        words = (*words[:-1], "max_bad_share=0.001")
        run_suite("imagenet-linear", Counting(weights), surroundings(tmp_path, data), *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["steps=0"], "steps: must be at least 1"),
        (["rates=[]"], "rates: at least one value"),
        (["rates=[0.1,0.1]"], "rates: at least one value, and none twice"),
        (["rates=[-1]"], "rates: must be positive"),
        (["layers=[0]"], "layers: must be positive"),
        (["heldout=1"], "heldout: must be a share"),
        (["select=test"], "select"),
    ],
)
def test_options_that_make_no_sense_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(LinearConfig, None, words)


def test_classifiers_that_diverged_are_never_chosen_and_are_said(tmp_path: Path) -> None:
    data, weights = write_data(tmp_path / "data", 10, 4), write_weights(tmp_path / "small.safetensors")
    backbone, context = Planted(weights, "cls-1"), surroundings(tmp_path, data)
    words = ("steps=5", "batch_size=1024", "layers=[1]", "avgpool=[false]")
    result = run_suite("imagenet-linear", backbone, context, *words, "rates=[1e38, 0.1]")
    assert result.details["chosen"]["rate"] == 0.1
    assert "1 of 2 classifiers diverged, whose learning rates are too high for them" in result.notes
    with pytest.raises(ConfigError, match="rates: all classifiers diverged"):
        run_suite("imagenet-linear", backbone, context, *words, "rates=[1e38]")


def test_a_choice_among_equals_is_called_none() -> None:
    assert all_alike([50.0, 50.0, 50.0]) == ["all 3 are as good on these (50 %): the choice means nothing"]
    assert all_alike([50.0, 50.0, 75.0]) == all_alike([50.0]) == []


def test_a_damaged_state_of_a_training_and_images_that_changed_under_it_are_noticed(tmp_path: Path) -> None:
    data, weights = write_data(tmp_path / "data", 4, 2), write_weights(tmp_path / "small.safetensors")
    context = surroundings(tmp_path, data)
    probe = Probe(Counting(weights), load(LinearConfig, None), context)
    identity = probe.identity("imagenet-linear")
    os.utime(data / "train" / "class0" / "000.png", (1, 1))
    assert Probe(Counting(weights), load(LinearConfig, None), context).identity("imagenet-linear") != identity
    context.cache.mkdir()
    (context.cache / "damaged.pt").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"damaged.pt is damaged: remove it"):
        _resume(None, context.cache / "damaged.pt", context)  # type: ignore[arg-type]


def test_training_crops_are_pillows_of_the_drawn_boxes(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", 6, 1)
    images = Images(data / "train")
    augmented, crop = Augmented(Part(images, np.arange(len(images))), 16, 5), CropConfig(16, (0.08, 1.0), 0)
    flips = 0
    for number in range(24):
        pixels, label, place = augmented[number]
        drawn = draw_boxes(crop, generator(5, Purpose.CROP, number), 32, 32)
        left, top, width, height = drawn.boxes[0].tolist()
        with Image.open(images.name(place)) as image:
            cut = image.crop((left, top, left + width, top + height)).resize((16, 16), Image.Resampling.BICUBIC)
        expected = np.asarray(cut)[:, ::-1] if drawn.flips[0] else np.asarray(cut)
        flips += bool(drawn.flips[0])
        difference = np.abs(expected.transpose(2, 0, 1).astype(int) - pixels.numpy().astype(int))
        assert difference.mean() < 0.5  # of noise: 20 where anything is in another place; the kernels clip differently
        assert f"class{label}" in images.name(place)
    assert 4 < flips < 20


def test_labels_of_images_held_out_teach_nothing(tmp_path: Path) -> None:
    """Were they seen in training, the best would be chosen by what it knows."""
    stored = Features({cls_of(1): np.random.default_rng(0).random((40, 8)).astype(np.float16)}, np.ones(40, bool), 0)
    held, kept = hold_out(40, 0.25, 0)
    labels, context = torch.arange(40) % 4, surroundings(tmp_path, write_data(tmp_path / "data", 1, 1))
    trained = []
    for change in (0, 1):
        other = labels.clone()
        other[torch.from_numpy(held)] = (other[torch.from_numpy(held)] + change) % 4
        heads, schedule = Heads({FeatureSet(1, False): 8}, [0.1], 4, torch.device("cpu")), Schedule(20, 8, 0, 100)
        train(heads, FromFeatures(stored, other, kept, schedule, context), schedule, context, str(change))
        trained.append(heads.state())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
