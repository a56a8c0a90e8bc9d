"""Order, mixing and tar indices."""

from __future__ import annotations

import io
import itertools
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dinoreg.config import ConfigError
from dinoreg.data import tarindex
from dinoreg.data.counter import Purpose, generator, make_key, permute
from dinoreg.data.images import BadImage
from dinoreg.data.order import MIX_BLOCK, EpochOrder, Mixture
from dinoreg.data.sources import DataConfig, Reader, Sources, open_sources
from dinoreg.data.stored import Folder, Shards


def write_tar(path: Path, members: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_shards(folder: Path, sizes: list[int], name: str = "s") -> list[Path]:
    """Shards whose "images" are their own numbers as text."""
    numbers = itertools.count()
    return [
        write_tar(folder / f"{name}-{i:03d}.tar", {f"{n:05d}.jpg": b"%d" % n for n in itertools.islice(numbers, size)})
        for i, size in enumerate(sizes)
    ]


def write_folder(root: Path, count: int) -> Path:
    for i in range(count):
        folder = root / f"c{i % 3}" / ("deep" if i % 2 else ".")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.JPEG").write_bytes(b"%d" % i)
    return root


def numbers_of(sources: Sources, start: int, count: int, seed: int = 0) -> list[int]:
    reader = Reader(sources, seed)
    return [int(reader.entry(g).read()) for g in range(start, start + count)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 100, 1025])
def test_permute_is_a_permutation(size) -> None:
    orders = {tuple(permute(i, size, make_key(key)) for i in range(size)) for key in range(20)}
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert len(orders) == 1 if size == 1 else len(orders) > 1


