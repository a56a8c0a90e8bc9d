"""Figures of knock-outs, masking, exchanged registers and patches beside CLS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.inside.finding import COLOURS, Album, Picture, Seen
from eval.inside.knockout.edges import CUT, EDGES, MEAN, NOISE, SHUFFLE, SWAP, WAYS, ZERO

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = {CUT: "black", ZERO: COLOURS[1], MEAN: COLOURS[0], NOISE: COLOURS[2], SHUFFLE: COLOURS[3]}
SAID = {
    CUT: "cut", ZERO: "as zeros", MEAN: "as their mean", NOISE: "as noise", SHUFFLE: "as another image's",
}  # fmt: skip
READ = {
    "CLS<-PATCH": "CLS reads patches", "CLS<-CLS": "CLS reads itself", "CLS<-REG": "CLS reads registers",
    "PATCH<-REG": "patches read registers",
}  # fmt: skip
GREY = "#888888"
PANEL = (2.9, 2.4)  # inches
MOST_PHOTOS = 4
LEAST = 0.01  # of cosines on an axis, below which differences are of rounding
Details = dict[str, Any]


def curves_by_edge(seen: Sequence[Seen], album: Album, key: str, label: str, name: str) -> Picture:
    """A row a network, a column an edge, a line a way."""
    from matplotlib.figure import Figure

    edges = [edge for edge in EDGES if any(run["edge"] == edge for each in seen for run in each.details["runs"])]  # type: ignore[attr-defined]
    figure = Figure(figsize=(PANEL[0] * len(edges), PANEL[1] * len(seen) + 0.5), layout="constrained")
    grid = figure.subplots(len(seen), len(edges), squeeze=False, sharey=True)
    for each, row in zip(seen, grid, strict=True):
        for edge, axes in zip(edges, row, strict=True):
            _draw_ways(axes, each, edge, WAYS, key)
        row[0].set_ylabel(f"{each.name}\n{label}")
    for edge, axes in zip(edges, grid[0], strict=True):
        axes.set_title(READ[edge], fontsize=10)
    _legend(figure, WAYS)
    what = (
        "Cosine of the final CLS to the unchanged one"
        if key == "cosine"
        else "Accuracy that the fixed classifier loses"
    )
    caption = (
        f"{what}, when one kind of token is kept from reading another in the block on the axis (dots at the right: in "
        "all blocks at once). Bars: 95 % intervals over images."
    )
    return album.save(figure, name, caption)


def _draw_ways(axes: Axes, seen: Seen, edge: str, ways: Sequence[str], key: str) -> None:
    depth: int = seen.details["depth"]  # type: ignore[assignment]
    runs: list[Details] = [run for run in seen.details["runs"] if run["edge"] == edge]  # type: ignore[attr-defined]
    if not runs:
        axes.text(0.5, 0.5, "– (no registers)", ha="center", va="center", transform=axes.transAxes, color=GREY)
        axes.set_xticks([])
        return
    layers: list[int] = seen.details["layers"]  # type: ignore[assignment]
    end = 1.18 * depth + 0.8
    for place, way in enumerate(ways):
        mine = [run for run in runs if run["way"] == way and run[key] is not None]
        single = [run for run in mine if (run["first"], run["last"]) != (0, depth - 1) and run["first"] in layers]
        shift = 0.01 * depth * (place - 2)  # side by side
        _bars(axes, [run["first"] + 1 + shift for run in single], [run[key] for run in single], way, "-")
        whole = [run[key] for run in mine if (run["first"], run["last"]) == (0, depth - 1)]
        _bars(axes, [end + 3 * shift for _ in whole], whole, way, "")
    ticks = layers if len(layers) < 8 else layers[::2]
    ends = [] if edge == SWAP else [end]
    axes.set_xticks(
        [*(layer + 1 for layer in ticks), *ends], [*(str(layer + 1) for layer in ticks), *(["all"] if ends else [])]
    )
    axes.set_xlabel("block")


def _bars(axes: Axes, at: Sequence[float], scores: Sequence[dict[str, float]], way: str, line: str) -> None:
    if not scores:
        return
    value = np.array([score["value"] for score in scores])
    spread = np.abs([[score["low"] for score in scores], [score["high"] for score in scores]] - value)
    axes.errorbar(
        at,
        value,
        spread,
        color=STYLES[way],
        linestyle=line or "none",
        marker="o",
        markersize=3,
        linewidth=1.2,
        elinewidth=0.7,
    )


def _legend(figure: Figure, ways: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=STYLES[way], marker="o", markersize=3, label=SAID[way]) for way in ways]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(ways), frameon=False, fontsize=9)


def greying(seen: Sequence[Seen], album: Album) -> Picture:
    """Deletion, insertion, and the correlations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.1), layout="constrained")
    removed, kept, alone = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    for place, each in enumerate(seen):
        told: Details = each.details["masking"]  # type: ignore[assignment]
        if not told["images"]:
            continue
        colour, share = COLOURS[place % len(COLOURS)], 100 * np.array(told["fractions"])
        curves = {name: np.array([score["value"] for score in curve]) for name, curve in told["deletion"].items()}
        removed.plot(share, curves["attended"], color=colour, label=each.name)
        removed.plot(share, curves["random"], color=colour, linestyle="--")
        kept.plot(share, 1 - curves["least"][::-1], color=colour)
        kept.plot(share, 1 - curves["random"][::-1], color=colour, linestyle="--")
        found = told.get("correlations", [])
        alone.plot(np.full(len(found), place), found, "o", color=colour, markersize=4, alpha=0.6)
        if found:
            alone.plot([place - 0.25, place + 0.25], [np.mean(found)] * 2, color=colour)
    removed.set(xlabel="patches that are grey [%]", ylabel="change of CLS (1 - cosine)")
    kept.set(xlabel="patches that are left [%]", ylabel="likeness of CLS (cosine)")
    alone.set(ylabel="rank correlation, map and effect", ylim=(-1, 1), xlim=(-0.6, len(seen) - 0.4))
    alone.set_xticks(range(len(seen)), [each.name for each in seen], fontsize=8)
    alone.axhline(0, color=GREY, linewidth=0.7)
    removed.plot([], [], color="black", linestyle="--", label="at random")
    removed.legend(frameon=False, fontsize=8)
    caption = (
        "Left: patches vanish, the most attended first (dashed: at random). Middle: patches appear, the most "
        "attended first. Right: one dot an image, how the attention map ranks patches against what each alone does "
        "to CLS; the line is the mean."
    )
    return album.save(figure, "knockout-masking", caption)


