"""What a run keeps of its data: a cache that is shared, noticed when it is wrong, and never needed."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch.multiprocessing
from test_data_sources import numbers_of, write_folder, write_shards, write_tar

from dinoreg.config import ConfigError
from dinoreg.data import pool, tarindex
from dinoreg.data.order import EpochOrder
from dinoreg.data.sources import Collection, DataConfig, Sources, open_sources
from dinoreg.data.tables import Tables, load_tables, pack_names, save_tables, unpack_name


def opened(folder: Path, cache: Path | None = None, **options: object) -> Sources:
    return open_sources(DataConfig(sources=[str(folder)], **options), cache)


def cached(cache: Path) -> Path:
    return next(cache.iterdir())


@pytest.fixture
def no_scan(monkeypatch) -> None:
    """Nothing may look into a shard."""
    for name in ("scan", "load_index"):
        monkeypatch.setattr(tarindex, name, lambda *_: pytest.fail("looked into a shard in spite of the cache"))


@pytest.fixture
def shards(tmp_path) -> Path:
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", [4, 1, 7])
    return tmp_path / "shards"


def test_the_second_start_looks_into_no_shard(shards, tmp_path, monkeypatch, request) -> None:
    first = opened(shards, tmp_path / "cache")
    request.getfixturevalue("no_scan")
    again = opened(shards, tmp_path / "cache")
    assert numbers_of(again, 0, 24) == numbers_of(first, 0, 24)
    monkeypatch.undo()
    assert numbers_of(opened(shards), 0, 24) == numbers_of(first, 0, 24)


def change_size(path: Path) -> None:
    write_tar(path, {f"{n}.jpg": b"%d" % n for n in range(9)})


def change_time(path: Path) -> None:
    os.utime(path, (1, 1))


@pytest.mark.parametrize("change", [change_size, change_time])
def test_a_changed_shard_makes_the_cache_anew(shards, tmp_path, change) -> None:
    opened(shards, tmp_path / "cache")
    change(shards / "s-001.tar")
    again = opened(shards, tmp_path / "cache")
    assert again.num_samples == opened(shards).num_samples
    assert len(list((tmp_path / "cache").iterdir())) == 1  # written over, not beside


def test_another_list_of_shards_has_another_cache(shards, tmp_path) -> None:
    opened(shards, tmp_path / "cache")
    (shards / "s-000.tar").rename(shards / "s-003.tar")
    assert opened(shards, tmp_path / "cache").num_samples == 12
    assert sorted(numbers_of(opened(shards, tmp_path / "cache"), 0, 12)) == list(range(12))


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "head", "foreign", "json"])
def test_a_damaged_cache_is_made_anew(shards, tmp_path, damage) -> None:
    expected = numbers_of(opened(shards, tmp_path / "cache"), 0, 24)
    file = cached(tmp_path / "cache")
    content = bytearray(file.read_bytes())
    if damage == "cut":
        content = content[:-24]
    elif damage == "empty":
        content = bytearray()
    elif damage == "bit":
        content[-70] ^= 4
    elif damage == "head":
        content[:4096] = bytes(4096)
    elif damage == "json":
        content[16:40] = b'{"key": [[[[[[[[[[[[[[[['
    else:
        content = bytearray(os.urandom(9000))
    file.write_bytes(content)
    assert numbers_of(opened(shards, tmp_path / "cache"), 0, 24) == expected
    assert load_tables(file, "") is None and file.read_bytes() != content


def test_a_cache_that_cannot_be_written_only_costs_time(shards, tmp_path, caplog) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert numbers_of(opened(shards, tmp_path / "cache"), 0, 24) == numbers_of(opened(shards), 0, 24)
    assert "cannot be kept" in caplog.text and caplog.text.count("\n") == 1


def test_a_full_disk_only_costs_time(shards, tmp_path, caplog) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        write_tar(shards / "more.tar", {f"{n}.jpg": b"%d" % n for n in range(12, 1000)})
        assert sorted(numbers_of(opened(shards, disk / "cache"), 0, 1000)) == list(range(1000))
        assert "cannot be kept" in caplog.text and not list((disk / "cache").iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_broken_shard_is_named_with_a_cache_too(shards, tmp_path, caplog) -> None:
    os.truncate(shards / "s-001.tar", 400)
    with pytest.raises(ConfigError, match=r"s-001\.tar is cut off"):
        opened(shards, tmp_path / "cache")
    (shards / "s-001.tar").unlink()
    with pytest.raises(ConfigError, match=r"no such file or folder: .*s-001\.tar"):
        open_sources(DataConfig(sources=[str(shards / "s-{000..002}.tar")]), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [] and not caplog.text


def read_all(sources: list[Sources], found) -> None:
    found.put([numbers_of(each, 0, 72) for each in sources])


def test_workers_read_the_same_with_a_cache_and_without(shards, tmp_path) -> None:
    write_folder(shards / "photos", 60)
    cfg = DataConfig(sources=[str(shards / "*.tar"), str(shards / "photos")])
    sources = [open_sources(cfg), open_sources(cfg, tmp_path / "cache")]
    context = torch.multiprocessing.get_context("forkserver")
    found = context.Queue()
    process = context.Process(target=read_all, args=(sources, found))
    process.start()
    assert found.get(timeout=100) == [numbers_of(each, 0, 72) for each in sources]
    process.join()


def test_with_a_cache_sources_travel_as_its_path(shards, tmp_path) -> None:
    write_tar(shards / "large.tar", {f"{n}.jpg": b"%d" % n for n in range(12, 5000)})
    write_folder(tmp_path / "photos", 2000)
    cfg = DataConfig(sources=[str(shards), str(tmp_path / "photos")])
    alone, kept = pickle.dumps(open_sources(cfg)), pickle.dumps(open_sources(cfg, tmp_path / "cache"))
    assert len(alone) > 5000 * 24 and len(kept) < 3000
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(OSError, match="has gone or was written anew"):
        pickle.loads(kept)


def test_a_machine_with_other_files_under_the_names_is_told(shards, tmp_path) -> None:
    sent = pickle.dumps(opened(shards, tmp_path / "cache"))
    pickle.loads(sent).check_here()
    os.utime(shards / "s-002.tar", (5, 5))
    with pytest.raises(ConfigError, match=r"s-002\.tar on .* is not the file that the main process sees"):
        pickle.loads(sent).check_here()
    (shards / "s-000.tar").unlink()
    with pytest.raises(ConfigError, match="not to be read on"):
        pickle.loads(sent).check_here()


def test_a_fingerprint_says_whether_numbers_mean_the_same_images(shards, tmp_path) -> None:
    first = opened(shards).fingerprint()
    assert first == opened(shards, tmp_path / "cache").fingerprint() and len(first) == 16
    shutil.copytree(shards, tmp_path / "elsewhere" / "deep")  # with other times
    assert opened(tmp_path / "elsewhere" / "deep").fingerprint() == first
    assert opened(shards, shuffle_window=3).fingerprint() != first
    assert open_sources(DataConfig(sources=[str(shards / "s-{000,002,001}.tar")])).fingerprint() != first
    weighted = [{"path": str(shards), "weight": 1}, {"path": str(shards / "s-001.tar"), "weight": 1}]
    both = open_sources(DataConfig(sources=weighted)).fingerprint()
    weighted[1]["weight"] = 2
    assert first != both != open_sources(DataConfig(sources=weighted)).fingerprint()
    (shards / "s-002.tar").rename(shards / "s-003.tar")
    assert opened(shards).fingerprint() != first


def test_fingerprints_of_folders_and_streams(tmp_path) -> None:
    write_folder(tmp_path / "a", 30)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = opened(tmp_path / "a").fingerprint()
    assert opened(tmp_path / "b").fingerprint() == first
    (tmp_path / "b" / "c0" / "0.JPEG").rename(tmp_path / "b" / "c0" / "00.JPEG")
    assert opened(tmp_path / "b").fingerprint() != first
    assert open_sources(DataConfig(sources=["pipe:cat x.tar"])).fingerprint() is None
    mixed = [{"path": str(tmp_path / "a"), "weight": 1}, {"path": "pipe:cat x.tar", "weight": 1}]
    assert open_sources(DataConfig(sources=mixed)).fingerprint() not in (None, first)


def test_tables_are_found_as_they_were_saved(tmp_path) -> None:
    tables = {"a": [np.arange(7, dtype=np.uint8)], "b": [np.zeros((0, 3), np.int64)] * 2, "c": [np.array([[1.5]])] * 9}
    save_tables(tmp_path / "t", "key", tables)
    loaded = load_tables(tmp_path / "t", "key", check=True)
    assert loaded is not None and load_tables(tmp_path / "t", "other") is None
    for name, parts in tables.items():
        assert np.array_equal(loaded[name], np.concatenate(parts)) and loaded[name].dtype == parts[0].dtype
    assert [file.name for file in tmp_path.iterdir()] == ["t"]


def test_names_in_a_block() -> None:
    names = ["a/1.jpg", "", "été/図.jpg", os.fsdecode(b"\xff.jpg")]
    block, ends = pack_names(names)
    tables = Tables({"names": block, "ends": ends})
    assert [unpack_name(tables, i) for i in range(4)] == names
    assert len(pack_names([])[1]) == 0


def test_two_thousand_shards(tmp_path, request) -> None:
    """Under as many names; half of them with an index beside them."""
    (tmp_path / "shards").mkdir()
    first = write_tar(tmp_path / "first.tar", {"1.jpg": b"1", "2.jpg": b"2"})
    for number in range(2000):
        os.link(first, tmp_path / "shards" / f"{number:04d}.tar")
    tarindex.save_index(first, tarindex.scan(first).places)
    for number in range(0, 2000, 2):
        os.link(tarindex.index_path(first), tmp_path / "shards" / f"{number:04d}.index.npy")
    sources = opened(tmp_path / "shards", tmp_path / "cache")
    assert sources.num_samples == 4000
    request.getfixturevalue("no_scan")
    again = opened(tmp_path / "shards", tmp_path / "cache")
    part = again.parts[0]
    assert isinstance(part, Collection) and again.fingerprint() == sources.fingerprint()
    order = part.order(key=3)
    seen = {(index, source.read(index)) for source, index in (part.at(order, number) for number in range(4000))}
    assert len(seen) == 4000 and {data for _, data in seen} == {b"1", b"2"}


def test_the_order_of_a_thousand_million_samples_takes_little() -> None:
    order = EpochOrder(np.full(100_000, 10_000), window=16, key=0)
    assert order.total == 10**9
    places = [order.locate(number) for number in (0, 1, 10**9 - 1, 10**9, 17 * 10**9 + 5)]
    assert [epoch for epoch, _, _ in places] == [0, 0, 0, 1, 17]
    assert all(0 <= chunk < 100_000 and 0 <= place < 10_000 for _, chunk, place in places)
    assert sum(table.nbytes for each in order._passes.values() for table in each) < 2**22


def test_slow_work_is_watched(monkeypatch, capsys) -> None:
    assert list(pool.watch(range(3), 3, "quick")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(pool, "PATIENCE", 0.0)
    assert list(pool.watch(range(3), 3, "slow")) == [0, 1, 2]
    assert "slow" in capsys.readouterr().err
