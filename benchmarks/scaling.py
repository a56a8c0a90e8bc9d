"""How a recipe would scale over GPUs that are not there: what is sent, what is waited for, and which sharding wins.

    python -m benchmarks.scaling [RECIPE] [key=value ...] [--gpu H200] [--images 32] [--utilisation 0.35] [--check]

Weak scaling: as many images on each GPU everywhere. Volumes come from the real modules, wrapped on the meta device for
each number of ranks (dinoreg.train.layout), and are checked against what two and four real processes send
(--check, on this machine, with gloo). Times come from a model of links that stands in dinoreg.train.cluster; the only
measured figure that goes into it is `--utilisation`, the share of its peak at which a GPU computes a step, as
benchmarks.step says it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.machine import describe_machine
from benchmarks.volumes import check_volumes
from dinoreg.config import load
from dinoreg.parallel.mesh import Ranks
from dinoreg.train.cluster import ClusterConfig, collectives, step_time
from dinoreg.train.layout import MODES, Layout, lay_out_first
from dinoreg.train.plan import estimate_memory
from dinoreg.train.prediction import CONTEXT
from dinoreg.train.recipe import RunConfig
from dinoreg.train.scale import assumptions

WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
SHARES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # images on a GPU
GIB = 2**30
WIDTH = 140  # characters that the table needs


@dataclass(frozen=True)
class Point:
    """A sharding mode on so many GPUs. Seconds; bytes a GPU and step; efficiency against one GPU alone."""

    mode: str
    world: int
    images: int  # on each GPU
    gathered: float
    reduced: float
    across_nodes: float
    calls: int
    computing: float
    exposed: float
    efficiency: float
    memory: float
    fits: bool

    @property
    def rate(self) -> float:
        """Images a second on each GPU."""
        return self.images / (self.computing + self.exposed)


class Scaling:
    """Points of one recipe; the layout of each mode and number of ranks is found out once."""

    def __init__(self, recipe: str, words: Sequence[str], gpu: str, utilisation: float) -> None:
        self.base = load(RunConfig, recipe, ["data.sources=[synthetic]", *words])
        self.gpu, self.utilisation = gpu, utilisation
        self.layout = cache(self._layout)

    def config(self, mode: str, world: int, images: int) -> RunConfig:
        """KoLeo's groups are no larger than the batch."""
        config = deepcopy(self.base)
        config.train.batch_size, config.efficiency.shard = world * images, mode  # type: ignore[assignment]
        config.objective.koleo.group = min(config.objective.koleo.group, config.train.batch_size)
        return config

    def cluster(self, world: int) -> ClusterConfig:
        return load(ClusterConfig, None, [f"world_size={world}", f"gpu={self.gpu}", f"utilisation={self.utilisation}"])

    def _layout(self, mode: str, world: int) -> Layout:
        return lay_out_first(self.config(mode, world, 1), mode, world, min(8, world))

    def point(self, mode: str, world: int, images: int) -> Point:
        config, cluster, layout = self.config(mode, world, images), self.cluster(world), self.layout(mode, world)
        moved = collectives(config, layout, cluster.local_world)
        time = step_time(config, layout, cluster, images)
        memory = estimate_memory(config, world)
        needed = layout.first.total + memory.gathered + memory.activations + memory.logits + CONTEXT
        alone = step_time(self.config("none", 1, images), self.layout("none", 1), self.cluster(1), images)
        return Point(
            mode, world, images,
            sum(each.count * each.size for each in moved if each.kind == "all-gather"),
            sum(each.count * each.size for each in moved if each.kind != "all-gather"),
            sum(each.across for each in moved),
            sum(each.count for each in moved),
            time.computing, time.waiting, alone.total / time.total, needed, needed < cluster.machine.memory,
        )  # fmt: skip


def weak(scaling: Scaling, images: int, worlds: Sequence[int]) -> list[Point]:
    """The same share of images on each GPU."""
    pairs = [(mode, world) for world in worlds for mode in MODES]
    return [scaling.point(mode, world, images) for mode, world in track(pairs, "layouts", transient=True)]


