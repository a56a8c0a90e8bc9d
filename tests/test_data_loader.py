"""Batches: pure functions of (seed, sample number), whoever makes them; bad samples; dying workers; real data."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinoreg.config import ConfigError
from dinoreg.data.batch import Batch
from dinoreg.data.crops import CropConfig
from dinoreg.data.images import DataError
from dinoreg.data.loader import (
    BatchLoader,
    DataConfig,
    TooManyBadSamples,
    build_loader,
    choose_workers,
    prefetch_to_device,
)
from dinoreg.data.masks import MaskConfig
from dinoreg.data.photometric import PhotometricConfig, develop
from dinoreg.data.sources import open_sources

CROPS = CropConfig(global_size=16, local_size=8, local_count=2)
FIELDS = ("global_crops", "local_crops", "photometric", "masks", "positions")


def picture(number: int) -> bytes:
    out = io.BytesIO()
    rng = np.random.default_rng(number)
    Image.fromarray(rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for number in range(50):
        (root / f"{number:02d}.png").write_bytes(picture(number))
    return root


def load(path: Path | str, *, steps: int = 4, crops: CropConfig = CROPS, **changes) -> BatchLoader:
    options = {"workers": 0, "max_bad_share": 0.05}
    options |= {name: changes.pop(name) for name in list(changes) if name in DataConfig.__dataclass_fields__}
    cfg = DataConfig(sources=[str(path)], **options)
    settings = {"batch_size": 12, "seed": 0, "rank": 0, "world": 1, "start_step": 0, "channels": 3} | changes
    sources = open_sources(cfg)
    return build_loader(sources, cfg, crops, PhotometricConfig(), MaskConfig(), grid=(4, 4), steps=steps, **settings)


def joined(batches: list[Batch]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([getattr(batch, name) for batch in batches]) for name in FIELDS}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    for name in FIELDS:
        assert torch.equal(left[name], right[name]), name


def test_shapes(folder) -> None:
    batch = next(iter(load(folder)))
    assert batch.global_crops.shape == (12, 2, 3, 16, 16) and batch.global_crops.dtype == torch.uint8
    assert batch.local_crops.shape == (12, 2, 3, 8, 8) and batch.masks.shape == (12, 2, 16)
    assert batch.positions.tolist() == list(range(12)) and batch.bad == []
    none = next(iter(load(folder, crops=CropConfig(global_size=16, local_count=0))))
    assert none.local_crops.shape[:2] == (12, 0)
    assert develop(none, PhotometricConfig()).local_crops.shape[:2] == (12, 0)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(folder, workers) -> None:
    alone = joined(list(load(folder, steps=7)))
    assert_same(joined(list(load(folder, steps=7, workers=workers))), alone)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_batch_that_one_would_have(folder, world) -> None:
    alone = list(load(folder))
    shares = [list(load(folder, rank=rank, world=world)) for rank in range(world)]
    for step, batch in enumerate(alone):
        assert_same(joined([share[step] for share in shares]), joined([batch]))


def test_resuming_goes_on_where_the_run_stopped(folder) -> None:
    whole = list(load(folder, steps=9))
    rest = load(folder, start_step=5, steps=9)
    assert len(rest) == 4
    assert_same(joined(list(rest)), joined(whole[5:]))
    # With two ranks from step 5 on, and workers: still the same.
    elastic = [list(load(folder, start_step=5, steps=9, rank=rank, world=2, workers=1)) for rank in range(2)]
    for step in range(4):
        assert_same(joined([share[step] for share in elastic]), joined([whole[5 + step]]))


def test_seeds_and_samples_differ(folder) -> None:
    one, other = joined(list(load(folder))), joined(list(load(folder, seed=1)))
    assert not torch.equal(one["global_crops"], other["global_crops"])
    assert not torch.equal(one["photometric"], other["photometric"])
    assert len(one["photometric"].flatten(1).unique(dim=0)) == 48


def test_split() -> None:
    batch = Batch(
        *(torch.arange(6).view(6, *[1] * n) for n in (4, 4, 2, 2)),
        torch.arange(6),
        bad=["something"],  # type: ignore[list-item]
    )
    parts = batch.split(3)
    assert [part.positions.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert [len(part.bad) for part in parts] == [1, 0, 0]
    assert_same(joined(parts), joined([batch]))
    with pytest.raises(ValueError, match="6 images cannot be split into 4"):
        batch.split(4)


def test_bad_samples_are_replaced_and_named(folder, tmp_path) -> None:
    root = tmp_path / "mixed"
    shutil.copytree(folder, root)
    (root / "10.png").write_bytes(b"")
    (root / "20.png").write_bytes(b"no image")
    (root / "30.png").write_bytes(picture(30)[:400])
    loader = load(root, steps=8, max_bad_share=0.5)
    batches = list(loader)
    bad = {(sample.key, sample.reason) for batch in batches for sample in batch.bad}
    assert bad == {("10.png", "empty"), ("20.png", "not-an-image"), ("30.png", "truncated")}
    assert {sample.source for batch in batches for sample in batch.bad} == {str(root)}
    assert loader.tried == 96 + loader.bad.total() and set(loader.bad) == {"empty", "not-an-image", "truncated"}
    # The replacement does not depend on who makes the batch either; the other samples are what they were.
    again = [list(load(root, steps=8, rank=rank, world=2, max_bad_share=0.5)) for rank in range(2)]
    for step, batch in enumerate(batches):
        assert_same(joined([share[step] for share in again]), joined([batch]))
    clean = joined(list(load(folder, steps=8)))
    same = (clean["global_crops"] == joined(batches)["global_crops"]).flatten(1).all(1)
    assert 96 - loader.bad.total() <= same.sum() < 96


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_stop_the_run(tmp_path, workers) -> None:
    for number in range(300):
        (tmp_path / f"{number:03d}.png").write_bytes(picture(number) if number % 5 else b"<html>not found</html>")
    loader = load(tmp_path, steps=100, workers=workers)
    with pytest.raises(TooManyBadSamples) as caught:
        for _ in loader:
            assert loader.tried < 200
    message = str(caught.value)
    assert "data.max_bad_share=0.05" in message and "'not-an-image'" in message and "\n" not in message
    assert str(tmp_path) in message and ".png" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_samples(tmp_path, workers) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"")
    with pytest.raises(
        TooManyBadSamples, match=r"100 samples in a row are unusable; the last: empty: .*png in"
    ) as caught:
        next(iter(load(tmp_path, workers=workers)))
    assert "\n" not in str(caught.value)


def test_a_small_set_is_judged_after_one_pass(tmp_path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(picture(number) if number < 7 else b"")
    with pytest.raises(TooManyBadSamples, match=r"of 1[0-9] samples"):
        list(load(tmp_path, batch_size=4))


def kill_a_worker(loader: BatchLoader, how: signal.Signals = signal.SIGKILL) -> None:
    assert loader._feed is not None
    os.kill(loader._feed.workers[0].pid or 0, how)


def test_workers_that_are_killed_are_started_again_and_nothing_changes(folder, caplog) -> None:
    alone = list(load(folder, steps=24))
    loader = load(folder, steps=24, workers=2)
    batches = []
    for step, batch in enumerate(loader):
        batches.append(batch)
        if step in (0, 7, 15):
            kill_a_worker(loader, signal.SIGBUS if step == 7 else signal.SIGKILL)
    assert_same(joined(batches), joined(alone))
    assert [batch.keys for batch in batches] == [batch.keys for batch in alone]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert (
        "was killed by SIGKILL" in caplog.text
        and "was killed by SIGBUS" in caplog.text
        and "(3 of at most 3 times)" in caplog.text
    )


def test_workers_that_die_again_and_again_end_the_run(folder) -> None:
    loader = load(folder, steps=10_000, workers=1, prefetch=1)
    with pytest.raises(DataError, match="a data worker died again after 3 new starts") as caught:
        for _ in loader:
            kill_a_worker(loader)
    assert "data.workers" in str(caught.value) and "SIGKILL" in str(caught.value) and "\n" not in str(caught.value)


def test_starting_workers_leaves_the_random_numbers_of_the_run_alone(folder) -> None:
    before = torch.get_rng_state()
    assert len(list(load(folder, steps=2, workers=1))) == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_every_row_has_its_key(folder, tmp_path) -> None:
    root = tmp_path / "mixed"
    shutil.copytree(folder, root)
    (root / "10.png").write_bytes(b"")
    loader = load(root, steps=5, max_bad_share=0.5)
    batches = list(loader)
    keys = [key for batch in batches for key in batch.keys]
    assert len(keys) == 60 and {shard for shard, _ in keys} == {str(root)}
    assert "10.png" not in {key for _, key in keys}
    first = [loader.maker.reader.entry(number).where() for number in range(50)]
    assert all(key == due or due[1] == "10.png" for key, due in zip(keys, first, strict=False))
    assert [part.keys for part in batches[0].split(3)] == [keys[0:4], keys[4:8], keys[8:12]]
    assert batches[0].to("cpu").keys == keys[:12]


def test_a_batch_that_the_ranks_cannot_share(folder) -> None:
    with pytest.raises(ConfigError) as caught:
        load(folder, world=5)
    assert caught.value.key == "train.batch_size"


def test_workers_are_chosen_from_the_cores_at_hand(monkeypatch) -> None:
    for cores, ranks, expected in ((1, 1, 0), (2, 1, 1), (2, 2, 0), (8, 2, 3), (64, 1, 16), (64, 8, 7)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert choose_workers(ranks) == expected


def test_prefetch_on_the_cpu_passes_everything_on(folder) -> None:
    plain, prefetched = list(load(folder)), list(prefetch_to_device(load(folder), "cpu"))
    assert_same(joined(prefetched), joined(plain))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_prefetch_on_a_gpu(folder) -> None:
    cfg = PhotometricConfig()
    plain = list(load(folder, steps=20))
    for batch, expected in zip(prefetch_to_device(load(folder, steps=20, workers=1), "cuda"), plain, strict=True):
        assert batch.global_crops.is_cuda and torch.equal(batch.global_crops.cpu(), expected.global_crops)
        torch.cuda.set_sync_debug_mode("error")
        try:
            crops = develop(batch, cfg)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        on_cpu = develop(expected, cfg)
        torch.testing.assert_close(crops.global_crops.cpu(), on_cpu.global_crops, rtol=1e-4, atol=1e-4)
        assert torch.equal(crops.masked_index.cpu(), on_cpu.masked_index)


def test_five_channels_of_sixteen_bits(tmp_path) -> None:
    for number in range(6):
        values = np.random.default_rng(number).integers(0, 65536, (5, 20, 33), dtype=np.uint16)
        np.save(tmp_path / f"{number}.npy", values)
    batch = next(iter(load(tmp_path, channels=5)))
    assert batch.global_crops.shape == (12, 2, 5, 16, 16)
    cfg = PhotometricConfig(mean=[0.5] * 5, std=[0.3] * 5)
    assert develop(batch, cfg).global_crops.isfinite().all()


def test_real_images_once_a_pass(shared_data) -> None:
    loader = load(shared_data / "pretrain_imagenet1k_1perclass", batch_size=125, steps=8)
    batches = list(loader)
    assert loader.maker.sources.num_samples == 1000 and not loader.bad
    keys = {loader.maker.reader.entry(g).where()[1] for g in range(1000)}
    assert len(keys) == 1000
    spread = torch.cat([batch.global_crops.float().flatten(1).std(1) for batch in batches])
    assert (spread > 1).all()


def test_cifar10_shards(shared_data, tmp_path) -> None:
    for index in (0, 1):
        packed = shared_data / "cifar10_shards" / f"train-00{index}.tar.gz"
        (tmp_path / f"train-00{index}.tar").write_bytes(gzip.decompress(packed.read_bytes()))
    loader = load(tmp_path / "train-{000..001}.tar", batch_size=64, steps=5)
    assert loader.maker.sources.num_samples == 20_000
    assert all(not batch.bad for batch in loader)
    with tarfile.open(tmp_path / "train-001.tar") as tar:
        names = {member.name for member in tar if member.name.endswith(".jpg")}
    entries = [loader.maker.reader.entry(g).where() for g in range(2000)]
    assert len(set(entries)) == 2000
    assert {key for shard, key in entries if shard.endswith("001.tar")} <= names


def test_cifar10_streamed(shared_data) -> None:
    loader = load(shared_data / "cifar10_shards" / "test-000.tar.gz", batch_size=32, steps=3, stream_buffer=50)
    assert loader.maker.sources.num_samples is None
    assert sum(len(batch) for batch in loader) == 96 and not loader.bad
