"""Shards and folders that change while a run reads them: never other bytes than those that were there at the start."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch.multiprocessing
from test_data_sources import write_folder, write_tar

from dinoreg.data import stored, tarindex
from dinoreg.data.images import REASONS, BadImage
from dinoreg.data.stored import OPEN_SHARDS, Folder, Shards


def photo(number: int, version: str = "a") -> bytes:
    return f"{version}{number:04d}".encode() * 500


def write_versions(folder: Path, count: int, version: str = "a") -> list[Path]:
    """Shards of two "images"; those of another version have the same names and sizes."""
    return [
        write_tar(folder / f"{i:03d}.tar", {f"{n}.jpg": photo(n, version) for n in (2 * i, 2 * i + 1)})
        for i in range(count)
    ]


def outcome(source: Shards | Folder, index: int) -> str:
    """`ok`, or the reason why the image is not to be had; anything else than the first version is an error."""
    try:
        assert source.read(index) == photo(index)
    except BadImage as error:
        assert error.reason in REASONS
        return error.reason
    return "ok"


def outcomes(source: Shards | Folder, count: int) -> list[str]:
    return [outcome(source, index) for index in range(count)]


def replace(path: Path) -> None:
    """By another file of the same size, as downloads and `prepare` do."""
    number = int(path.stem)
    other = write_tar(path.with_suffix(".other"), {f"{n}.jpg": photo(n, "b") for n in (2 * number, 2 * number + 1)})
    other.replace(path)


def write_over(path: Path) -> None:
    """The same file gets other bytes; whoever has it open sees them."""
    other = path.with_suffix(".other")
    shutil.copy(path, other)
    other.write_bytes(other.read_bytes().replace(b"a0", b"b0"))
    with path.open("r+b") as file:
        file.write(other.read_bytes())
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # on a coarse clock it might be the time of the first writing


def shrink(path: Path) -> None:
    os.truncate(path, 512 + 2600)  # in the second image; the first is whole


def touch(path: Path) -> None:
    os.utime(path, (9, 9))


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(512))


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("change", "closed", "opened"),
    [
        (Path.unlink, ["missing", "missing"], ["ok", "ok"]),  # what is open stays readable
        (replace, ["changed", "changed"], ["ok", "ok"]),
        (write_over, ["changed", "changed"], ["changed", "changed"]),
        (shrink, ["changed", "truncated"], ["changed", "truncated"]),
        (touch, ["changed", "changed"], ["changed", "changed"]),
        (grow, ["changed", "changed"], ["changed", "changed"]),
        (become_a_folder, ["missing", "missing"], ["ok", "ok"]),
        (become_a_pipe, ["missing", "missing"], ["ok", "ok"]),
    ],
)
def test_a_shard_that_changes(tmp_path, change, closed, opened) -> None:
    paths = write_versions(tmp_path, 3)
    shards = Shards(paths)
    assert outcomes(shards, 2) == ["ok", "ok"]  # the first is open now, the others are not
    for path in paths[:2]:
        change(path)
    assert outcomes(shards, 6) == [*opened, *closed, "ok", "ok"]
    elsewhere = pickle.loads(pickle.dumps(shards))
    assert outcomes(elsewhere, 6) == [*closed, *closed, "ok", "ok"]


def test_a_shard_that_leaves_the_open_ones_is_looked_at_again(tmp_path) -> None:
    paths = write_versions(tmp_path, OPEN_SHARDS + 2)
    shards = Shards(paths)
    assert outcomes(shards, 2 * OPEN_SHARDS) == ["ok"] * 2 * OPEN_SHARDS
    for path in paths[:2]:
        replace(path)
    assert outcomes(shards, 4) == ["ok"] * 4  # the files that are open are still the old ones
    last = 2 * OPEN_SHARDS
    assert outcome(shards, last) == "ok"  # closes the third
    for index in [*range(6, last), last, last + 2]:  # all but the first two, so that these are closed
        assert outcome(shards, index) == "ok"
    assert outcomes(shards, 6) == ["changed"] * 4 + ["ok"] * 2
    assert len(shards._open) == OPEN_SHARDS


def serve(shards: Shards, asked, answered) -> None:
    for count in iter(asked.get, None):
        answered.put(outcomes(shards, count))


def test_a_worker_that_has_shards_open(tmp_path) -> None:
    paths = write_versions(tmp_path, 4)
    shards = Shards(paths, tmp_path / "cache")
    context = torch.multiprocessing.get_context("forkserver")
    asked, answered = context.Queue(), context.Queue()
    process = context.Process(target=serve, args=(shards, asked, answered), daemon=True)
    process.start()
    asked.put(4)
    assert answered.get(timeout=100) == ["ok"] * 4  # two are open there
    for path, change in zip(paths, (write_over, shrink, replace, Path.unlink), strict=True):
        change(path)
    asked.put(8)
    expected = ["changed", "changed", "changed", "truncated", "changed", "changed", "missing", "missing"]
    assert answered.get(timeout=100) == expected
    asked.put(None)
    process.join()


def test_shards_written_anew_before_the_start_are_simply_read(tmp_path) -> None:
    paths = write_versions(tmp_path, 2)
    for path in paths:
        tarindex.save_index(path, tarindex.scan(path).places)
    assert outcomes(Shards(paths, tmp_path / "cache"), 4) == ["ok"] * 4
    write_versions(tmp_path, 2, "b")
    shards = Shards(paths, tmp_path / "cache")
    assert [shards.read(index) for index in range(4)] == [photo(index, "b") for index in range(4)]


def test_an_index_of_another_shard_gives_no_other_bytes(tmp_path) -> None:
    path = write_versions(tmp_path, 2)[0]
    size = path.stat().st_size
    good = tarindex.scan(path).places
    forged = [(0, 10), (-512, 10), (512, -1), (512, 2**40), (700, 20), (2**62, 2**62), (512, 9)]
    for place in forged:
        table = np.array([[1, size, 2], [*place, -1], good[1]], dtype=np.int64)
        np.save(tarindex.index_path(path), table)
        shards = Shards([path])
        with pytest.raises(BadImage) as caught:
            shards.read(0)
        assert caught.value.reason in REASONS and shards.read(1) == photo(1)
        assert shards.locate(0)[0] == str(path) and isinstance(shards.locate(0)[1], str)
    np.save(tarindex.index_path(path), np.array([[1, size, 2], good[0], [512, 9, -1]], dtype=np.int64))
    assert tarindex.load_index(path) is None  # the last place is looked at when the run starts
    np.save(tarindex.index_path(path), np.array([["a"]], dtype=object), allow_pickle=True)
    assert tarindex.load_index(path) is None


@pytest.mark.parametrize("name", ["/etc/1.jpg", "../1.jpg", "a/../../1.jpg"])
def test_an_index_made_elsewhere_is_no_way_around_safe_names(tmp_path, name) -> None:
    path = write_tar(tmp_path / "t.tar", {"0.jpg": b"fine", name: b"bad", "2.jpg": b"fine"})
    places = [[512, 4, -1], [1536, 3, -1], [2560, 4, -1]]
    tarindex.save_index(path, np.array(places, dtype=np.int64))
    shards = Shards([path])
    assert shards.read(0) == shards.read(2) == b"fine"
    with pytest.raises(BadImage) as caught:
        shards.read(1)
    assert caught.value.reason == "unsafe-path" and name in str(caught.value)


def test_images_of_gigabytes_are_not_read(tmp_path) -> None:
    path = write_tar(tmp_path / "t.tar", {"1.jpg": b"x" * 600})
    shards = Shards([path])
    huge = shards._tables["places"].copy()
    huge[0, 1] = 2**40
    shards._tables._arrays["places"] = torch.from_numpy(huge)
    assert outcome(shards, 0) == "too-large"


def test_files_of_a_folder_that_change(tmp_path) -> None:
    root = write_folder(tmp_path, 12)
    folder = Folder(root)
    paths = [root / folder.name(index) for index in range(12)]
    paths[0].unlink()
    become_a_folder(paths[1])
    become_a_pipe(paths[2])
    found = []
    for index in range(4):
        try:
            found.append(folder.read(index).decode())
        except BadImage as error:
            found.append(error.reason)
    assert found == ["missing", "missing", "not-an-image", paths[3].stem]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_shard_that_is_no_plain_file_is_refused_at_once(tmp_path, make) -> None:
    make(tmp_path / "1.tar")
    with pytest.raises(stored.ConfigError, match=r"1\.tar is no plain file"):
        stored.open_stored([str(tmp_path / "1.tar")])


def test_labels_that_are_no_numbers_are_named(tmp_path) -> None:
    shards = Shards([write_tar(tmp_path / "t.tar", {"a.jpg": b"x", "a.cls": b"cat"})])
    with pytest.raises(ValueError, match=r"the label of a\.jpg in .*t\.tar is no number: b'cat'"):
        shards.label(0)
