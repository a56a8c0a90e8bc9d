"""Training and test images are found in every form, and what is wrong with them is said in one line."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluating import Planted, run_suite, surroundings, write_data, write_weights

from dinoreg.config import ConfigError
from dinoreg.models.vit import ModelConfig, build_vit
from eval.backbone import Backbone
from eval.images import Images, View, _demand_same_classes, draw_evenly, hold_out, open_parts
from eval.suite import Place


def write_shard(path: Path, folder: Path) -> None:
    """The images of class folders with their numbers, as webdataset wants them."""
    with tarfile.open(path, "w") as tar:
        for image in sorted(folder.glob("*/*.png")):
            key = f"{image.parent.name}_{image.stem}"
            for name, data in ((f"{key}.png", image.read_bytes()), (f"{key}.cls", image.parent.name[-1].encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_folders_named_parts_and_shards_are_the_same_images(tmp_path: Path) -> None:
    data, weights = write_data(tmp_path / "data", 6, 3), write_weights(tmp_path / "small.safetensors")
    (tmp_path / "shards").mkdir()
    for part, name in (("train", "train-000.tar"), ("val", "test-000.tar")):
        write_shard(tmp_path / "shards" / name, data / part)
    write_shard(tmp_path / "train-001.tar", data / "train")
    words = [
        [str(data)],
        [f"train={data / 'train'}", f"test={data / 'val'}"],
        [f"val={data / 'val'}", f"train={data / 'train'}"],
        [str(tmp_path / "shards")],
        [f"train={tmp_path}/train-{{001..001}}.tar", f"test={tmp_path}/shards/test-000.tar"],
    ]
    scores = []
    for number, each in enumerate(words):
        context = surroundings(tmp_path / str(number), data)
        context.data = Place.of(each)
        result = run_suite("knn", Planted(weights, "cls-1"), context, "k=[3]", "main_k=3")
        assert (result.data["train"], result.data["test"], result.data["classes"]) == (24, 12, 4)
        scores.append(result.scores["top1"].value)
    assert scores == [100.0] * len(words)


def test_several_shards_of_a_part_are_found(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", 2, 1)
    (tmp_path / "shards").mkdir()
    for name, part in (("train-0", "train"), ("train-1", "train"), ("val-0", "val")):
        write_shard(tmp_path / "shards" / f"{name}.tar", data / part)
    train, test = open_parts(Place(tmp_path / "shards"))
    assert (len(train), len(test)) == (16, 4)


def test_a_data_set_has_the_same_hash_wherever_it_lies_and_another_when_it_changes(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", 2, 1)
    shutil.copytree(data, tmp_path / "copy")
    first, second = Images(data / "train"), Images(tmp_path / "copy" / "train")
    assert first.digest == second.digest
    assert first.changed() == second.changed()  # copied with their times
    (tmp_path / "copy" / "train" / "class0" / "001.png").touch()
    assert first.changed() != second.changed()
    (tmp_path / "copy" / "train" / "class0" / "000.png").rename(tmp_path / "copy" / "train" / "class0" / "zzz.png")
    assert Images(tmp_path / "copy" / "train").digest != first.digest


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda data: shutil.rmtree(data / "val" / "class2"),
            "the class class2 of the training images has no image in",
        ),
        (lambda data: shutil.rmtree(data / "train" / "class1"), "class1, which the training images do not have"),
        (lambda data: shutil.rmtree(data / "val"), "holds no val or test folder or shards"),
        (
            lambda data: [shutil.rmtree(data / "val"), (data / "val-000.tar.gz").touch()],
            "val-000.tar.gz is compressed, .*: gunzip it",
        ),
        (lambda data: shutil.rmtree(data / "train"), "holds no train folder or shards"),
        (lambda data: [file.unlink() for file in (data / "train").glob("*/*")], "train holds no images"),
        (lambda data: shutil.copy(data / "val/class0/000.png", data / "val"), "lies in no class folder"),
    ],
)
def test_what_is_wrong_with_a_data_set_is_said(tmp_path: Path, spoil: object, message: str) -> None:
    data = write_data(tmp_path / "data", 2, 1)
    spoil(data)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message) as error:
        open_parts(Place(data))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/no/such/folder"], "--data: no such file or folder: /no/such/folder"),
        (["train=a", "/tmp"], "--data: give one folder, or parts"),
        (["/tmp", "/tmp"], "--data: give one folder, or parts"),
        ([], "--data: give one folder, or parts"),
    ],
)
def test_what_is_wrong_with_the_words_is_said(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Place.of(words)


def test_both_parts_are_asked_for() -> None:
    with pytest.raises(ConfigError, match="both parts are needed"):
        open_parts(Place.of(["train=somewhere"]))


def test_a_few_images_are_drawn_evenly_and_always_the_same() -> None:
    labels = torch.tensor([0] * 50 + [1] * 5 + [2] * 45)
    chosen = draw_evenly(labels, 20)
    assert np.array_equal(chosen, draw_evenly(labels, 20))
    assert np.array_equal(chosen, np.unique(chosen))
    counts = torch.bincount(labels[torch.from_numpy(chosen)]).tolist()
    assert counts[1] == 5  # all there are
    assert sorted(counts) == [5, 7, 8]
    assert np.array_equal(draw_evenly(labels, 0), np.arange(100))
    assert np.array_equal(draw_evenly(labels, 500), np.arange(100))


def test_what_is_held_out_is_not_kept() -> None:
    held, kept = hold_out(50, 0.1, seed=0)
    assert len(held) == 5
    assert sorted([*held, *kept]) == list(range(50))
    assert not np.array_equal(held, hold_out(50, 0.1, seed=1)[0])
    with pytest.raises(ConfigError, match="heldout"):
        hold_out(1, 0.1, seed=0)


def test_of_a_very_long_image_only_the_middle_is_resized() -> None:
    """One of 1 x 60000 pixels is 180 KB, and as many GB when its short side becomes 256."""
    view = View(8, 9)
    for shape in ((3, 1, 60000), (3, 60000, 2)):
        assert view(torch.randint(256, shape, dtype=torch.uint8)).shape == (3, 8, 8)
    long = torch.zeros(3, 4, 201, dtype=torch.uint8)
    long[:, :, 100] = 255  # in the middle, where it stays
    found = view(long).float()
    torch.testing.assert_close(found, found.flip(-1), rtol=0, atol=1)
    assert found[0, 4].max() > 50


@pytest.mark.parametrize("few", ["max_train=3", "max_test=3"])
def test_classes_that_are_lost_by_drawing_a_few_are_said(tmp_path: Path, few: str) -> None:
    data, weights = write_data(tmp_path / "data", 6, 3), write_weights(tmp_path / "small.safetensors")
    result = run_suite("knn", Planted(weights, "cls-1"), surroundings(tmp_path, data), "k=[1]", "main_k=1", few)
    kind = "training" if few == "max_train=3" else "test"
    assert f"1 of the 4 classes have no {kind} image among those that count" in result.notes


def test_a_class_of_which_no_test_image_can_be_read_is_said(tmp_path: Path) -> None:
    data, weights = write_data(tmp_path / "data", 6, 2), write_weights(tmp_path / "small.safetensors")
    for image in (data / "val" / "class1").iterdir():
        image.write_bytes(b"")
    words = ("k=[1]", "main_k=1", "max_bad_share=0.5")
    result = run_suite("knn", Planted(weights, "cls-1"), surroundings(tmp_path, data), *words)
    assert "1 of the 4 classes have no test image among those that count" in result.notes


def test_folders_and_shards_of_one_data_set_may_number_classes_differently_and_it_is_said(tmp_path: Path) -> None:
    data, weights = write_data(tmp_path / "data", 6, 2), write_weights(tmp_path / "small.safetensors")
    write_shard(tmp_path / "test.tar", data / "val")
    context = surroundings(tmp_path, data)
    context.data = Place.of([f"train={data / 'train'}", f"test={tmp_path / 'test.tar'}"])
    notes = run_suite("knn", Planted(weights, "cls-1"), context, "k=[1]", "main_k=1").notes
    assert any(note.startswith("one part is folders, the other shards") for note in notes)


def test_networks_of_other_channels_and_labels_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    data, config = write_data(tmp_path / "data", 1, 1), ModelConfig(embed_dim=64, depth=2, num_heads=2, in_channels=4)
    model = build_vit(config)
    model.init_weights()
    with pytest.raises(ConfigError, match="--weights: the network takes images of 4 channels"):
        run_suite("knn", Backbone(model), surroundings(tmp_path, data))
    images = Images(data / "train")
    images.labels = images.labels + 10**12
    with pytest.raises(ConfigError, match="is no number of a class"):
        _demand_same_classes(images, images)