@pytest.mark.parametrize("size", [6, 300])
def test_permute_is_uniform(size) -> None:
    """Each place gets each sixth of the values equally often: chi-squared with 25 degrees of freedom."""
    counts = np.zeros((6, 6))
    part = size // 6
    for key in range(6000):
        for i in range(6):
            counts[i, permute(i * part, size, make_key(key)) // part] += 1
    assert ((counts - 1000) ** 2 / 1000).sum() < 60  # about 30 expected; 60 has a chance of less than 1e-3


def test_neighbours_are_not_kept_together() -> None:
    places = np.array([permute(i, 10000, key=7) for i in range(10000)])
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.04
    assert abs(np.corrcoef(places, np.arange(10000))[0, 1]) < 0.04


def test_generators_of_different_numbers_differ() -> None:
    drawn = {
        tuple(generator(*which).random(3))
        for which in itertools.product((0, 1, -1), (Purpose.CROP, Purpose.MASK), (0, 1, 2**40), (0, 1))
    }
    assert len(drawn) == 36


@pytest.mark.parametrize("sizes", [[7], [1, 1, 1], [5, 0, 9, 2], [30] * 12])
@pytest.mark.parametrize("window", [1, 2, 100])
def test_each_pass_is_an_exact_permutation(sizes, window) -> None:
    order = EpochOrder(np.array(sizes), window, key=4)
    every = {(chunk, place) for chunk, size in enumerate(sizes) for place in range(size)}
    passes = [[order.locate(epoch * order.total + i) for i in range(order.total)] for epoch in range(3)]
    for epoch, found in enumerate(passes):
        assert {entry[0] for entry in found} == {epoch}
        assert {entry[1:] for entry in found} == every
    if order.total > 5:
        assert [entry[1:] for entry in passes[0]] != [entry[1:] for entry in passes[1]]


def test_reads_stay_within_a_window_of_shards() -> None:
    order = EpochOrder(np.full(20, 10), window=4, key=0)
    for start in range(0, 200, 40):
        assert len({order.locate(i)[1] for i in range(start, start + 40)}) == 4
    assert len({order.locate(i)[1] for i in range(12)}) > 1  # and they are shuffled inside it


def test_mixture_is_exact_in_every_block() -> None:
    weights = [0.7, 0.2, 0.1]
    mixture = Mixture(weights, seed=1)
    dealt = [mixture.assign(g) for g in range(3 * MIX_BLOCK)]
    for source, weight in enumerate(weights):
        turns = [turn for which, turn in dealt if which == source]
        assert sorted(turns) == list(range(len(turns)))  # each source's own numbers without a gap
        assert abs(len(turns) - weight * 3 * MIX_BLOCK) <= 1
    first = Counter(which for which, _ in dealt[:400])
    assert abs(first[0] - 280) < 4 * np.sqrt(400 * 0.21)  # not in runs


def test_folders_and_shards_make_one_permutation(tmp_path) -> None:
    folder = write_folder(tmp_path / "photos", 60)
    write_tar(tmp_path / "a.tar", {f"{n}.png": b"%d" % n for n in range(60, 100)})
    write_tar(tmp_path / "b.tar", {f"{n}.png": b"%d" % n for n in range(100, 105)})
    sources = open_sources(DataConfig(sources=[str(folder), str(tmp_path / "{a,b}.tar")], shuffle_window=2))
    assert sources.num_samples == 105
    for epoch in range(2):
        assert sorted(numbers_of(sources, 105 * epoch, 105)) == list(range(105))
    assert numbers_of(sources, 0, 105) != numbers_of(sources, 105, 105)
    assert numbers_of(sources, 0, 105) != numbers_of(sources, 0, 105, seed=1)
    assert numbers_of(sources, 37, 20) == numbers_of(sources, 0, 105)[37:57]


def test_a_sorted_folder_is_shuffled_as_a_whole(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("dinoreg.data.stored.FOLDER_CHUNK", 8)
    sources = open_sources(DataConfig(sources=[str(write_folder(tmp_path, 96))], shuffle_window=1))
    first = numbers_of(sources, 0, 96)
    assert sorted(first) == list(range(96))
    assert max(first[:8]) - min(first[:8]) > 30


def test_weights(tmp_path) -> None:
    write_folder(tmp_path / "small", 10)
    write_tar(tmp_path / "large.tar", {f"{n}.png": b"%d" % n for n in range(1000, 1090)})
    entries = [{"path": str(tmp_path / "small"), "weight": 1}, {"path": str(tmp_path / "large.tar"), "weight": 3}]
    sources = open_sources(DataConfig(sources=entries))
    assert sources.num_samples == 100
    found = numbers_of(sources, 0, MIX_BLOCK)
    small = Counter(n for n in found if n < 1000)
    assert small.total() == MIX_BLOCK // 4
    assert set(small.values()) <= {MIX_BLOCK // 40, MIX_BLOCK // 40 + 1}  # whole passes over the small source


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_finds_what_tarfile_finds(tmp_path, format) -> None:
    long = "x" * 90 + "/" + "y" * 60 + ".jpg"
    members = {"a/1.jpg": b"one", "a/1.cls": b"7", "a/1.json": b"{}", "2.PNG": b"", long: b"long" * 200}
    members |= {"._3.jpg": b"junk", "a/4.cls": b"12", "a/4.jpeg": b"four"}
    path = write_tar(tmp_path / "t.tar", members, format)
    index = tarindex.scan(path)
    assert index.names == ["a/1.jpg", "2.PNG", long, "a/4.jpeg"]
    content = path.read_bytes()
    for name, (offset, size, _) in zip(index.names, index.places.tolist(), strict=True):
        assert content[offset : offset + size] == members[name]
    shards = Shards([path])
    assert [shards.label(i) for i in range(4)] == [7, None, None, 12]
    assert shards.locate(3) == (str(path), "a/4.jpeg") and shards.read(3) == b"four"


def test_names_beyond_ascii(tmp_path) -> None:
    path = write_tar(tmp_path / "t.tar", {"été/図.jpg": b"1"}, tarfile.PAX_FORMAT)
    assert tarindex.scan(path).names == ["été/図.jpg"]


def test_one_image_a_key(tmp_path) -> None:
    paired = {"1.jpg": b"a", "1.seg.png": b"b", "1.png": b"c", "2.jpg": b"d"}
    assert tarindex.scan(write_tar(tmp_path / "p.tar", paired)).names == ["1.jpg", "2.jpg"]
    dotted = {"trip.1.jpg": b"a", "trip.2.jpg": b"b"}
    assert tarindex.scan(write_tar(tmp_path / "d.tar", dotted)).names == list(dotted)


def test_tars_inside_a_tar(tmp_path) -> None:
    """As in the archive that ImageNet is distributed as."""
    inner = {
        name: write_tar(tmp_path / name, {f"{name}_{i}.JPEG": f"{name}{i}".encode() for i in range(3)}).read_bytes()
        for name in ("n01.tar", "n02.tar")
    }
    shards = Shards([write_tar(tmp_path / "train.tar", inner)])
    assert [shards.read(i) for i in range(6)] == [f"n0{c}.tar{i}".encode() for c in (1, 2) for i in range(3)]
    assert tarindex.scan(tmp_path / "train.tar").names[3] == "n02/n02.tar_0.JPEG"


def test_a_saved_index_is_used_while_it_fits(tmp_path, monkeypatch) -> None:
    path = write_shards(tmp_path, [5])[0]
    places = tarindex.scan(path).places
    tarindex.save_index(path, places)
    monkeypatch.setattr(tarindex, "scan", lambda _: pytest.fail("scanned in spite of an index"))
    assert np.array_equal(next(tarindex.find_places([str(path)])), places)
    monkeypatch.undo()
    write_tar(path, {f"{n:05d}.jpg": b"x" * n for n in range(100, 109)})
    assert tarindex.load_index(path) is None
    assert len(Shards([path])) == 9
    tarindex.index_path(path).write_bytes(b"rubbish")
    assert tarindex.load_index(path) is None


def test_a_shard_that_shrinks_or_goes_after_it_was_indexed(tmp_path) -> None:
    path = write_tar(tmp_path / "t.tar", {"1.jpg": b"x" * 5000})
    shards = Shards([path])
    os.truncate(path, 2000)
    with pytest.raises(BadImage) as caught:
        shards.read(0)
    assert caught.value.reason == "truncated"
    other = Shards([write_tar(tmp_path / "u.tar", {"1.jpg": b"x"})])
    (tmp_path / "u.tar").unlink()
    with pytest.raises(BadImage) as caught:
        other.read(0)
    assert caught.value.reason == "missing"


def test_folders_at_any_depth_with_links_and_circles(tmp_path) -> None:
    root = write_folder(tmp_path / "root", 7)
    (root / "c0" / "notes.txt").write_text("no image")
    (root / ".hidden.jpg").write_bytes(b"x")
    other = write_folder(tmp_path / "other", 2)
    (root / "linked").symlink_to(other)
    (root / "c1" / "circle").symlink_to(root)
    folder = Folder(root)
    names = [folder.name(i) for i in range(len(folder))]
    assert len(names) == 9 and names == sorted(set(names))
    assert [int(folder.read(i)) for i in range(9)] == [int(Path(name).stem) for name in names]
    assert folder.sizes().tolist() == [1] * 9
    (root / names[0]).unlink()
    assert folder.sizes().tolist() == [0] + [1] * 8
    with pytest.raises(BadImage) as caught:
        folder.read(0)
    assert caught.value.reason == "missing" and folder.locate(0) == (str(root), names[0])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "names no images"),
        (["/nowhere/at/all"], "no such file or folder: /nowhere/at/all"),
        (["{tmp}/none-*.tar"], "no such file or folder"),
        (["{tmp}/file.txt"], "neither a folder nor a .tar"),
        (["{tmp}/empty"], "no images in"),
        (["{tmp}/broken.tar"], "not an uncompressed tar file"),
        (["{tmp}/cut.tar"], "is cut off"),
        (["{tmp}/good.tar", "pipe:cat x"], "give each source a weight"),
        (["{tmp}/good.tar", {"path": "{tmp}/good.tar", "weight": 1}], "either every source has a weight or none"),
        ([{"path": "{tmp}/good.tar"}], "a source is a path or"),
        ([{"path": "{tmp}/good.tar", "weight": "much"}], "is not a number"),
        ([{"path": "{tmp}/good.tar", "weight": w} for w in (1, 1e-6)], "at least 0.001"),
    ],
)
def test_what_cannot_be_opened_is_said_in_one_line(tmp_path, entries, message) -> None:
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.tar").write_bytes(b"no tar " * 200)
    good = write_tar(tmp_path / "good.tar", {"1.jpg": b"x" * 3000})
    (tmp_path / "cut.tar").write_bytes(good.read_bytes()[:1000])

    def fill(entry):
        if isinstance(entry, str):
            return entry.replace("{tmp}", str(tmp_path))
        return {key: fill(value) if key == "path" else value for key, value in entry.items()}

    with pytest.raises(ConfigError) as caught:
        open_sources(DataConfig(sources=[fill(entry) for entry in entries]))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.key == "data.sources"


def test_weighted_streams_and_files(tmp_path) -> None:
    write_shards(tmp_path, [40])
    write_tar(tmp_path / "local.tar", {f"{n}.png": b"%d" % n for n in range(1000, 1010)})
    entries = [
        {"path": f"pipe:cat {tmp_path}/s-000.tar", "weight": 0.5},
        {"path": str(tmp_path / "local.tar"), "weight": 0.5},
    ]
    sources = open_sources(DataConfig(sources=entries, stream_buffer=2))
    found = numbers_of(sources, 0, 400)
    assert sources.num_samples is None
    assert abs(sum(n >= 1000 for n in found) - 200) < 40
