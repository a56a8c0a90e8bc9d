"""Results of suites as they lie on the disk, without the measuring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

IMAGENET = {"name": "imagenet1k", "hash": "aa-bb", "train": 1_281_167, "test": 50_000, "classes": 1000, "bad": {}}
KNN = {"zoom": 256 / 224, "k": [10, 20, 100, 200], "main_k": 20, "temperature": 0.07, "image_size": 224,
       "precision": "bf16", "max_train": 0, "max_test": 0, "view": "central square",
       "preset": "published"}  # fmt: skip


def write_knn(folder: Path, right: NDArray[np.bool_] | float, **changes: Any) -> Path:
    """A result of the suite `knn`. right: whether each image was, or the accuracy alone, without outcomes."""
    folder.mkdir(parents=True)
    accuracy = 100 * float(np.mean(right))
    data = {**IMAGENET, "test": len(right), "train": 100} if isinstance(right, np.ndarray) else IMAGENET
    if isinstance(right, np.ndarray):
        np.savez_compressed(folder / "outcomes.npz", top1=100.0 * right.astype(np.float32))
    content = {
        "suite": "knn",
        "weights": f"{folder.name}.safetensors",
        "digest": f"digest of {folder.name}",
        "found": "dinoreg: 12 blocks of width 384, 4 registers, positions resampled with antialiasing, offset 0",
        "architecture": {"embed_dim": 384, "depth": 12, "patch_size": 14, "registers": 4, "image_size": 224},
        "step": None,
        "scores": {"top1": {"value": accuracy, "low": accuracy - 1, "high": accuracy + 1}},
        "protocol": KNN,
        "data": data,
        "notes": [],
        "details": {},
        "files": {},
        "seconds": 12.0,
        "finished": "2026-01-01T00:00:00+00:00",
        "commit": "0123abc",
        "versions": {"torch": "2.13.0"},
    }
    return write_content(folder, {**content, **changes})


def write_content(folder: Path, content: dict[str, Any]) -> Path:
    """The file results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def read_content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def write_run(run: Path, accuracies: dict[int, float]) -> Path:
    """A run directory whose steps were evaluated."""
    run.mkdir()
    (run / "config.yaml").write_text("{}")
    for step, accuracy in accuracies.items():
        folder = run / "eval" / "knn" / f"step_{step:08d}"
        write_knn(folder, accuracy, step=step, digest=f"{run.name} {step}")
    return run
