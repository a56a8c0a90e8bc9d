"""Pages and plots: what is text stays text, and what is drawn lies where its numbers say."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinoreg.charts import Bar, Dot, Series, bars, lines, ticks
from dinoreg.pages import Html, image, note, page, row, table, tag, text


def test_content_and_attributes_are_escaped_once() -> None:
    inner = tag("b", "a < b & c", title='say "x"')
    assert inner == '<b title="say &quot;x&quot;">a &lt; b &amp; c</b>'
    assert text(inner, "<i>") == inner + "&lt;i&gt;" and isinstance(text("x"), Html)
    assert "<title>&lt;x&gt;</title>" in page("<x>", inner)


def test_a_cell_that_is_markup_of_a_cell_stays_one() -> None:
    cell = tag("td", "1", class_="heat")
    assert row([cell, "2"], numbers=(1,)) == f'<tr>{cell}<td class="number">2</td></tr>'
    assert table(["a"], [["1"], row(["2"])]).count("<tr>") == 3
    assert note() == ""


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (97.2, 103, [98, 100, 102]), (5, 5, [5]), (0, 125000, [0, 25000, 50000, 75000,
     100000, 125000]), (-0.013, 0.021, [-0.01, 0, 0.01, 0.02])],
)  # fmt: skip
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_higher_values_are_drawn_higher_and_intervals_around_them() -> None:
    dots = [Dot(0, 1.0, 0.5, 1.5), Dot(10, 3.0, 2.5, 3.5), Dot(20, 2.0)]
    drawn = lines([Series("a", dots), Series("b", [Dot(5, 2.0)])], across="step", up="score")
    circles = [tuple(map(float, found)) for found in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    (x1, y1), (x2, y2), (x3, y3), (x4, y4) = circles
    assert x1 < x4 < x2 < x3 and y1 > y3 > y2 and y4 == y3
    whiskers = [tuple(map(float, found)) for found in re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)m", drawn)]
    assert len(whiskers) == 2 and all(low > y > high for (low, high), y in zip(whiskers, (y1, y2), strict=True))
    assert "● " in drawn  # a legend


def test_equal_values_and_a_single_dot_can_be_drawn() -> None:
    assert "nan" not in lines([Series("a", [Dot(3, 0.0)])], across="x", up="y")
    assert "nan" not in lines([Series("a", [Dot(3, 2.0), Dot(4, 2.0)])], across="x", up="y")


def test_bars_end_at_their_values_and_long_labels_are_cut() -> None:
    drawn = bars([Bar("x" * 50, 100.0, "all"), Bar("y", 25.0, "few")])
    widths = [float(found) for found in re.findall(r'width="([\d.]+)" height="12"', drawn)]
    assert widths[3] == pytest.approx(widths[1] / 4, abs=0.1) and "x" * 33 + "…</text>" in drawn


def test_large_pictures_are_made_smaller_and_labels_keep_their_colours(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (900, 2000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    Image.fromarray(noise[:20, :20]).save(tmp_path / "small.png")
    assert "image/jpeg" in image(tmp_path / "large.png") and len(image(tmp_path / "large.png")) < 2_000_000
    assert "image/png" in image(tmp_path / "small.png")
    assert "image/jpeg" in image(tmp_path / "small.png", photo=True)
