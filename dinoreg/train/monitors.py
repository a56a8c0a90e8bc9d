"""Signs of collapse and of artifacts, computed on the device at logging steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class MonitorConfig:
    """What is watched beside the losses."""

    every: int = 100  # steps between feature monitors (RankMe, norms, entropies)
    outlier_norm: float = 0.0  # patch norm called an outlier; 0: mean + 3 std of the batch
    knn_train: str | None = None  # labelled folder or shards for the k-NN's memory
    knn_test: str | None = None  # labelled folder or shards that the k-NN classifies; default: a held-out fifth
    knn_every: int = 0  # steps; 0: never
    knn_k: int = 20
