"""`knn` against a slow computation, with known answers, and on real images."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from evaluating import Counting, Planted, run_suite, surroundings, write_data, write_weights

from dinoreg.config import ConfigError, load
from eval.features import extract
from eval.forward import cls_of
from eval.images import View, open_parts
from eval.suite import Place
from eval.suites.knn import KnnConfig


def slow_knn(known: torch.Tensor, labels: list[int], asked: torch.Tensor, k: int, temperature: float) -> list[int]:
    """By loops, in fp64."""
    known = known.double() / known.double().norm(dim=1, keepdim=True)
    found = []
    for query in asked.double():
        cosines = (known @ (query / query.norm())).tolist()
        nearest = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]
        votes: dict[int, float] = {}
        for i in nearest:
            votes[labels[i]] = votes.get(labels[i], 0.0) + math.exp(cosines[i] / temperature)
        found.append(max(votes, key=lambda label: votes[label]))
    return found


def test_scores_are_those_of_a_slow_computation(tmp_path: Path) -> None:
    data, weights = write_data(tmp_path / "data", wrong=3), write_weights(tmp_path / "small.safetensors")
    backbone, context = Counting(weights), surroundings(tmp_path, data)
    result = run_suite("knn", backbone, context, "k=[1,5,1000]", "main_k=5", "temperature=0.2", "precision=fp32")

    parts, view = open_parts(Place(data)), View(32, 37)
    values = [
        extract(backbone, part, view, [cls_of(1)], context, precision="fp32").tensor([cls_of(1)]) for part in parts
    ]
    train, test = parts
    for k in (1, 5, 1000):
        found = slow_knn(values[0], train.labels.tolist(), values[1], k, 0.2)
        right = [one == other for one, other in zip(found, test.labels.tolist(), strict=True)]
        assert result.scores[f"top1_k{k}"].value == pytest.approx(100 * sum(right) / len(right))
    assert result.scores["top1"] == result.scores["top1_k5"]
    assert any("k=1000 means all of them" in note for note in result.notes)


def test_a_known_answer_is_found(tmp_path: Path) -> None:
    """A quarter of the test images show another class's colour, and the network sees nothing but colours."""
    data, weights = write_data(tmp_path / "data", 30, 20, wrong=5), write_weights(tmp_path / "small.safetensors")
    result = run_suite("knn", Planted(weights, "cls-1"), surroundings(tmp_path, data))
    assert result.scores["top1"].value == 75
    assert result.scores["top1"].low < 70 < 80 < result.scores["top1"].high
    assert result.details["by_class"] == [75] * 4
    blind = run_suite("knn", Planted(weights, "cls-2"), surroundings(tmp_path, data))
    assert blind.scores["top1"].value < 60


def test_what_was_done_is_told(tmp_path: Path) -> None:
    data, weights = write_data(tmp_path / "data"), write_weights(tmp_path / "small.safetensors")
    result = run_suite("knn", Counting(weights), surroundings(tmp_path, data), "max_train=50")
    assert result.protocol["view"] == "short side to 37, bicubic; central 32 x 32"
    assert result.protocol["k"] == [10, 20, 100, 200]
    assert (result.data["train"], result.data["test"], result.data["classes"]) == (50, 40, 4)
    assert "50 of the 120 images of" in " ".join(result.notes)
    assert "published figures are for 224" in " ".join(result.notes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["main_k=7"], r"main_k: must be one of k=\[10, 20, 100, 200\]"),
        (["k=[0]"], "k: numbers of neighbours"),
        (["temperature=0"], "temperature: must be positive"),
        (["zoom=0.5"], "zoom: must be at least 1"),
        (["precision=fp8"], "precision"),
        (["max_bad_share=2"], "max_bad_share"),
    ],
)
def test_options_that_make_no_sense_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(KnnConfig, None, words)


def test_an_image_size_that_patches_do_not_tile_is_refused(tmp_path: Path) -> None:
    data, weights = write_data(tmp_path / "data", 2, 1), write_weights(tmp_path / "small.safetensors")
    with pytest.raises(ConfigError, match="image_size: 30 pixels are not tiled by patches of 8"):
        run_suite("knn", Counting(weights), surroundings(tmp_path, data), "image_size=30")
