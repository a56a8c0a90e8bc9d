"""What knockout and test-time-registers tell of two networks side by side, one of which has no registers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluating import run_suite, surroundings
from planted import planted_network, write_planted_classes

from eval.backbone import Backbone
from eval.inside.finding import Album, Finding, Seen
from eval.inside.knockout.shown import _verdict
from eval.report.read import read_evaluation
from eval.results import write_result
from eval.suites import SUITES

ALIKE = ["zoom=1", "image_size=32", "images=12", "train_images=16", "photos=2"]
WORDS = {
    "test-time-registers": [*ALIKE, "top_k=1", "cutoff=60"],
    "knockout": [*ALIKE, "layers=2", "masked_images=3", "left_out_images=2", "steps=2", "orders=1"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted_classes(tmp_path_factory.mktemp("shown") / "data", 6, 4)


def told(suite: str, folder: Path, place: Path) -> tuple[dict[str, Finding], Path]:
    """The sections by number, and the folder of the figures."""
    seen = []
    for registers in (0, 2):
        home = "registers" if registers else "patches"
        backbone = Backbone(planted_network(gather=3, registers=registers, home=home))
        backbone.found = "written by hand"
        context = surroundings(folder / str(registers), place)
        path = write_result(context.output, run_suite(suite, backbone, context, *WORDS[suite]), backbone, "w", 1.0)
        json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        seen.append(Seen(f"{registers} registers", read_evaluation(path)))
    found = SUITES[suite].teller()(seen, Album(folder))
    for each in found:
        assert all(len(row) == len(each.head) for row in each.rows), each.number
        for picture in each.pictures:
            assert (folder / picture.png).stat().st_size > 1000
            assert (folder / picture.pdf).is_file()
    return {each.number: each for each in found}, folder


def test_test_time_registers_are_told(data: Path, tmp_path: Path) -> None:
    found, _ = told("test-time-registers", tmp_path, data)
    assert list(found) == ["5"]
    section = found["5"]
    assert "they rise in block 2" in section.seen
    assert "leaves 0 %" in section.seen
    assert "2 registers: no patch is beyond the cutoff" in section.seen
    rows = {row[0]: row for row in section.rows}
    assert rows["0 registers, as it is"][3] == "–"  # it has no register, so that none has a norm
    assert rows["0 registers, register added"][3] != "–"


def test_knock_outs_are_told(data: Path, tmp_path: Path) -> None:
    found, _ = told("knockout", tmp_path, data)
    assert list(found) == ["D2", "D4", "D5", "D6"]
    assert "0 registers: there are none to exchange" in found["D5"].seen
    rows = {row[0]: row[1:] for row in found["D2"].rows}
    assert set(rows["0 registers: CLS reads registers, last block"]) == {"–"}
    assert "–" not in rows["2 registers: CLS reads registers, last block"]
    assert "12 images" in found["D2"].basis


def test_what_few_images_cannot_tell_is_not_said() -> None:
    """Donors named as often with the mean of the registers, which knows none, are named by chance."""
    row = {"receiver": {"value": 79, "high": 90}, "donor": {"value": 16, "low": 5, "high": 30}}
    assert "by chance" in _verdict({**row, "more": {"low": -5, "high": 8}})
    assert "some of it" in _verdict({**row, "more": {"low": 2, "high": 8}})
    assert "does not" in _verdict({**row, "donor": {"low": 0, "high": 3}, "more": {"low": 0, "high": 0}})
