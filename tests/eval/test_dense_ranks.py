"""Two processes learn and find what one does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_scenes import Seeing, write_depths, write_masks
from distributed import run_ranks
from evaluating import run_suite, surroundings
from torch import nn

from dinoreg.parallel.mesh import Ranks
from eval.dense.frame import Frame, Maps
from eval.dense.heads import MaskHead
from eval.dense.samples import Batch
from eval.dense.training import Schedule, Training
from eval.suites.segmentation import Loss

SUITES = {
    "maps": ("ade20k-linear", "patches=6", "every=2"),
    "crops": (
        "ade20k-linear", "augment=true", "patches=0", "every=1", "short_side=45", "crop=40", "whole=false", "stride=25",
    ),
    "depths": ("nyud-linear", "patches=6", "every=2"),
}  # fmt: skip


class Fixed:
    """Random maps of two sizes, of which each rank gets its half."""

    def __init__(self, ranks: Ranks, steps: int) -> None:
        self.ranks, self.steps = ranks, steps

    def batches(self, start: int) -> Iterator[Batch]:
        for step in range(start, self.steps):
            generator = torch.Generator().manual_seed(step)
            batch = []
            for frame in (Frame(20, 24, 8), Frame(16, 30, 8)):
                rows, columns = frame.grid
                tokens = torch.randn(4, 2, 1 + rows * columns, 5, generator=generator)
                truth = torch.randint(-1, 3, (4, frame.height, frame.width), generator=generator)
                share = slice(self.ranks.rank * 4 // self.ranks.world, (self.ranks.rank + 1) * 4 // self.ranks.world)
                batch.append((Maps(tokens[share], frame), truth[share]))
            yield batch


def learn(ranks: Ranks, folder: str) -> dict[str, torch.Tensor]:
    head = MaskHead(5, 2, 3, ranks, seed=0)
    schedule = Schedule(20, 1e-2, 1e-4, 5, 1e-3, "linear", 35.0, 100)
    context = surroundings(Path(folder), folder, ranks)
    Training(nn.ModuleDict({"head": head}), schedule, context, "fixed").run(Fixed(ranks, 20), Loss(1))
    return head.state_dict()


def measure(ranks: Ranks, data: dict[str, str], folder: str) -> dict[str, Any]:
    """In a process of its own."""
    Path(folder).mkdir(exist_ok=True)
    found: dict[str, Any] = {"weights": learn(ranks, folder)}
    for name, (suite, *words) in SUITES.items():
        context = surroundings(Path(folder) / name, data[suite], ranks)
        words += ["steps=15", "batch_size=4", "rate=1e-2", "pictures=2"]
        result = run_suite(suite, Seeing(), context, *words)
        found[name] = {score: result.scores[score].value for score in result.scores}
        found[name]["pictures"] = len(result.details["pictures"])
    return found


@pytest.fixture(scope="module")
def everyone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one finds, and then each of two."""
    folder = tmp_path_factory.mktemp("ranks")
    data = {
        "ade20k-linear": str(write_masks(folder / "masks")),
        "nyud-linear": str(write_depths(folder / "depths")),
    }  # fmt: skip
    return [measure(Ranks.alone(), data, str(folder / "one")), *run_ranks(measure, 2, data, str(folder / "two"))]


def test_heads_become_the_same(everyone: list[dict[str, Any]]) -> None:
    alone, *both = [one["weights"] for one in everyone]
    for found in both:
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", list(SUITES))
def test_scores_are_the_same(everyone: list[dict[str, Any]], name: str) -> None:
    alone, *both = [one[name] for one in everyone]
    assert alone["pictures"] == 2
    for found in both:
        # A pixel of these masks is 0.01 %, and may change sides by the last bit of a sum.
        assert found == pytest.approx(alone, abs=1e-2 if name != "depths" else 1e-5)
