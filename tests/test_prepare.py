"""`dinoreg data prepare` and `dinoreg data check`."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoreg.config import ConfigError
from dinoreg.data import inspect, prepare, shardwriter, tarindex
from dinoreg.data.crops import CropConfig
from dinoreg.data.images import open_picture
from dinoreg.data.photometric import PhotometricConfig
from dinoreg.data.prepare import PrepareOptions
from dinoreg.data.sources import DataConfig, open_sources
from dinoreg.data.stored import Shards

SMALL = PrepareOptions(shard_size_mb=0.02)


def picture(number: int, size: tuple[int, int] = (40, 30), kind: str = "PNG") -> bytes:
    rng = np.random.default_rng(number)
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(out, kind)
    return out.getvalue()


@pytest.fixture
def tree(tmp_path) -> Path:
    """A class tree of 30 images, three of them unusable."""
    root = tmp_path / "tree"
    for number in range(30):
        folder = root / ("ant", "bee", "cat")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}.png").write_bytes(picture(number))
    (root / "ant" / "00.png").write_bytes(b"")
    (root / "bee" / "01.png").write_bytes(picture(1)[:500])
    (root / "cat" / "02.png").write_bytes(b"<html>")
    return root


def checksums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def content(folder: Path) -> dict[bytes, int | None]:
    """Image bytes and label of every sample in the shards."""
    shards = Shards(sorted(folder.glob("*.tar")))
    return {shards.read(i): shards.label(i) for i in range(len(shards))}


def test_a_class_tree(tree, tmp_path) -> None:
    manifest = prepare.prepare(tree, tmp_path / "out", SMALL, workers=0, quiet=True)
    expected = {picture(n): n % 3 for n in range(3, 30)}
    assert content(tmp_path / "out") == expected
    assert manifest.samples == 27 and manifest.classes == ["ant", "bee", "cat"] and len(manifest.shards) > 2
    assert {(reason, Path(key).name) for reason, _, key in manifest.left_out} == {
        ("empty", "00.png"),
        ("truncated", "01.png"),
        ("not-an-image", "02.png"),
    }
    assert (tmp_path / "out" / "classes.txt").read_text().split() == ["ant", "bee", "cat"]
    written = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert written["samples"] == 27 and written["left_out"] == {"empty": 1, "truncated": 1, "not-an-image": 1}
    for shard in written["shards"]:
        path = tmp_path / "out" / shard["name"]
        assert shard["bytes"] == path.stat().st_size
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert shard["samples"] == len(tarindex.scan(path).names)
        assert np.array_equal(tarindex.load_index(path), tarindex.scan(path).places)


def test_the_shards_are_webdataset_shards(tree, tmp_path) -> None:
    import webdataset

    prepare.prepare(tree, tmp_path / "out", SMALL, workers=0, quiet=True)
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert {sample["png"]: int(sample["cls"]) for sample in samples} == content(tmp_path / "out")
    assert len({sample["__key__"] for sample in samples}) == 27


def test_samples_are_shuffled(tree, tmp_path) -> None:
    prepare.prepare(tree, tmp_path / "out", SMALL, workers=0, quiet=True)
    labels = list(content(tmp_path / "out").values())
    assert labels != sorted(labels) and labels != sorted(labels, reverse=True)


def test_workers_change_nothing(tree, tmp_path) -> None:
    for workers in (0, 3):
        prepare.prepare(tree, tmp_path / str(workers), SMALL, workers=workers, quiet=True)
    assert checksums(tmp_path / "0") == checksums(tmp_path / "3")


def test_restarting_keeps_what_is_right_and_rewrites_what_is_not(tree, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    written: list[str] = []
    original = shardwriter.ShardWriter._add

    def interrupted(self, tar, report, number):
        written.append(report.name)
        if report.name == stop_at:
            raise KeyboardInterrupt
        original(self, tar, report, number)

    monkeypatch.setattr(shardwriter.ShardWriter, "_add", interrupted)
    stop_at = "shard-000002.tar"
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(tree, out, SMALL, workers=0, quiet=True)
    assert sorted(path.name for path in out.glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    damaged = out / "shard-000001.tar"
    damaged.write_bytes(damaged.read_bytes().replace(b"IDAT", b"IDAX", 1))
    written.clear()
    stop_at = ""
    prepare.prepare(tree, out, SMALL, workers=0, quiet=True)
    assert "shard-000000.tar" not in written and {"shard-000001.tar", "shard-000002.tar"} <= set(written)
    prepare.prepare(tree, tmp_path / "straight", SMALL, workers=0, quiet=True)
    partial = ".shard-000002.tar.partial"
    assert {name: sum_ for name, sum_ in checksums(out).items() if name != partial} == checksums(tmp_path / "straight")
    written.clear()
    again = prepare.prepare(tree, out, SMALL, workers=0, quiet=True)
    assert written == [] and again.samples == 27 and len(again.left_out) == 3


def test_a_folder_with_other_shards_is_left_alone(tree, tmp_path) -> None:
    out = tmp_path / "out"
    prepare.prepare(tree, out, SMALL, workers=0, quiet=True)
    before = checksums(out)
    with pytest.raises(ConfigError, match="holds other shards, or of other options"):
        prepare.prepare(tree, out, PrepareOptions(shard_size_mb=0.05), workers=0, quiet=True)
    (out / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="holds other shards, such as shard-"):
        prepare.prepare(tree, out, PrepareOptions(shard_size_mb=0.05), workers=0, quiet=True)
    assert checksums(out).items() <= before.items()


def test_resize(tmp_path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    sizes = {"wide.jpg": (640, 200), "tall.jpg": (200, 640), "small.jpg": (50, 70)}
    for number, (name, size) in enumerate(sizes.items()):
        (root / name).write_bytes(picture(number, size, "JPEG"))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 400)).save(root / "turned.jpg", exif=exif)
    prepare.prepare(root, tmp_path / "out", PrepareOptions(resize=100), workers=0, quiet=True)
    shards = Shards(sorted((tmp_path / "out").glob("*.tar")))
    found = {}
    for i in range(len(shards)):
        opened = open_picture(shards.read(i))
        found[shards.locate(i)[1].split("_", 1)[1]] = (opened.width, opened.height)
    assert found == {"wide.jpg": (320, 100), "tall.jpg": (100, 320), "small.jpg": (50, 70), "turned.jpg": (133, 100)}
    small = next(shards.read(i) for i in range(4) if "small" in shards.locate(i)[1])
    assert small == (root / "small.jpg").read_bytes()


def test_the_suffix_follows_the_content(tmp_path) -> None:
    """ImageNet has a PNG and CMYK files under the name of JPEG."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "liar.JPEG").write_bytes(picture(0))
    np.save(tmp_path / "in" / "array.npy", np.zeros((4, 5, 3), dtype=np.uint8))
    prepare.prepare(tmp_path / "in", tmp_path / "out", workers=0, quiet=True)
    names = tarindex.scan(tmp_path / "out" / "shard-000000.tar").names
    assert sorted(name.partition("_")[2] for name in names) == ["array.npy", "liar.png"]


