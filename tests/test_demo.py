"""The demo's data, its report, and the whole of it in a few steps."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoreg import demo
from dinoreg.config import ConfigError
from dinoreg.data.labelled import LabelledImages


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> demo.DemoData:
    return demo.build_data(tmp_path_factory.mktemp("demo"))


def test_photos_are_files_of_the_packages() -> None:
    photos = demo.find_photos()
    assert len(photos) == len(demo.PHOTOS)
    assert all("site-packages" in str(path) for path in photos.values())  # a download would lie in a cache


def test_too_few_photos_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PHOTOS", {"astronaut": "astronaut.png", "none": "none.png"})
    with pytest.raises(ConfigError, match="only 1 of 2 photographs"):
        demo.find_photos()


def test_shards_hold_what_they_say(data: demo.DemoData) -> None:
    count = len(data.classes)
    for pattern, per_photo in (
        (data.tiles, demo.TILES_PER_PHOTO),
        (data.seen_crops, demo.CROPS_PER_PHOTO),
        (data.unseen_crops, demo.CROPS_PER_PHOTO),
    ):
        images = LabelledImages(pattern, 16)
        assert np.bincount(images.labels, minlength=count).tolist() == [per_photo] * count


def test_building_twice_changes_nothing(tmp_path: Path) -> None:
    demo.build_data(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    demo.build_data(tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_seen_and_unseen_parts_share_no_pixel() -> None:
    marked = Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint32).reshape(40, 60, 3).astype(np.uint8))
    position = Image.fromarray(np.arange(40 * 60, dtype=np.int32).reshape(40, 60))
    parts = [
        {int(v) for q in quarters for v in np.unique(demo._quarter(position, *q))}
        for quarters in (demo.SEEN, demo.UNSEEN)
    ]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 40 * 60
    squares = [tile.size for tile, _ in demo._cut({"a": marked}, demo.SEEN, 5, seed=0, disturb=True)]
    assert squares == [(demo.TILE, demo.TILE)] * 5


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1, 2, 3, 4, 5, 6, 7, 8], "▁▂▃▄▅▆▇█"), ([2, 2], "▁▁"), ([0.0] * 64 + [1.0] * 64, "▁" * 16 + "█" * 16)],
)
def test_sparkline(values: list[float], expected: str) -> None:
    assert demo.sparkline(values) == expected


def test_the_whole_demo_in_a_few_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "TILES_PER_PHOTO", 4)
    monkeypatch.setattr(demo, "CROPS_PER_PHOTO", 2)
    monkeypatch.setattr(demo, "PROTOCOL", [*demo.PROTOCOL, "imagenet-linear.steps=5"])
    parser = ArgumentParser()
    demo.add_arguments(parser)
    asked = parser.parse_args(["--out", str(tmp_path / "run"), "--steps", "2"])
    assert demo.main(asked) == 0
    said = capsys.readouterr().out
    assert "nan" not in said
    for expected in ("index.html", "k-NN", "loss", "step_00000002.safetensors", "dinoreg train own_images_1gpu"):
        assert expected in said, expected
    with Image.open(tmp_path / "run" / "registers.png") as picture:
        assert picture.width > 1000
    page = (tmp_path / "run" / "index.html").read_text()
    for expected in (
        "for 2 steps",
        "<img",
        "loss against step",
        "knn",
        "imagenet-linear",
        "34</td>",
        "What to try next",
    ):
        assert expected in page, expected
    report = tmp_path / "run" / "eval" / "report.html"
    assert 'href="eval/report.html"' in page and "astronaut" in report.read_text()

    before = report.stat().st_mtime_ns
    assert demo.main(asked) == 0  # started again, it goes on: nothing is left to do
    assert "index.html" in capsys.readouterr().out and report.stat().st_mtime_ns == before


def test_an_evaluation_that_fails_is_told_with_its_command(tmp_path: Path) -> None:
    data = demo.DemoData("tiles.tar", str(tmp_path / "none.tar"), str(tmp_path / "none.tar"), ["a"])
    with pytest.raises(ConfigError, match="ended with 2: dinoreg-eval all"):
        demo.evaluate(tmp_path / "teacher" / "step_00000002.safetensors", data)
