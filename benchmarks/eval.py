"""What evaluating costs, against well-known libraries that compute the same, side by side in one process.

    python -m benchmarks.eval [--images 20000] [--dim 384] [--classes 100] [--out FILE.json]

k-NN and logistic regression against scikit-learn on made-up features; class tokens of a ViT-S/16 against timm's network
of the same weights; LOST against loops over patches as the paper's pseudo-code reads. Outcomes are compared before they
are timed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.foreign import allow_torchvision
from benchmarks.race import plain, race, show, write
from dinoreg.models.knn import knn_classify
from dinoreg.models.vit import VisionTransformer
from dinoreg.models.weights import load_backbone
from eval.inside.discovery.lost import expand, gram
from eval.logistic import fit_logistic

K, TEMPERATURE = 20, 0.07
GRID = (23, 31)  # of a photo of 500 x 375 pixels in patches of 16


def features(count: int, dim: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clouds around a centre for each class, with labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + 3 * torch.randn(count, dim, generator=generator), labels


def sklearn_knn(known: Tensor, labels: Tensor, asked: Tensor) -> Callable[[], Tensor]:
    """The same vote by scikit-learn."""
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import normalize

    def run() -> Tensor:
        def weigh(distances: Any) -> Any:
            return np.exp((1 - distances) / TEMPERATURE)

        model = KNeighborsClassifier(K, weights=weigh, metric="cosine", algorithm="brute")
        model.fit(normalize(known.numpy()), labels.numpy())
        return torch.from_numpy(model.predict(normalize(asked.numpy())))

    return run


def sklearn_logistic(known: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1e-3, max_iter=200, tol=1e-6).fit(known.numpy(), labels.numpy())
    return torch.from_numpy(model.predict(asked.numpy()))


def slow_lost(patches: Tensor) -> tuple[int, set[int]]:
    """Seed and expansion, patch by patch."""
    rows = patches.tolist()
    products = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in rows] for p in rows]
    degrees = [sum(value > 0 for at, value in enumerate(row) if at != p) for p, row in enumerate(products)]
    order = sorted(range(len(rows)), key=lambda p: degrees[p])
    seed = order[0]
    company = [q for q in order[:100] if products[q][seed] > 0]
    return seed, {q for q in range(len(rows)) if sum(products[s][q] for s in company) > 0}


def demand(same: bool, what: str) -> None:
    """Raises SystemExit where two ways do not agree."""
    if not same:
        raise SystemExit(f"{what}: the two ways do not find the same")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.eval", description="Evaluation beside well-known libraries.")
    parser.add_argument("--images", type=int, default=20000, help="to learn from (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    console, cpu = Console(), torch.device("cpu")
    known, labels = features(args.images, args.dim, args.classes, 1)
    asked, _ = features(args.images // 10, args.dim, args.classes, 2)
    nearest = sklearn_knn(known, labels, asked)

    def ours() -> Tensor:
        return knn_classify(known, labels, asked, k=K, temperature=TEMPERATURE, num_classes=args.classes)

    def regressed() -> Tensor:
        fit = fit_logistic(known, labels, 1e-3, args.classes, max_iter=200, tol=1e-6)
        return fit.predict(asked)

    demand(float((ours() == nearest()).float().mean()) > 0.999, "k-NN")
    demand(float((regressed() == sklearn_logistic(known, labels, asked)).float().mean()) > 0.99, "logistic regression")
    network, theirs = _networks()
    images = torch.randn(8, 3, 224, 224)
    with torch.no_grad():
        apart = (network.forward_features(images).cls - theirs.forward_features(images)[:, 0]).abs().max()
    demand(float(apart) < 1e-3, "class tokens")
    patches = torch.randn(GRID[0] * GRID[1], 64)
    seed, mask = slow_lost(patches)
    found = expand(gram(patches[None]), torch.zeros(1, 1))
    demand(int(found.seeds.flatten()[0]) == seed, "LOST's seed")
    demand(set(found.masks.flatten().nonzero().flatten().tolist()) == mask, "LOST's mask")

    def embed(model: Any) -> Callable[[], Any]:
        @torch.no_grad()
        def run() -> Any:
            return model.forward_features(images)

        return run

    races: dict[str, dict[str, Callable[[], Any]]] = {
        f"k-NN, {len(asked):,} against {len(known):,} of {args.dim}": {"dinoreg": ours, "scikit-learn": nearest},
        f"logistic regression, {len(known):,} of {args.dim}, {args.classes} classes": {
            "dinoreg": regressed, "scikit-learn": lambda: sklearn_logistic(known, labels, asked),
        },
        "class tokens of 8 images, ViT-S/16, fp32": {"dinoreg": embed(network), "timm": embed(theirs)},
        f"LOST on one image of {GRID[0]} x {GRID[1]} patches, {patches.shape[1]} channels": {
            "dinoreg": lambda: expand(gram(patches[None]), torch.zeros(1, 1)), "loops": lambda: slow_lost(patches),
        },
    }  # fmt: skip
    results = {}
    for title, ways in races.items():
        laps = race(ways, cpu, args.rounds)
        show(title, laps, console)
        results[title] = plain(laps)
    write(args.out, {"races": results}, cpu)


def _networks() -> tuple[VisionTransformer, Any]:
    """The same random weights in both, by way of a file."""
    allow_torchvision()
    import timm

    theirs = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vit_small_patch16_224.pth"
        torch.save(theirs.state_dict(), path)
        return load_backbone(path).eval(), theirs


if __name__ == "__main__":
    main()
