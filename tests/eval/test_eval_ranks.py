"""Two processes find what one finds, each doing half of the work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from distributed import run_ranks
from evaluating import Counting, run_suite, surroundings, write_data, write_weights

import eval.features
from dinoreg.parallel.mesh import Ranks

SUITES = {
    "knn": ["precision=fp32"],
    "logreg": ["precision=fp32", "c_steps=3"],
    "imagenet-linear": ["precision=fp32", "steps=6", "batch_size=16", "augment=true", "layers=[1,2]"],
}


def scores(ranks: Ranks, folder: Path, data: Path, weights: Path) -> tuple[dict[str, object], list[int]]:
    """Figures and details of every suite, and the images that passed through the network of this process for each."""
    eval.features.CHUNK = 16
    found, passed = {}, []
    for name, words in SUITES.items():
        backbone = Counting(weights)
        result = run_suite(name, backbone, surroundings(folder, data, ranks), *words)
        for trial in result.details.get("grid", []):
            trial.pop("iterations", None)  # fewer where one process goes through all values of C
        found[name] = (result.scores, result.details, result.data, result.notes)
        passed.append(backbone.images)
    return found, passed


def test_two_processes_share_the_work_and_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.features.CHUNK", 16)  # as the processes set it for themselves
    data, weights = write_data(tmp_path / "data", 16, 8, wrong=2), write_weights(tmp_path / "small.safetensors")
    (first, one), (second, other) = run_ranks(scores, 2, tmp_path / "together", data, weights)
    alone, all_of_it = scores(Ranks.alone(), tmp_path / "alone", data, weights)
    assert first == second == alone
    # 64 training and 32 test images; knn and logreg share them; the linear suite sees 96 in crops, and new blocks.
    assert all_of_it == [96, 0, 96 + 6 + 32]
    np.testing.assert_array_equal(np.add(one, other), all_of_it)
    assert min(one[0], other[0]) == 48
