"""Weighted nearest neighbours: how well features separate classes, without training anything."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIMILARITIES = 2**27  # entries of the similarity matrix held at once: 512 MiB


@torch.no_grad()
def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int,
) -> Tensor:
    """Classes of the test features by a vote of their `k` nearest training features.

    Neighbour i votes for its class with weight exp(cosine_i / temperature) (Wu et al. 2018, arXiv 1805.01978, section
    3.4, which DINO and DINOv2 follow). With fewer than k training features all of them vote.

    train_features: (n, D); train_labels: int64 (n,) in [0, num_classes); test_features: (m, D), on the same device.
    Returns int64 (m,). Raises ValueError when there is nothing to compare with.
    """
    if not len(train_features):
        raise ValueError("k-NN has no labelled training features to compare with")
    train = F.normalize(train_features.float(), dim=1)
    k = min(k, len(train))
    predictions = []
    for chunk in test_features.split(max(1, SIMILARITIES // len(train))):
        cosine, nearest = (F.normalize(chunk.float(), dim=1) @ train.T).topk(k, dim=1)
        # Relative to the nearest one, which changes no ratio and cannot overflow.
        weights = ((cosine - cosine[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(chunk), num_classes).scatter_add_(1, train_labels[nearest], weights)
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)