def winners(scaling: Scaling, worlds: Sequence[int]) -> Iterator[tuple[int, int, Point | None]]:
    """The fastest mode that fits, by ranks and by images on a GPU; None where none fits."""
    for world in worlds:
        for images in SHARES:
            fitting = [point for mode in MODES if (point := scaling.point(mode, world, images)).fits]
            yield world, images, max(fitting, key=lambda point: point.rate, default=None)


def show_weak(points: Sequence[Point], console: Console) -> None:
    table = Table(title=f"{points[0].images} images on each GPU", title_justify="left")
    for heading in (
        "GPUs", "mode", "gathered GiB", "reduced GiB", "across nodes GiB", "calls", "computing ms", "exposed ms",
        "images/s a GPU", "of one GPU's", "memory GiB",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for point in points:
        sizes = (f"{value / GIB:.2f}" for value in (point.gathered, point.reduced, point.across_nodes))
        memory = f"{point.memory / GIB:.1f}" + ("" if point.fits else " too much")
        table.add_row(
            f"{point.world:,}" if point.mode == MODES[0] else "", point.mode, *sizes, str(point.calls),
            f"{1e3 * point.computing:.1f}", f"{1e3 * point.exposed:.2f}", f"{point.rate:.1f}",
            f"{point.efficiency:.1%}", memory, end_section=point.mode == MODES[-1],
        )  # fmt: skip
    console.print(table)


def show_winners(found: Sequence[tuple[int, int, Point | None]], console: Console) -> None:
    table = Table(
        title="the fastest mode that fits, and its images/s a GPU, by images on each GPU", title_justify="left"
    )
    table.add_column("GPUs", justify="right")
    for images in SHARES:
        table.add_column(str(images), justify="right")
    for world in dict.fromkeys(world for world, _, _ in found):
        best = [point for other, _, point in found if other == world]
        table.add_row(f"{world:,}", *(f"{point.mode} {point.rate:.0f}" if point else "-" for point in best))
    console.print(table)


def plot(points: Sequence[Point], title: str, out: Path) -> None:
    """Efficiency against the number of GPUs, a line a mode."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for mode in MODES:
        line = [point for point in points if point.mode == mode]
        axes.plot([point.world for point in line], [100 * point.efficiency for point in line], marker="o", label=mode)
    axes.set_xscale("log", base=2)
    axes.set_xticks([point.world for point in points if point.mode == MODES[0]])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.set(xlabel="GPUs", ylabel="images/s a GPU, % of one GPU alone", ylim=(0, 105), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.scaling", description="Weak scaling, on paper.")
    parser.add_argument("recipe", nargs="?", default="vitl16_short_in1k")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpu", default="H200", choices=("A100", "H100", "H200", "B200"))
    parser.add_argument("--images", type=int, default=32, help="on each GPU (default: %(default)s)")
    parser.add_argument("--utilisation", type=float, default=0.35, help="of the peak, from benchmarks.step")
    parser.add_argument("--worlds", type=int, nargs="+", default=list(WORLDS), metavar="GPUS")
    parser.add_argument("--check", action="store_true", help="compare volumes with those of 2 and 4 real processes")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON, and a plot beside it as PNG")
    args = parser.parse_intermixed_args()
    console = Console(width=max(WIDTH, Console().width))
    scaling = Scaling(args.recipe, args.overrides, args.gpu, args.utilisation)
    checked = check_volumes(console) if args.check else []
    points = weak(scaling, args.images, args.worlds)
    title = f"{args.recipe} on {args.gpu}"
    console.print(title, style="bold")
    show_weak(points, console)
    best = list(winners(scaling, args.worlds))
    show_winners(best, console)
    console.print(assumptions(scaling.cluster(args.worlds[-1])), style="dim")
    if args.out:
        results = {
            "machine": describe_machine(Ranks.alone()),
            "recipe": {"name": args.recipe, "overrides": args.overrides},
            "assumed": {"gpu": args.gpu, "utilisation": args.utilisation},
            "check": checked,
            "weak": [asdict(point) for point in points],
            "winners": [
                {"world": world, "images": images, **({"mode": point.mode, "rate": point.rate} if point else {})}
                for world, images, point in best
            ],
        }
        args.out.write_text(json.dumps(results, indent=1))
        plot(points, title, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
