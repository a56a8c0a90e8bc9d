"""The whole experiment on networks whose answers are known, told on a page, by one process and by two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from decoupled import random_network, reading, write
from evaluating import run_suite, surroundings, write_classes, write_data

from dinoreg.config import ConfigError
from eval.backbone import open_backbone
from eval.inside.decoupling import derived, parts, photos
from eval.inside.decoupling.shown import findings
from eval.inside.finding import Album, Picture, Seen
from eval.report.read import read_evaluation
from eval.results import Result, write_result

WORDS = ["photos=3", "batch=8", "draws=2", "zoom=1"]


def measured(tmp_path: Path, data: Path, weights: Path, *words: str) -> Result:
    return run_suite("decoupling", open_backbone(weights), surroundings(tmp_path, data), *WORDS, *words)


def seen(tmp_path: Path, folder: Path, name: str, *words: str) -> Seen:
    """Measured, written and read again."""
    weights = folder / f"{name}.safetensors"
    result = measured(tmp_path, folder / "data", weights, *words)
    place = write_result(tmp_path / name, result, open_backbone(weights), weights, 1.0)
    assert "NaN" not in place.read_text() and json.loads(place.read_text())["details"]["images"] == 48
    return Seen(name, read_evaluation(place))


class Sketches(Album):
    """Draws for the screen alone, and coarsely, in a third of the time; the page's test draws all."""

    def save(self, figure: Any, name: str, caption: str) -> Picture:
        (self.folder / "figures").mkdir(parents=True, exist_ok=True)
        picture = Picture(f"figures/{name}.png", f"figures/{name}.pdf", caption)
        figure.savefig(self.folder / picture.png, dpi=60)
        return picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and networks that read everything, registers only, and without registers."""
    folder = tmp_path_factory.mktemp("decoupling")
    write_data(folder / "data", 6, 12)
    write(folder / "all.safetensors", random_network(num_registers=2))
    write(folder / "registers.safetensors", reading("registers"))
    write(folder / "none.safetensors", random_network(num_registers=0))
    return folder


def details(result: Result) -> dict[str, Any]:
    return result.details


def test_a_network_whose_cls_reads_only_registers(folder: Path, tmp_path: Path) -> None:
    result = measured(tmp_path, folder / "data", folder / "registers.safetensors")
    assert next(iter(result.scores)) == "attention_patches"
    assert result.scores["attention_patches"].value == pytest.approx(0, abs=1e-6)
    assert result.scores["attention_registers"].value == pytest.approx(100, abs=1e-4)
    assert result.scores["cosine_registers"].value == pytest.approx(1, abs=1e-6)
    assert result.scores["cka_registers"].value == pytest.approx(1, abs=1e-9)
    assert details(result)["clutter"]["registers"]["mean"]["value"] == pytest.approx(0, abs=1e-6)
    shots = details(result)["one_shot"]
    for top in (1, 5):
        assert shots[f"branch/registers/top{top}"]["value"] == shots[f"branch/whole/top{top}"]["value"]


def test_a_network_without_registers_says_nothing_of_them(folder: Path, tmp_path: Path) -> None:
    result = measured(tmp_path, folder / "data", folder / "none.safetensors")
    told = details(result)
    assert not any("registers" in name for name in result.scores)
    assert told["longest"] is None and "registers" not in told["clutter"]
    assert told["layers"]["share_registers"] == {"mean": [None] * 3, "quantiles": [None] * 3, "defined": [0] * 3}
    assert not any("registers" in name for name in told["cka"]["last"])
    assert not any("registers" in name for name in told["one_shot"])
    assert told["rebuilt"] is not None and "registers" not in told["rebuilt"]["unique"]


def test_figures_are_those_of_the_tokens_all_held_at_once(folder: Path, tmp_path: Path) -> None:
    """The last block by hand, in fp64, with n x n kernels."""
    weights = folder / "all.safetensors"
    result = measured(tmp_path, folder / "data", weights)
    told = details(result)["cka"]
    patches, whole = parts_by_hand(folder, tmp_path, weights)
    centre = torch.eye(len(whole)).double() - 1 / len(whole)
    k, l = (centre @ each @ each.T @ centre for each in (patches, whole))
    assert told["last"]["patches"]["plain"]["value"] == pytest.approx(
        float((k * l).sum() / (k.norm() * l.norm())), rel=1e-4
    )
    cosines = torch.nn.functional.cosine_similarity(patches, whole)
    assert result.scores["cosine_patches"].value == pytest.approx(float(cosines.mean()), rel=1e-4)
    assert told["blocks"] == [0, 1, 2]
    low, high = told["last"]["patches"]["plain"]["interval"]
    assert low < told["last"]["patches"]["plain"]["value"] < high


def parts_by_hand(folder: Path, tmp_path: Path, weights: Path) -> tuple[torch.Tensor, torch.Tensor]:
    from eval.inside.look import Look, LookConfig

    backbone = open_backbone(weights)
    backbone.to("cpu", torch.float64)
    look = Look(backbone, LookConfig(zoom=1), surroundings(tmp_path, folder / "data"))
    patches, whole = [], []
    for images in look.through(lambda batch: batch.images, "images"):
        q, k, v = backbone.qkv(images.double(), -1)
        weights_ = (q[:, :, :1] @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        block: Any = backbone.model.blocks[-1]
        for kept, into in ((slice(3, None), patches), (slice(None), whole)):
            read = (weights_[..., kept] @ v[:, :, kept])[:, :, 0].flatten(1)
            into.append(block.ls1(read @ block.attn.proj.weight.T))
    return torch.cat(patches), torch.cat(whole)


def test_images_without_labels_leave_out_what_needs_them(folder: Path, tmp_path: Path) -> None:
    write_classes(tmp_path / "plain", 8)
    result = measured(tmp_path, tmp_path / "plain", folder / "all.safetensors", "layers=[0]", "renormalise=true")
    assert details(result)["one_shot"] is None
    assert any("without labels" in note for note in result.notes)
    assert details(result)["cka"]["blocks"] == [0, 2]
    assert details(result)["rebuilt"]["images"] == 32


def test_an_unknown_layer_is_told_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 blocks"):
        measured(tmp_path, folder / "data", folder / "all.safetensors", "layers=[3]")


def test_fewer_rows_for_the_regressions_are_drawn_evenly(folder: Path, tmp_path: Path) -> None:
    result = measured(tmp_path, folder / "data", folder / "all.safetensors", "ridge_images=24")
    assert details(result)["images"] == 48 and details(result)["rebuilt"]["images"] == 24


def test_figures_that_show_fewer_images_say_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.suites.decoupling.KEPT", 20)
    network = [seen(tmp_path, folder, "all", "photos=0")]
    assert network[0].arrays["lengths"].shape == (16, 2)
    monkeypatch.setattr("eval.inside.decoupling.parts.DOTS", 5)
    for tell in (parts.tell_attention, parts.tell_longest, derived.tell_clutter):
        finding = tell(network, Sketches(tmp_path))
        assert "48 images" in finding.basis
        assert "all: figures show 16 images of the 48, evenly spaced." in finding.how or "at most 5" in finding.how[-1]


def test_one_network_or_three_are_told_side_by_side(folder: Path, tmp_path: Path) -> None:
    networks = [seen(tmp_path, folder, name) for name in ("all", "registers", "none")]
    album = Sketches(tmp_path / "page")
    found = findings(networks, album)
    assert [each.number for each in found] == [f"L{at}" for at in range(1, 9)] + ["D1", "D3", "D7"]
    for finding in found:
        assert all((tmp_path / "page" / each.png).stat().st_size > 5000 for each in finding.pictures)
        assert all(len(row) == len(finding.head) for row in finding.rows)
        assert "nan" not in f"{finding.seen} {finding.rows}".lower()
        assert "48" in finding.basis
    assert "48 test images, 4 classes with one training image each" in found[3].basis
    alone = [tell(networks[2:], album) for tell in (parts.tell_longest, parts.tell_cka, derived.tell_norms)]
    assert not alone[0].pictures and alone[0].rows[0][1:] == ["–"] * 8
    assert ["none", "registers", *["–"] * 6] in alone[1].rows
    assert alone[2].rows[0][3] == "–"


def test_photos_are_laid_beside_each_other_only_where_they_are_the_same(folder: Path, tmp_path: Path) -> None:
    networks = [seen(tmp_path, folder, "all", "photos=2"), seen(tmp_path, folder, "none", "photos=3")]
    networks += [seen(tmp_path, folder, "registers", "photos=0")]
    found = photos.tell_photos(networks, Sketches(tmp_path / "page"))
    assert found is not None
    assert [picture.png for picture in found.pictures] == ["figures/L5_photos.png", "figures/L5_photos_2.png"]
    assert found.basis.startswith("2 or 3 photos; ") and "registers: no photos." in found.seen
    assert photos.tell_photos(networks[2:], Album(tmp_path)) is None


def test_classes_without_a_training_image_are_told(folder: Path, tmp_path: Path) -> None:
    result = measured(tmp_path, folder / "data", folder / "none.safetensors", "train_images=3", "photos=0")
    assert result.notes[0].startswith("1 of 4 classes have no training image")
