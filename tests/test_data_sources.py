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
from PIL import Image

from dinoreg.config import ConfigError
from dinoreg.data import tarindex
from dinoreg.data.counter import Purpose, generator, make_key, permute
from dinoreg.data.crops import CropConfig
from dinoreg.data.images import BadImage
from dinoreg.data.loader import BatchMaker
from dinoreg.data.masks import MaskConfig
from dinoreg.data.order import MIX_BLOCK, EpochOrder, Mixture
from dinoreg.data.photometric import PhotometricConfig
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


def plain_hash(value: int) -> int:
    """SplitMix64."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return value ^ (value >> 31)


def plain_permute(index: int, size: int, key: int) -> int:
    """The same permutation round by round, without tables."""
    if size <= 256:
        return int(generator(key, Purpose.PERMUTE, size).permutation(size)[index])
    half = ((size - 1).bit_length() + 1) // 2
    while True:
        left, right = divmod(index, 2**half)
        for turn in range(6):
            left, right = right, left ^ plain_hash(key ^ turn * 2**56 ^ right) % 2**half
        index = left * 2**half + right
        if index < size:
            return index


SIZES = (1, 2, 255, 256, 257, 512, 513, 1023, 1024, 1025, 160_000, 2**20, 2**20 + 1, 10**9, 2**32 + 1)


@pytest.mark.parametrize("key", [0, 1, -3, 2**63, 2**64 - 1, 2**70 + 5, make_key(7)])
def test_permute_is_the_one_that_runs_rely_on(key) -> None:
    for size in SIZES:
        for index in {0, size // 3, size // 2, size - 1}:
            assert permute(index, size, key) == plain_permute(index, size, key)


def plain_locate(sizes: np.ndarray, window: int, key: int, number: int) -> tuple[int, int, int]:
    """Where the number-th sample ever lies, by counting through the chunks of its pass."""
    epoch, place = divmod(number, int(sizes.sum()))
    chunks = generator(key, Purpose.ORDER, epoch).permutation(len(sizes)).tolist()
    for first in range(0, len(chunks), window):
        inside = chunks[first : first + window]
        size = int(sizes[inside].sum())
        if place < size:
            break
        place -= size
    place = plain_permute(place, size, make_key(key, epoch, first // window))
    for chunk in inside:
        if place < sizes[chunk]:
            return epoch, chunk, place
        place -= int(sizes[chunk])
    raise AssertionError


@pytest.mark.parametrize("window", [1, 3, 16, 100])
@pytest.mark.parametrize("sizes", [[7], [5, 0, 9, 2, 0], [1] * 40, [300, 0, 1024, 70] * 8])
def test_order_is_the_one_that_runs_rely_on(sizes, window) -> None:
    """Also for whoever jumps about, through more windows than are kept, and back to earlier passes."""
    order, total = EpochOrder(np.array(sizes), window, key=11), sum(sizes)
    jumps = np.random.default_rng(0).integers(5 * total, size=100).tolist()
    for number in [*jumps, *range(total - 3, total + 40), 10**6 * total + 1, 0]:
        assert order.locate(number) == plain_locate(np.array(sizes), window, 11, number)


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.2, 0.1], [1.0, 900.0, 1.0], [1.0] * 50])
def test_mixture_is_the_one_that_runs_rely_on(weights) -> None:
    """A block's places, permuted, fall to the sources in the order of their numbers."""
    edges = np.cumsum([0.0, *weights]) / np.sum(weights)
    mixture = Mixture(weights, seed=5)
    for number in [*range(MIX_BLOCK - 20, MIX_BLOCK + 20), 10**9, 3, 10**12 + 7]:
        block, place = divmod(number, MIX_BLOCK)
        place = plain_permute(place, MIX_BLOCK, make_key(5, Purpose.SOURCE, block))
        before, after = (np.diff(np.floor(b * MIX_BLOCK * edges + 0.5)).astype(int) for b in (block, block + 1))
        source = int(np.flatnonzero(np.cumsum(after - before) > place)[0])
        turn = place - int((after - before)[:source].sum()) + int(before[source])
        assert mixture.assign(number) == (source, turn)


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


def test_what_is_announced_is_what_is_read(tmp_path, monkeypatch) -> None:
    """Each sample's very bytes are asked of the disk; streams and files that lie alone are left as they are."""
    write_shards(tmp_path, [20, 30])
    write_folder(tmp_path / "photos", 10)
    write_tar(tmp_path / "far.tar", {f"{n}.png": b"%d" % n for n in range(100, 110)})
    stored = {"path": [str(tmp_path / "photos"), str(tmp_path / "s-*.tar")], "weight": 1}
    sources = open_sources(DataConfig(sources=[stored, {"path": f"pipe:cat {tmp_path}/far.tar", "weight": 1}]))
    asked, read, pread = [], [], os.pread
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, size, advice: asked.append((file, start, size)))
    monkeypatch.setattr(
        os, "pread", lambda file, size, start: read.append((file, start, size)) or pread(file, size, start)
    )
    reader, silent = Reader(sources, 0), Reader(sources, 0)
    reader.announce(range(50))
    found = [reader.entry(number).read() for number in range(50)]
    assert asked and asked == read
    assert found == [silent.entry(number).read() for number in range(50)]


def test_a_loader_announces_the_batch_after_the_one_it_makes(tmp_path, monkeypatch) -> None:
    image = io.BytesIO()
    Image.new("RGB", (20, 20)).save(image, "PNG")
    path = write_tar(tmp_path / "t.tar", {f"{n}.png": image.getvalue() for n in range(7)})
    crops = CropConfig(global_size=8, local_size=8, local_count=1)
    given = crops, PhotometricConfig(), MaskConfig(), (2, 2)
    maker = BatchMaker(open_sources(DataConfig(sources=[str(path)])), *given, 3, batch_size=6, seed=0, rank=1, world=2)
    announced = []
    monkeypatch.setattr(Reader, "announce", lambda reader, numbers: announced.append(numbers))
    made = [maker[step] for step in (0, 1)]
    assert announced == [range(9, 12), range(15, 18)]
    assert made[1].positions.tolist() == [9, 10, 11]


def test_to_announce_what_cannot_be_read_is_no_error(tmp_path) -> None:
    path = write_tar(tmp_path / "t.tar", {f"{n}.jpg": b"x" * 5000 for n in range(3)})
    places = tarindex.scan(path).places
    places[1], places[2] = (-(2**63), 2**63 - 1, 0), (2**62, -5, 0)
    tarindex.save_index(path, places)
    shards = Shards([path])
    path.unlink()
    for index in range(3):
        shards.announce(index)
        with pytest.raises(BadImage):
            shards.read(index)


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