def test_from_tars_with_labels_and_without(tree, tmp_path) -> None:
    prepare.prepare(tree, tmp_path / "first", SMALL, workers=0, quiet=True)
    again = prepare.prepare(tmp_path / "first", tmp_path / "second", SMALL, workers=0, quiet=True)
    assert content(tmp_path / "second") == content(tmp_path / "first")
    assert again.classes == ["ant", "bee", "cat"]
    plain = prepare.prepare(tree, tmp_path / "plain", PrepareOptions(labels=False), workers=0, quiet=True)
    assert set(content(tmp_path / "plain").values()) == {None} and plain.classes == []


def test_an_archive_of_class_archives(tmp_path) -> None:
    """The form in which ImageNet's training set is distributed."""
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as outer:
        for number, name in enumerate(("n01", "n02")):
            with tarfile.open(tmp_path / f"{name}.tar", "w") as inner:
                for i in range(4):
                    (tmp_path / "x").write_bytes(picture(10 * number + i))
                    inner.add(tmp_path / "x", f"{name}_{i}.JPEG")
            outer.add(tmp_path / f"{name}.tar", f"{name}.tar")
    manifest = prepare.prepare(tmp_path / "ILSVRC2012_img_train.tar", tmp_path / "out", workers=0, quiet=True)
    assert manifest.classes == ["n01", "n02"]
    assert content(tmp_path / "out") == {picture(10 * c + i): c for c in range(2) for i in range(4)}


