"""Two processes find with decoupling and discovery what one finds; started once, for that takes longest."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from decoupled import random_network
from distributed import run_ranks
from evaluating import run_suite, surroundings, write_data
from objects import object_network, write_objects

from dinoreg.parallel.mesh import Ranks
from eval.backbone import Backbone
from eval.results import Result

SIZES = ((64, 48), (48, 64), (63, 46))  # the last one is padded
DECOUPLING = ["photos=3", "batch=8", "draws=2", "zoom=1", "layers=[0,1]"]
# One image in ten may be bad.
DISCOVERY = ["image_size=-1", "tune_share=0.5", "max_bad_share=0.1", "batch=2", "photos=0", "blocks=[-1,-2]"]


def told(result: Result) -> tuple[Any, ...]:
    """All that is found, without how long it took and what the main process alone has."""
    details = {name: each for name, each in result.details.items() if name not in ("speed", "photos")}
    scores = {name: score.plain() for name, score in result.scores.items()}
    return scores, details, result.data, result.notes, {name: each.tolist() for name, each in result.arrays.items()}


def measured(ranks: Ranks, folder: Path, data: Path) -> dict[str, tuple[Any, ...]]:
    folder = folder / f"rank{ranks.rank}"
    reading, finding = Backbone(random_network(num_registers=2)), Backbone(object_network(offset=20.0))
    classes, boxes = (surroundings(folder / name, data / name, ranks) for name in ("classes", "boxes"))
    return {
        "decoupling": told(run_suite("decoupling", reading, classes, *DECOUPLING)),
        "discovery": told(run_suite("discovery", finding, boxes, *DISCOVERY)),
    }


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_data(data / "classes", 6, 7)
    write_objects(data / "boxes", 11, sizes=SIZES)
    (data / "boxes" / "JPEGImages" / "000004.jpg").write_bytes(b"no image")
    both = run_ranks(measured, 2, tmp_path, data)
    alone = measured(Ranks.alone(), tmp_path, data)
    for each in both:
        assert_alike(each["decoupling"], alone["decoupling"])
        assert each["discovery"] == alone["discovery"]


def assert_alike(one: Any, other: Any) -> None:
    """Nested results, to the rounding of sums."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_alike(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for each in zip(one, other, strict=True):
            assert_alike(*each)
    elif isinstance(one, float):
        assert math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6)
    else:
        assert one == other
