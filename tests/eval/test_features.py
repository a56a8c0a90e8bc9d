"""Features are computed once, survive kills, are the same by any number of processes, and are never stale."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluating import Counting, surroundings, write_classes, write_data, write_weights
from PIL import Image
from rich.console import Console
from torch.utils.data import Dataset

import eval.features
from dinoreg.config import ConfigError
from dinoreg.data.images import BadImage, DataError
from eval.compute import Fitting, load
from eval.features import Features, extract
from eval.forward import PATCH_MEAN, cls_of
from eval.images import Images, Part, View

NAMES = [cls_of(1), cls_of(3), PATCH_MEAN]
VIEW = View(32, 37)


def features(folder: Path, data: Path, backbone: Counting, **options: object) -> Features:
    images = Images(data)
    part = Part(images, np.arange(len(images)))
    chosen: dict[str, object] = {"view": VIEW, "names": NAMES, "batch": 16, "precision": "fp32", **options}
    return extract(backbone, part, context=surroundings(folder, data), **chosen)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "images"
    write_classes(folder, 20)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "small.safetensors")


def test_features_are_those_of_the_network_image_by_image(tmp_path: Path, data: Path, weights: Path) -> None:
    backbone = Counting(weights)
    found = features(tmp_path, data, backbone)
    images = Images(data)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in backbone.normalisation)
    for row in (0, 7, 79):
        image = (VIEW(images.read(row)) / 255 - mean) / std
        last, third = backbone.layers(image[None], [-1, -3])
        for name, expected in ((cls_of(1), last.cls), (cls_of(3), third.cls), (PATCH_MEAN, last.patches.mean(1))):
            np.testing.assert_allclose(found.arrays[name][row], expected[0], rtol=2e-3, atol=2e-3)


def test_what_is_stored_is_not_computed_again(tmp_path: Path, data: Path, weights: Path) -> None:
    backbone = Counting(weights)
    first = features(tmp_path, data, backbone)
    assert backbone.images == first.computed == 80
    again = features(tmp_path, data, backbone, names=[cls_of(1)])
    assert backbone.images == 80
    assert again.computed == 0
    np.testing.assert_array_equal(first.arrays[cls_of(1)], again.arrays[cls_of(1)])


def test_other_weights_images_or_views_are_computed_anew(tmp_path: Path, weights: Path) -> None:
    folder = tmp_path / "images"
    write_classes(folder, 5)
    before = features(tmp_path, folder, Counting(weights))

    other_weights = Counting(write_weights(tmp_path / "other.safetensors", seed=1))
    assert features(tmp_path, folder, other_weights).computed == 20
    assert features(tmp_path, folder, Counting(weights), view=View(32, 40)).computed == 20
    assert features(tmp_path, folder, Counting(weights), precision="bf16").computed == 20

    changed = folder / "class0" / "000.png"
    pixels = np.asarray(Image.open(changed))
    Image.fromarray(255 - pixels).save(changed)
    after = features(tmp_path, folder, Counting(weights))
    assert after.computed == 20
    assert not np.array_equal(before.arrays[cls_of(1)][0], after.arrays[cls_of(1)][0])
    np.testing.assert_array_equal(before.arrays[cls_of(1)][1:], after.arrays[cls_of(1)][1:])


def die(folder: Path, data: Path, weights: Path) -> None:
    eval.features.CHUNK = 16
    features(folder, data, Counting(weights, die_after=40))


def test_after_a_kill_whole_chunks_are_kept_and_the_rest_is_as_without_it(
    tmp_path: Path, data: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval.features, "CHUNK", 16)
    process = multiprocessing.get_context("spawn").Process(target=die, args=(tmp_path, data, weights))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL

    resumed = features(tmp_path, data, Counting(weights))
    assert resumed.computed == 80 - 2 * 16 - 16  # 48 images passed, and were written in chunks of 16
    whole = features(tmp_path / "uninterrupted", data, Counting(weights))
    for name in NAMES:
        np.testing.assert_array_equal(resumed.arrays[name], whole.arrays[name])


def test_a_process_that_sees_another_cache_says_so(tmp_path: Path, data: Path, weights: Path) -> None:
    store = eval.features.Store(tmp_path / "elsewhere", 80, 64, (cls_of(1),))
    with pytest.raises(ConfigError, match="is not seen by all processes"):
        store.check_here()


def test_a_damaged_image_is_left_out_and_too_many_are_an_error(tmp_path: Path, weights: Path) -> None:
    folder = tmp_path / "images"
    write_classes(folder, 5)
    (folder / "class1" / "002.png").write_bytes(b"no picture at all")
    found = features(tmp_path, folder, Counting(weights), max_bad_share=0.05)
    assert np.flatnonzero(~found.good).tolist() == [7]
    assert found.tensor([cls_of(1)]).shape == (19, 64)
    with pytest.raises(ConfigError, match=r"1 of 20 images cannot be read.*class1/002.png \(not-an-image\)"):
        features(tmp_path, folder, Counting(weights), max_bad_share=0.01)


def test_an_image_that_could_not_be_read_for_a_moment_is_tried_again(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images"
    write_classes(folder, 5)
    with monkeypatch.context() as patch:
        read = Images.read

        def fail(images: Images, index: int) -> torch.Tensor:
            if index == 3:
                raise BadImage("missing", "the network was away")
            return read(images, index)

        patch.setattr(Images, "read", fail)
        assert not features(tmp_path, folder, Counting(weights), max_bad_share=0.1).good[3]
        assert features(tmp_path, folder, Counting(weights), max_bad_share=0.1).computed == 0
    again = features(tmp_path, folder, Counting(weights))
    assert again.good.all()
    assert again.computed == 20


def test_a_full_disk_is_told_with_the_file() -> None:
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        eval.features._write_at(Path("/dev/full"), b"features", 0)


class Deadly(Dataset[int]):
    def __getitem__(self, place: int) -> int:
        return place if place < 1990 else os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[return-value]


def test_a_decoding_process_that_dies_is_told_in_one_line(tmp_path: Path) -> None:
    context = surroundings(tmp_path, write_data(tmp_path / "data", 1, 1))
    context.workers = 1
    with pytest.raises(DataError, match="a process that decodes images died"):
        list(load(Deadly(), [range(start, start + 500) for start in range(0, 2000, 500)], context, 8))


def test_features_that_are_not_finite_are_an_error_that_names_the_image(
    tmp_path: Path, data: Path, weights: Path
) -> None:
    backbone = Counting(weights)
    backbone.model.norm.bias.fill_(float("nan"))
    with pytest.raises(ConfigError, match=r"class0/000.png are not finite"):
        features(tmp_path, data, backbone)


def test_out_of_memory_halves_the_batch_and_is_said_once() -> None:
    said: list[str] = []
    sizes: list[int] = []

    def work(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * images

    fitting = Fitting(16, said.append)
    for _ in range(2):
        torch.testing.assert_close(torch.cat(fitting(work, torch.arange(16))), 2 * torch.arange(16))
    assert sizes == [16, 8, 4, *[2] * 16]
    assert said == ["out of memory with 16 images at once: going on with 8, or fewer"]

    def hopeless(images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    with pytest.raises(ConfigError, match="not even one image"):
        Fitting(4, said.append)(hopeless, torch.arange(4))


def test_the_view_is_what_pillow_makes_of_it() -> None:
    rng = np.random.default_rng(0)
    for height, width in ((50, 80), (90, 41), (64, 64)):
        smooth = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height))
        long = int(48 * max(height, width) / min(height, width))
        resized = smooth.resize((48, long) if height > width else (long, 48), Image.Resampling.BICUBIC)
        left, top = round((resized.width - 40) / 2), round((resized.height - 40) / 2)
        expected = np.asarray(resized.crop((left, top, left + 40, top + 40))).transpose(2, 0, 1)
        found = View(40, 48)(torch.from_numpy(np.array(smooth)).permute(2, 0, 1)).numpy()
        difference = np.abs(found.astype(int) - expected.astype(int))
        assert difference.max() <= 2  # where both clip at a sharp edge
        assert difference.mean() < 0.05


def test_progress_in_a_log_is_a_line_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.suite.LINE_EVERY", 0.0)
    context = surroundings(tmp_path, write_data(tmp_path / "data", 1, 1))
    context.console = Console(file=io.StringIO())
    with context.progress("features", 40, 20) as advance:
        advance(10)
    assert context.console.file.getvalue().startswith("features: 30 of 40, 0:00 left")  # type: ignore[attr-defined]
