"""Weighted k-NN against loops."""

from __future__ import annotations

import math

import pytest
import torch

from dinoreg.models import knn
from dinoreg.models.knn import knn_classify


def slow(train: torch.Tensor, labels: list[int], test: torch.Tensor, k: int, temperature: float) -> list[int]:
    out = []
    for x in test.double():
        cosines = [float(x @ t / (x.norm() * t.norm())) for t in train.double()]
        votes: dict[int, float] = {}
        for i in sorted(range(len(labels)), key=lambda i: -cosines[i])[:k]:
            votes[labels[i]] = votes.get(labels[i], 0.0) + math.exp(cosines[i] / temperature)
        out.append(max(votes, key=lambda c: votes[c]))
    return out


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.5), (500, 0.07)])
def test_against_loops(monkeypatch: pytest.MonkeyPatch, k: int, temperature: float) -> None:
    monkeypatch.setattr(knn, "SIMILARITIES", 700)  # several chunks
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (60,), generator=generator)
    train = torch.randn(60, 8, generator=generator) + labels[:, None] * 0.2
    test = torch.randn(45, 8, generator=generator)
    expected = slow(train, labels.tolist(), test, k, temperature)
    found = knn_classify(train, labels, test, k=k, temperature=temperature, num_classes=4)
    assert found.tolist() == expected and len(set(expected)) > 1


def test_length_of_features_does_not_matter_and_nothing_overflows() -> None:
    train = torch.tensor([[1000.0, 0.0], [0.0, 0.001]])
    found = knn_classify(
        train, torch.tensor([0, 1]), torch.tensor([[0.1, 0.2], [3.0, 1.0]]), k=2, temperature=1e-3, num_classes=3
    )
    assert found.tolist() == [1, 0]


def test_nothing_to_compare_with() -> None:
    with pytest.raises(ValueError, match="no labelled training features"):
        knn_classify(torch.empty(0, 3), torch.empty(0, dtype=torch.long), torch.ones(1, 3), num_classes=2)
