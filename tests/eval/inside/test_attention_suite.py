"""`dinoreg-eval attention` on networks whose attention was written by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_ranks
from evaluating import run_suite, surroundings
from numpy.typing import NDArray
from planted import DIM, GRID, LOUD, mark, planted_network, write_planted
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.models.layers import Attention
from dinoreg.models.vit import VisionTransformer
from dinoreg.parallel.mesh import Ranks
from eval.backbone import Backbone
from eval.inside.attention.shown import findings, how_alike, verdict
from eval.inside.finding import Album, Seen
from eval.report.read import read_evaluation
from eval.results import Result, Score, write_result
from eval.suites.attention import choose_registers


def looking(gains: tuple[float, float], registers: int = 0) -> VisionTransformer:
    """A planted network in whose last block every token looks at outliers: with such a gain in each of the two heads.

    With a gain of 0 a head looks at all tokens alike.
    """
    model = planted_network(registers=registers)
    attention = model.blocks[-1].attn
    assert isinstance(attention, Attention) and attention.qkv.bias is not None
    with torch.no_grad():
        attention.qkv.weight[: 2 * DIM] = 0
        attention.qkv.bias[: 2 * DIM] = 0
        for head, gain in enumerate(gains):
            at = head * DIM // 2
            attention.qkv.bias[at] = 1.0
            attention.qkv.weight[DIM + at, LOUD] = gain * torch.tensor([0.8, -0.6])
    model.found = "written by hand"
    return model


def measure(folder: Path, gains: tuple[float, float], registers: int, marked: NDArray[np.bool_], *words: str) -> Result:
    data = folder / "photos"
    if not data.exists():
        write_planted(data, marked)
    backbone = Backbone(looking(gains, registers), f"planted{registers}")
    return run_suite("attention", backbone, surroundings(folder, data), "zoom=1", f"images={len(marked)}", *words)


@pytest.fixture(scope="module")
def marked() -> NDArray[np.bool_]:
    return mark(20, 0.06)


def test_attention_on_planted_outliers_is_found_head_by_head(tmp_path: Path, marked: NDArray[np.bool_]) -> None:
    result = measure(tmp_path, (40.0, 0.0), 2, marked)
    details, share = result.details, marked.mean()
    assert details["outliers"]["tokens"] == marked.sum() and details["outliers"]["share"] == pytest.approx(share)
    assert details["outliers"]["images"] == marked.any((1, 2)).sum()
    there = marked.any((1, 2)).mean()  # images without an outlier have none to look at
    first, second = details["heads"]
    assert first["outlier_mass"] == pytest.approx(there, abs=1e-3)
    assert second["outlier_mass"] == pytest.approx(share, abs=1e-5) and second["peak"] == pytest.approx(1, abs=1e-4)
    assert second["entropy_share"] == pytest.approx(1) and first["entropy_share"] < 0.5
    assert second["on_patches"] == pytest.approx(64 / 67)
    # All tokens ask alike, so all maps are the same.
    assert result.scores["cls_registers_cosine"].value == pytest.approx(1)
    assert result.scores["registers_divergence"].value == pytest.approx(0, abs=1e-6)
    excess = result.scores["cls_outlier_excess"]
    assert excess.low <= excess.value <= excess.high and excess.value > 5
    framed = result.arrays["photo_outliers"]
    assert framed.shape == (6, 2 * GRID, 2 * GRID) and result.arrays["photo_maps"].shape == (6, 3, 2 * GRID, 2 * GRID)


def test_even_attention_is_spread_over_all_patches(tmp_path: Path, marked: NDArray[np.bool_]) -> None:
    result = measure(tmp_path, (0.0, 0.0), 0, marked)
    assert result.scores["cls_entropy"].value == pytest.approx(100)
    assert result.scores["cls_peak"].value == pytest.approx(1, abs=1e-5)
    assert result.scores["cls_outlier_excess"].value == pytest.approx(1, abs=1e-5)
    cls, patch = result.details["tokens"]
    assert cls["entropy"] == pytest.approx(math.log(64)) and cls["on_patches"] == pytest.approx(64 / 65)
    assert (cls["row"], cls["border"], cls["reach"]) == pytest.approx((0.5, 1, 1))
    assert patch["name"] == "central patch" and not {"registers_cosine", "cls_registers_cosine"} & set(result.scores)
    np.testing.assert_allclose(result.arrays["average"], 1 / 65, rtol=1e-5)


def test_without_outliers_nothing_is_said_to_be_spent_on_them(tmp_path: Path) -> None:
    result = measure(tmp_path, (40.0, 0.0), 1, np.zeros((6, GRID, GRID), dtype=bool))
    assert result.details["cutoff"]["value"] is None and result.details["tokens"][0]["outlier_mass"] is None
    assert not [name for name in result.scores if "outlier" in name]
    assert "registers_cosine" not in result.scores  # there is one register
    assert "cls_registers_cosine" in result.scores


def test_maps_have_the_resolution_asked_for(tmp_path: Path, marked: NDArray[np.bool_]) -> None:
    result = measure(tmp_path, (1.0, 0.0), 0, marked, "map_size=48", "photos=2", "layer=0", "outlier_layer=1")
    assert result.arrays["photo_maps"].shape == (2, 1, 12, 12) and result.arrays["photos"].shape == (2, 3, 48, 48)
    assert result.details["layer"] == 0 and result.details["cutoff"]["layer"] == 1
    with pytest.raises(ConfigError, match=r"map_size: 50 pixels are not tiled by patches of 4"):
        measure(tmp_path, (1.0, 0.0), 0, marked, "map_size=50")
    with pytest.raises(ConfigError, match="outlier_layer"):
        measure(tmp_path, (1.0, 0.0), 0, marked, "outlier_layer=4")


def test_registers_whose_maps_are_drawn() -> None:
    assert choose_registers(4, []) == [0, 1, 2, 3] and choose_registers(16, []) == [0, 6, 8, 12]
    assert choose_registers(8, []) == [0, 2, 4, 6] and choose_registers(8, [7, 1]) == [7, 1]
    assert choose_registers(0, []) == choose_registers(0, [7]) == []
    with pytest.raises(ConfigError, match="the network has 2 registers, counted from 0: none is 2"):
        choose_registers(2, [2])


def seen(folder: Path, result: Result, registers: int, name: str) -> Seen:
    backbone = Backbone(looking((0.0, 0.0), registers), name)
    return Seen(name, read_evaluation(write_result(folder / name, result, backbone, name, 0.0)))


def test_the_page_tells_what_is_seen(tmp_path: Path, marked: NDArray[np.bool_]) -> None:
    gains = ((40.0, 0.0), 0), ((0.0, 0.0), 3)
    plain, clean = (measure(tmp_path, *each, marked, "photos=2") for each in gains)
    both = [seen(tmp_path, plain, 0, "plain"), seen(tmp_path, clean, 3, "clean")]
    cls, registers, average = findings(both, Album(tmp_path / "page"))
    assert [each.number for each in (cls, registers, average)] == ["1.10", "1.10.1", "1.10.2"]
    assert "they are artifacts of the map" in cls.seen and "clean: registers look at nearly the same" in registers.seen
    assert "20 images of 64 patches (1,280 in all)" in cls.basis and len(cls.rows) == 2
    for each in (cls, registers, average):
        assert all((tmp_path / "page" / picture.png).is_file() for picture in each.pictures)
        assert all(len(row) == len(each.head) for row in each.rows)


def test_a_page_without_photos(tmp_path: Path, marked: NDArray[np.bool_]) -> None:
    result = measure(tmp_path, (0.0, 0.0), 0, marked, "photos=0")
    cls, average = findings([seen(tmp_path, result, 0, "bare")], Album(tmp_path / "page"))
    assert not cls.pictures and average.number == "1.10.2" and len(average.pictures) == 1


def test_networks_that_were_shown_other_photos_are_not_laid_beside_the_first_one_s(
    tmp_path: Path, marked: NDArray[np.bool_]
) -> None:
    many, few = (measure(tmp_path, (0.0, 0.0), 0, marked, f"photos={count}") for count in (3, 2))
    three = [seen(tmp_path, many, 0, "a"), seen(tmp_path, few, 0, "b"), seen(tmp_path, many, 0, "c")]
    cls, _ = findings(three, Album(tmp_path / "page"))
    assert [Path(each.png).stem for each in cls.pictures[:2]] == ["attention_cls", "attention_cls_1"]
    assert len(cls.pictures) == 2 + 3  # the heads of each


@pytest.mark.parametrize(
    ("average", "least", "said"),
    [(0.95, 0.93, "nearly the same"), (0.95, 0.4, "some do not"), (0.8, 0.7, "partly"), (0.3, 0.1, "different")],
)
def test_registers_are_called_as_different_as_they_are(average: float, least: float, said: str) -> None:
    assert said in how_alike(average, least)


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (1.0, 1 + 1e-8, 1 + 2e-8, "as much as others"),
        (1.5, 1.2, 1.8, "a little more than others"),
        (30.0, 20.0, 40.0, "they are artifacts of the map"),
        (1200.0, 0.9, 2345.0, "with an interval of 0.9 to 2,300 times, it cannot be told"),
    ],
)
def test_attention_on_outliers_is_called_as_much_as_it_is(value: float, low: float, high: float, said: str) -> None:
    assert verdict(Score(value, low, high)).startswith(said)


def shares(ranks: Ranks, folder: Path) -> tuple[dict[str, Tensor | float], dict[str, Tensor]]:
    """Scores and averages, as one of several processes finds them."""
    backbone, where = Backbone(looking((40.0, 1.0), 2)), surroundings(folder, folder / "photos", ranks)
    words = ["zoom=1", "batch=4", "cutoff=valley", "photos=2"]
    found = {name: run_suite(name, backbone, where, *words[: 2 if name == "features" else 4], "photos=2")
             for name in ("attention", "features")}  # fmt: skip
    scores = {f"{name}.{key}": score.value for name, result in found.items() for key, score in result.scores.items()}
    arrays = {"average": found["attention"].arrays["average"], "spectrum": found["features"].arrays["spectrum"]}
    return scores, {name: torch.as_tensor(value) for name, value in arrays.items()}


def test_two_processes_find_what_one_finds(tmp_path: Path, marked: NDArray[np.bool_]) -> None:
    write_planted(tmp_path / "photos", marked[:11])
    (first, maps), (second, _) = run_ranks(shares, 2, tmp_path)
    alone, expected = shares(Ranks.alone(), tmp_path)
    assert first == second == pytest.approx(alone, rel=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(maps[name], value, rtol=1e-5, atol=1e-9)