def swapped(seen: Sequence[Seen], album: Album) -> Picture:
    """A row a network with registers: CLS's cosine, and whose class is named."""
    from matplotlib.figure import Figure

    labelled = any(each.details["swap"] for each in seen)
    figure = Figure(figsize=(4.4 * (1 + labelled), 2.9 * len(seen) + 0.4), layout="constrained")
    grid = figure.subplots(len(seen), 1 + labelled, squeeze=False, sharey="col")
    ways = WAYS[1:]
    for each, row in zip(seen, grid, strict=True):
        _draw_ways(row[0], each, SWAP, WAYS, "cosine")
        row[0].set(ylabel=f"{each.name}\ncosine of CLS", xlabel="block that the registers enter")
        if labelled:
            _draw_shares(row[1], each)
    low, high = grid[0, 0].get_ylim()
    grid[0, 0].set_ylim(min(low, high - LEAST), high)
    _legend(figure, ways)
    caption = (
        "Registers replaced once, as they enter the block on the axis. Left: how much of CLS is left at the end. "
        "Right, where images have classes: whose class the fixed classifier names after an exchange with another "
        "image (dashed: the donor's, after the mean of registers, which knows of no donor)."
    )
    return album.save(figure, "knockout-swap", caption)


def _draw_shares(axes: Axes, seen: Seen) -> None:
    rows: list[Details] = [row for row in seen.details["swap"] if row["donor"]]  # type: ignore[attr-defined]
    for key, colour, label in (("receiver", COLOURS[0], "its own"), ("donor", COLOURS[3], "the donor's")):
        value = np.array([row[key]["value"] for row in rows])
        spread = np.abs([[row[key][end] for row in rows] for end in ("low", "high")] - value)
        axes.errorbar(
            [row["layer"] + 1 for row in rows], value, spread, color=colour, marker="o", markersize=3, label=label
        )
    chance = [row["donor_by_mean"]["value"] for row in rows]
    axes.plot([row["layer"] + 1 for row in rows], chance, color=COLOURS[3], linestyle="--", linewidth=1)
    axes.set(xlabel="block that the registers enter", ylabel="class named [% of images]", ylim=(-3, 103))
    axes.set_xticks([row["layer"] + 1 for row in rows])
    axes.legend(frameon=False, fontsize=8)


def maps(seen: Sequence[Seen], album: Album) -> Picture:
    """A row a photo; of each network the likeness with CLS, its attention, and where CLS's class is named."""
    from matplotlib.figure import Figure

    kinds = {"cosine": "cosine with CLS", "attention": "attention", "named": "named as CLS"}
    columns = [(each, kind) for each in seen for kind in kinds if kind in each.arrays]
    rows = min(MOST_PHOTOS, *(len(each.arrays["photos"]) for each in seen))
    figure = Figure(figsize=(1.55 * (1 + len(columns)), 1.55 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, 1 + len(columns), squeeze=False)
    shown = np.concatenate([each.arrays["cosine"][:rows].ravel() for each in seen])
    low, high = float(shown.min()), float(shown.max())
    limits = {"cosine": (low, high), "attention": (0, None), "named": (0, 1)}
    for row, axes in enumerate(grid):
        axes[0].imshow(seen[0].arrays["photos"][row].transpose(1, 2, 0))
        for place, (each, kind) in zip(axes[1:], columns, strict=True):
            place.imshow(
                each.arrays[kind][row],
                vmin=limits[kind][0],
                vmax=limits[kind][1],
                cmap="gray" if kind == "named" else "viridis",
            )
    for axes, (each, kind) in zip(grid[0, 1:], columns, strict=True):
        axes.set_title(f"{each.name}\n{kinds[kind]}", fontsize=8)
    for axes in grid.flat:
        axes.set_axis_off()
    caption = (
        f"Cosine of each patch with CLS (dark {low:.2f}, bright {high:.2f}), attention of CLS in the last block (dark "
        "0, bright the largest of the map), and in white the patches that the classifier of class tokens gives the "
        "class of CLS."
    )
    return album.save(figure, "knockout-maps", caption)
