"""The page of a checkpoint: what it says, that it stands alone, and what happens where something is missing."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluating import write_data, write_weights
from PIL import Image
from results_on_disk import read_content, write_content, write_knn, write_run

from dinoreg.config import ConfigError
from eval.cli import main
from eval.report.page import write_report

VOID = {"meta", "img", "br", "wbr"}


class Checker(HTMLParser):
    """Raises where tags are not closed in order; keeps what is linked or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attrs)
        places = [values.get(key) or "" for key in ("src", "href")]
        self.outside += [place for place in places if place and not place.startswith(("data:image/", "#"))]
        if tag in ("script", "link", "iframe"):
            self.outside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def stands_alone(path: Path) -> str:
    """The text of a page that is well formed and fetches nothing."""
    content = path.read_text()
    checker = Checker()
    checker.feed(content)
    assert checker.open == [] and checker.outside == []
    assert "url(" not in content and "nan" not in content.lower().replace("nanometre", "")
    return content


def test_every_suite_leaves_a_page_and_all_of_them_one_more(tmp_path: Path) -> None:
    data, weights = write_data(tmp_path / "data", wrong=2), write_weights(tmp_path / "net.safetensors")
    words = ["all", "--weights", str(weights), "--data-imagenet", str(data), "--preset", "quick"]
    words += ["--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    with pytest.raises(SystemExit) as ended:
        main(
            [*words, "--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "imagenet-linear.steps=20"]
        )
    assert not ended.value.code
    for suite in ("knn", "logreg", "imagenet-linear"):
        assert suite in stands_alone(tmp_path / "out" / suite / "report.html")
    page = stands_alone(tmp_path / "out" / "report.html")
    for expected in (
        "4 blocks of width 64", "antialiasing", "40 of data", "shorter protocol", "steps = 20; published: 12,500",
        "80 % of 10", "What was tried", "on the 12 held-out images", "guessing finds 25 %",
    ):  # fmt: skip
        assert expected in page, expected


def test_names_from_outside_are_text_and_not_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    folder = write_knn(tmp_path / "a", 0.5, weights=evil, found=evil, notes=[evil])
    content = read_content(folder)
    content["details"] = {"by_class": [50.0, 25.0]}
    content["data"] |= {"class_names": [evil, "b"], "bad": {evil: evil}, "test_of_class": [4, 4]}
    assert evil not in stands_alone(write_report(write_content(folder, content)))


def test_the_published_protocol_on_the_published_data_is_said_to_be_that(tmp_path: Path) -> None:
    page = stands_alone(write_report(write_knn(tmp_path / "a", 0.82)))
    assert "Nothing differs from the published protocol" in page and "careful" not in page
    assert "82.0 %" in page and "50,000 of imagenet1k" in page


def test_predictions_stand_beside_the_truth_and_lost_pictures_are_said(tmp_path: Path) -> None:
    folder = tmp_path / "depth"
    (folder / "pictures").mkdir(parents=True)
    for part in ("image", "truth", "prediction_lin1"):
        Image.fromarray(np.full((30, 40, 3), 128, dtype=np.uint8)).save(folder / "pictures" / f"{part}.png")
    entry: dict[str, Any] = {part: f"pictures/{part}.png" for part in ("image", "truth", "prediction_lin1", "lost")}
    (folder / "pictures" / "torn.png").write_bytes(b"\x89PNG")
    entry |= {"torn": "pictures/torn.png", "name": "room.jpg", "low_m": 0.5, "high_m": 4.25}
    write_knn(folder / "x", 0.5)
    content = read_content(folder / "x")
    content["details"] = {"pictures": [entry]}
    page = stands_alone(write_report(write_content(folder, content)))
    assert page.count("<img") == 3 and "predicted from 1 block" in page and "0.5 m" in page
    assert "lost.png is no longer there" in page and "torn.png cannot be read" in page


def test_of_a_run_the_page_is_about_the_newest_step_and_names_the_others(tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path / "mine", {100: 0.3, 2000: 0.6, 1000: 0.5}))
    assert path == tmp_path / "mine" / "eval" / "report.html"
    page = stands_alone(path)
    assert "How good is mine, step 2,000?" in page and "mine, step 1,000; mine, step 100" in page
    assert "60.0 %" in page and "50.0 %" not in page


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no results.json in"),
        ("{", "cannot be read as results"),
        ("{}", "it has no suite"),
        ("[]", "no suite"),
        (
            '{"suite": "a", "scores": {"a": 1}, "protocol": [1], "digest": "d", "found": 1, "data": {"name": ""}}',
            "no data.test",
        ),
    ],
)
def test_what_is_no_result_is_told_in_one_line(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(ConfigError, match=said) as error:
        write_report(tmp_path)
    assert "\n" not in str(error.value)