def test_folders_named_as_splits_are_no_classes(tmp_path) -> None:
    for name in ("train", "val"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.png").write_bytes(picture(0))
    assert prepare.prepare(tmp_path / "in", tmp_path / "out", workers=0, quiet=True).classes == []


def test_what_cannot_be_prepared(tmp_path) -> None:
    with pytest.raises(ConfigError, match="can only be streamed"):
        prepare.prepare("pipe:cat x.tar", tmp_path / "out", quiet=True)
    with pytest.raises(ConfigError, match="no such file or folder"):
        prepare.prepare(tmp_path / "nothing", tmp_path / "out", quiet=True)


def test_the_command(tree, tmp_path, capsys) -> None:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    assert prepare.main(parser.parse_args([str(tree), str(tmp_path / "out"), "--workers", "0"])) == 0
    out = capsys.readouterr().out
    assert "27 images in 1 shards, 3 classes" in out and "3 files left out" in out and "empty" in out
    assert open_sources(DataConfig(sources=[str(tmp_path / "out")])).num_samples == 27


def test_check_tells_what_is_there(tree, tmp_path, capsys) -> None:
    (tree / "cat" / "copy.png").write_bytes(picture(5))
    Image.new("RGB", (80, 60), (10, 10, 10)).save(tree / "ant" / "blank.jpg")
    found = inspect.inspect(open_sources(DataConfig(sources=[str(tree)])), workers=0)
    assert found.formats == {"PNG": 28, "JPEG": 1}
    assert (max(found.widths), max(found.heights), found.blank) == (80, 60, 1)
    assert len(found.digests) - len(set(found.digests)) == 1
    assert {sample.reason for sample in found.bad} == {"empty", "truncated", "not-an-image"}
    mean, std = found.mean_and_std
    pixels = [np.asarray(Image.open(path).convert("RGB")) / 255 for path in _readable(tree)]
    expected = np.mean([image.mean((0, 1)) for image in pixels], axis=0)
    np.testing.assert_allclose(mean, expected, atol=1e-3)
    np.testing.assert_allclose(
        std, np.sqrt(np.mean([(image**2).mean((0, 1)) for image in pixels], axis=0) - expected**2), atol=1e-3
    )


def _readable(tree: Path) -> list[Path]:
    bad = {"00.png", "01.png", "02.png"}
    return [path for path in tree.rglob("*.*") if path.name not in bad]


def test_the_check_command_draws_crops(tree, tmp_path, capsys) -> None:
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    picture_path = tmp_path / "crops.png"
    args = parser.parse_args([str(tree), "--workers", "0", "--picture", str(picture_path)])
    assert inspect.main(args) == 1  # something is unreadable
    out = capsys.readouterr().out
    assert "readable images" in out and "1 empty:" in out and "ant/00.png" in out
    assert Image.open(picture_path).width > 2 * 224


def test_the_picture_shows_the_crops(tmp_path) -> None:
    """Without photometrics a red image gives red crops on a grey ground."""
    for number in range(8):
        Image.new("RGB", (64, 64), (200, 0, 0)).save(tmp_path / f"{number}.png")
    crops = CropConfig(global_size=32, local_size=12, local_count=3)
    plain = PhotometricConfig(jitter=0, grey=0, blur=(0, 0, 0), solarise=(0, 0, 0))
    sheet = np.asarray(inspect.contact_sheet(open_sources(DataConfig(sources=[str(tmp_path)])), crops, plain, rows=2))
    red = (sheet == [200, 0, 0]).all(2)
    assert red.sum() == 2 * (2 * 32**2 + 3 * 12**2)
    assert (sheet[~red] == 128).all()
