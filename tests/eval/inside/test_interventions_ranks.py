"""Two processes find with knockout and test-time-registers what one finds."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed import run_ranks
from evaluating import run_suite, surroundings
from planted import planted_network, write_planted_classes

from dinoreg.parallel.mesh import Ranks
from eval.backbone import Backbone
from eval.results import Result

ALIKE = ["zoom=1", "batch=4", "image_size=32", "images=9", "train_images=12", "photos=1"]
SUITES = {
    "test-time-registers": [*ALIKE, "top_k=1", "cutoff=60"],
    "knockout": [*ALIKE, "layers=1", "masked_images=3", "left_out_images=2", "steps=2", "orders=1", "donors=5"],
}


def measured(ranks: Ranks, folder: Path, data: Path) -> dict[str, Result]:
    backbone = Backbone(planted_network(gather=3))
    return {
        name: run_suite(name, backbone, surroundings(folder / name, data, ranks), *words)
        for name, words in SUITES.items()
    }


def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    data = write_planted_classes(tmp_path / "data", 6, 4)
    both = run_ranks(measured, 2, tmp_path / "both", data)
    alone = measured(Ranks.alone(), tmp_path / "alone", data)
    for each in both:
        for name, result in each.items():
            assert result.scores.keys() == alone[name].scores.keys()
            for key, score in result.scores.items():
                assert score.value == pytest.approx(alone[name].scores[key].value, rel=1e-3, abs=1e-3), key
        assert [found["neuron"] for found in each["test-time-registers"].details["neurons"]] == [3]
        rows, expected = (found["knockout"].details["runs"] for found in (each, alone))
        for row, other in zip(rows, expected, strict=True):
            assert row["cosine"]["value"] == pytest.approx(other["cosine"]["value"], abs=1e-4)
