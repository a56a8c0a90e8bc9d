"""The figures, from the arrays of one network or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eval.inside.artifacts.bins import PER_OCTAVE, edges, quantiles
from eval.inside.artifacts.neighbours import cosine_centres
from eval.inside.finding import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9.0  # inches of a page
FACTORS = (1, 2, 4, 8, 16, 32)  # measured bins in a drawn one
NARROWEST = 4.0  # ratio of the norms at the ends of an axis
SMOOTH = 0.02  # of a density of cosines: standard deviation of its kernel
RAINBOW, HEAT, GREY = "viridis", "magma", "#8a8f98"

Array = NDArray[Any]


def new_figure(width: float, height: float) -> Figure:
    """Whose parts do not overlap."""
    from matplotlib.figure import Figure  # half a second of import, for those who draw

    return Figure(figsize=(width, height), layout="constrained")


def colour(at: int) -> str:
    """Of the at-th checkpoint."""
    return COLOURS[at % len(COLOURS)]


def plain_axes(axis: Axes) -> None:
    """Without the frame's upper and right line."""
    axis.spines[["top", "right"]].set_visible(False)


def coarse(counts: Array, factor: int) -> Array:
    """Counts (..., BINS) in bins that are so many times as wide."""
    return counts.reshape(*counts.shape[:-1], -1, factor).sum(-1)


def coarse_edges(factor: int) -> Array:
    """Norms between these wider bins."""
    return edges()[::factor]


def limits(tables: Sequence[Array]) -> tuple[float, float]:
    """Norms between which all tokens of several tables (..., BINS) lie, at least a factor NARROWEST apart.

    A single cloud would otherwise fill the figure, and look as wide as one with outliers.
    """
    seen = np.flatnonzero(sum(table.reshape(-1, table.shape[-1]).sum(0) for table in tables))
    low, high = edges()[seen[0]] / 1.1, edges()[seen[-1] + 1] * 1.1
    return float(low), float(max(high, NARROWEST * low))


def factor_for(bounds: tuple[float, float], most: int) -> int:
    """How much wider than the measured ones bins are drawn, so that at most so many fit between the bounds."""
    bins = PER_OCTAVE * np.log2(bounds[1] / bounds[0])
    return next((factor for factor in FACTORS if bins / factor <= most), FACTORS[-1])


def norm_histograms(names: Sequence[str], counts: Sequence[Array], cutoffs: Sequence[float | None]) -> Figure:
    """One panel a network, below each other, on the same axes: figures 3 and 7. counts: each (BINS,)."""
    from matplotlib.ticker import NullLocator

    figure = new_figure(WIDTH, 0.7 + 1.7 * len(names))
    panels = figure.subplots(len(names), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    bounds = limits(counts)
    factor = factor_for(bounds, 120)
    for at, (axis, name, table, cutoff) in enumerate(zip(panels, names, counts, cutoffs, strict=True)):
        axis.stairs(
            100 * coarse(table, factor) / table.sum(), coarse_edges(factor), fill=True, color=colour(at), alpha=0.85
        )
        axis.set(xscale="log", yscale="log", xlim=bounds, ylim=(50 / max(t.sum() for t in counts), 150))
        axis.set_title(name, loc="left", fontsize=10)
        if cutoff is not None:
            axis.axvline(cutoff, color="black", linestyle="--", linewidth=1)
            axis.annotate(f" cutoff {cutoff:.4g}", (cutoff, 60), fontsize=9, va="center")
        plain_norm_axis(axis)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        axis.yaxis.set_minor_locator(NullLocator())
        plain_axes(axis)
    panels[-1].set_xlabel("norm of a patch token")
    figure.supylabel("share of tokens in each bin", fontsize=10)
    return figure


def plain_norm_axis(axis: Axes, which: str = "x") -> None:
    """Numbers as people write them on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ruler = axis.xaxis if which == "x" else axis.yaxis
    low, high = sorted(axis.get_xlim() if which == "x" else axis.get_ylim())
    ratio = high / low
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if ratio < 12 else (1.0, 2.0, 5.0) if ratio < 3000 else (1.0,)
    ruler.set_major_locator(LogLocator(10, subs=subs, numticks=30))
    ruler.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    ruler.set_minor_locator(NullLocator())  # measuring their labels is most of the time that a figure takes


def norm_maps(names: Sequence[str], photos: Sequence[Array], maps: Sequence[Array], medians: Sequence[float]) -> Figure:
    """Photos uint8 (n, 3, S, S) above, each network's norms (n, h, w) by its usual norm below: figure 3."""
    from matplotlib.colors import LogNorm

    shown = min(len(each) for each in photos)
    cell = (WIDTH - 1.2) / shown
    figure = new_figure(WIDTH, cell * (1 + len(names)) + 0.4)
    grid = figure.subplots(1 + len(names), shown, squeeze=False)
    relative = [each[:shown] / median for each, median in zip(maps, medians, strict=True)]
    top = max(2.0, *(float(each.max()) for each in relative))
    low = min(0.5, *(float(each.min()) for each in relative))
    for axis, photo in zip(grid[0], photos[0], strict=False):
        axis.imshow(photo.transpose(1, 2, 0))
    for row, each in zip(grid[1:], relative, strict=True):
        for axis, image in zip(row, each, strict=True):
            drawn = axis.imshow(image, cmap=RAINBOW, norm=LogNorm(max(low, 1e-3), top))
    for axis in grid.ravel():
        axis.set_xticks([]), axis.set_yticks([])
    for row, name in zip(grid[1:, 0], names, strict=True):
        row.set_ylabel(name, fontsize=9)
    bar = figure.colorbar(drawn, ax=grid[1:].ravel().tolist(), shrink=0.9, pad=0.01)
    bar.set_label("norm / median norm")
    plain_norm_axis(bar.ax, "y")
    return figure


def along(tables: Array, axis: Axes, columns: int, bounds: tuple[float, float], norm: Any) -> Any:
    """A histogram of norms (BINS,) in each column: counts (columns, BINS), in shares of the column."""
    factor = factor_for(bounds, 80)
    shares = coarse(tables, factor).T / np.maximum(tables.sum(-1), 1)
    axis.set(yscale="log", ylim=bounds)
    between = coarse_edges(factor)
    inside = np.flatnonzero((between[1:] > bounds[0]) & (between[:-1] < bounds[1]))  # vectors of all would be heavy
    shown = np.ma.masked_equal(shares[inside], 0)
    return axis.pcolormesh(np.arange(columns + 1), between[inside[0] : inside[-1] + 2], shown, norm=norm, cmap=RAINBOW)


def layer_histograms(
    names: Sequence[str], tables: Sequence[Array], told: Sequence[dict[str, Any]], cutoffs: Sequence[float | None]
) -> Figure:
    """Norms along layers, after attention and after the feed-forward: figure 4a. tables: each (depth, 2, BINS)."""
    from matplotlib.colors import LogNorm

    figure = new_figure(WIDTH, 0.5 + 2.7 * len(names))
    panels = figure.subplots(len(names), 1, sharey=True, squeeze=False)[:, 0]
    colours, bounds = LogNorm(1 / max(int(table[0, 0].sum()) for table in tables), 1), limits(tables)
    for axis, name, table, layers, cutoff in zip(panels, names, tables, told, cutoffs, strict=True):
        depth = len(table)
        drawn = along(table.reshape(2 * depth, -1), axis, 2 * depth, bounds, colours)
        middle = np.arange(2 * depth) + 0.5
        for key, line in (("normal_median", "white"), ("outlier_median", COLOURS[1])):
            medians = np.array(layers[key], dtype=float).ravel()
            if not np.isnan(medians).all():
                label = f"median of {key.partition('_')[0]} patches"
                axis.plot(middle, medians, color=line, linewidth=1.4, label=label)
        axis.set_xlim(0, 2 * depth)
        step = max(1, depth // 20)
        axis.set_xticks(np.arange(0, 2 * depth, 2 * step) + 1, [str(at + 1) for at in range(0, depth, step)])
        axis.set_title(name, loc="left", fontsize=10)
        if cutoff is not None:
            axis.axhline(cutoff, color="black", linestyle="--", linewidth=0.8)
        legend = axis.legend(fontsize=8, loc="upper left", facecolor=GREY, framealpha=0.8, labelcolor="white")
        legend.get_frame().set_linewidth(0)
        plain_norm_axis(axis, "y")
    panels[-1].set_xlabel("layer: left half after attention, right half after the feed-forward")
    figure.supylabel("norm of a patch token", fontsize=10)
    figure.colorbar(drawn, ax=panels.tolist(), pad=0.01).set_label("share of tokens")
    return figure


def smooth_density(counts: Array) -> Array:
    """A kernel density of cosines from their histogram (COSINES,), mirrored at the ends so that nothing leaks out.

    The kernel is Silverman's for so many tokens, and at least SMOOTH wide.
    """
    middle = cosine_centres()
    mean = (counts * middle).sum() / counts.sum()
    spread = np.sqrt((counts * (middle - mean) ** 2).sum() / counts.sum())
    width = max(SMOOTH, 1.06 * spread * counts.sum() ** -0.2)
    density = np.zeros_like(middle)
    for centre in (middle, 2 - middle, -2 - middle):
        kernel = np.exp(-0.5 * ((middle[:, None] - centre[None]) / width) ** 2) / (width * np.sqrt(2 * np.pi))
        density += kernel @ counts / counts.sum()
    return density


def cosine_densities(names: Sequence[str], counts: Sequence[Array]) -> Figure:
    """Normal patches and outliers, one panel a network: figure 5a. counts: each (2, COSINES)."""
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(WIDTH, 0.5 + 2.4 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    there = [np.flatnonzero(table.sum(0)) for table in counts]  # a patch alone has no neighbours
    low = min((cosine_centres()[bins[0]] for bins in there if len(bins)), default=-1.0)
    for axis, name, table in zip(panels, names, counts, strict=False):
        for kind, label, line in ((0, "normal", COLOURS[0]), (1, "outlier", COLOURS[1])):
            if table[kind].any():
                density = smooth_density(table[kind])
                axis.fill_between(cosine_centres(), density, alpha=0.25, color=line, linewidth=0)
                axis.plot(cosine_centres(), density, color=line, label=f"{label} patches")
        axis.set_title(name, loc="left", fontsize=10)
        axis.set(xlim=(max(-1, low - 0.05), 1), ylim=(0, None), xlabel="cosine to neighbours")
        if table.any():
            axis.legend(fontsize=8, frameon=False, loc="upper left")
        plain_axes(axis)
    for axis in panels[len(names) :]:
        axis.set_axis_off()
    panels[0].set_ylabel("density")
    return figure


def type_strips(names: Sequence[str], tables: Sequence[dict[str, Array]], cutoff: float | None) -> Figure:
    """Norms by type of token, a panel a network: figures 7 and 15. tables: by type, each (BINS,)."""
    from matplotlib.patches import Rectangle

    widths = [max(2, len(each)) for each in tables]
    bounds = limits([counts for each in tables for counts in each.values()])
    figure = new_figure(min(WIDTH, 1.2 + 0.85 * sum(widths)), 3.4)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False, width_ratios=widths)[0]
    for number, (axis, name, types) in enumerate(zip(panels, names, tables, strict=True)):
        for at, (kind, counts) in enumerate(types.items()):
            low, q25, middle, q75, high, most = quantiles(counts, [0.01, 0.25, 0.5, 0.75, 0.99, 1.0])
            if low is None or q25 is None or q75 is None:
                continue
            shade = GREY if kind.startswith("register") else colour(number)
            axis.plot([at, at], [low, high], color=shade, linewidth=1.5)
            axis.add_patch(Rectangle((at - 0.25, q25), 0.5, q75 - q25, color=shade, alpha=0.8))
            axis.plot([at - 0.3, at + 0.3], [middle, middle], color="black", linewidth=1.5)
            axis.plot(at, most, marker="o", markersize=3.5, color=shade)
        axis.set_xticks(range(len(types)), [kind.replace("register ", "reg ") for kind in types], fontsize=8)
        axis.tick_params(axis="x", rotation=90 if len(types) > 7 else 0)
        axis.set(yscale="log", xlim=(-0.6, len(types) - 0.4), ylim=bounds)
        if cutoff is not None:
            axis.axhline(cutoff, color="black", linestyle="--", linewidth=0.8)
        axis.set_title(name, loc="left", fontsize=10)
        plain_norm_axis(axis, "y")
        plain_axes(axis)
    panels[0].set_ylabel("norm")
    return figure


def from_zero(maps: Sequence[Array]) -> dict[str, Any]:
    """Colours of shares."""
    return {"cmap": HEAT, "vmin": 0.0, "vmax": max(float(each.max()) for each in maps) or 1.0}


def around_one(maps: Sequence[Array]) -> dict[str, Any]:
    """Colours of ratios, white where they are 1; differences of less than 5 % stay pale."""
    most = max(0.05, *(float(abs(each - 1).max()) for each in maps))
    return {"cmap": "RdBu_r", "vmin": 1 - most, "vmax": 1 + most}


def around_zero(maps: Sequence[Array]) -> dict[str, Any]:
    """Colours of what has a sign."""
    most = max(float(abs(each).max()) for each in maps) or 1.0
    return {"cmap": "RdBu_r", "vmin": -most, "vmax": most}


def heat_maps(titles: Sequence[str], maps: Sequence[Array], label: str, per_row: int, scale: dict[str, Any]) -> Figure:
    """Maps (h, w) over positions, in the same colours."""
    rows = -(-len(maps) // per_row)
    cell = min(2.6, (WIDTH - 0.9) / per_row)
    figure = new_figure(cell * per_row + 0.9, (cell + 0.35) * rows)
    panels = figure.subplots(rows, per_row, squeeze=False).ravel()
    for axis, title, each in zip(panels, titles, maps, strict=False):
        drawn = axis.imshow(each, **scale)
        axis.set_title(title, fontsize=9)
    for axis in panels:
        axis.set_xticks([]), axis.set_yticks([])
    for axis in panels[len(maps) :]:
        axis.set_axis_off()
    figure.colorbar(drawn, ax=panels.tolist(), shrink=0.8, pad=0.01).set_label(label)
    return figure


def map_columns(titles: Sequence[str], columns: Sequence[tuple[str, Sequence[Array], dict[str, Any]]]) -> Figure:
    """A row for each title; columns: what is shown, its maps from above, and its colours."""
    cell = 2.1
    figure = new_figure((cell + 0.5) * len(columns) + 0.4, cell * len(titles) + 0.7)
    grid = figure.subplots(len(titles), len(columns), squeeze=False)
    for axes, (label, maps, scale) in zip(grid.T, columns, strict=True):
        for axis, each in zip(axes, maps, strict=True):
            drawn = axis.imshow(each, **scale)
            axis.set_xticks([]), axis.set_yticks([])
        bar = figure.colorbar(drawn, ax=axes.tolist(), location="bottom", shrink=0.9, pad=0.02)
        bar.set_label(label, fontsize=9)
        bar.ax.tick_params(labelsize=8)
    for axis, title in zip(grid[:, 0], titles, strict=True):
        axis.set_ylabel(title, fontsize=10)
    return figure


def accuracy_bars(
    names: Sequence[str], columns: Sequence[dict[str, Any]], intervals: Sequence[dict[str, tuple[float, float]]]
) -> Figure:
    """Accuracies by kind of token, a group of bars a network."""
    widths = [max(3, len(each)) for each in columns]
    figure = new_figure(min(WIDTH, 1.2 + 0.85 * sum(widths)), 2.9)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False, width_ratios=widths)[0]
    for number, (axis, name, kinds, spans) in enumerate(zip(panels, names, columns, intervals, strict=True)):
        for at, (kind, found) in enumerate(kinds.items()):
            if found is None:
                axis.annotate("–", (at, 1), ha="center", fontsize=11)
                continue
            axis.bar(at, found["top1"], width=0.7, color=GREY if kind.startswith("register") else colour(number))
            axis.plot([at, at], spans[kind], color="black", linewidth=1.2)
        axis.set_xticks(range(len(kinds)), [kind.replace("register ", "reg ") for kind in kinds], fontsize=8)
        axis.tick_params(axis="x", rotation=90 if len(kinds) > 7 else 0)
        axis.set(ylim=(0, 100), xlim=(-0.6, len(kinds) - 0.4))
        axis.set_title(name, loc="left", fontsize=10)
        plain_axes(axis)
    panels[0].set_ylabel("top-1 accuracy, %")
    return figure


def step_histograms(names: Sequence[str], tables: Sequence[Array], steps: Sequence[Sequence[int]]) -> Figure:
    """Norms along the training: figure 4b. tables: each (steps, BINS)."""
    from matplotlib.colors import LogNorm

    figure = new_figure(WIDTH, 0.5 + 2.4 * len(names))
    panels = figure.subplots(len(names), 1, sharey=True, squeeze=False)[:, 0]
    colours, bounds = LogNorm(1 / max(int(table[0].sum()) for table in tables), 1), limits(tables)
    for axis, name, table, each in zip(panels, names, tables, steps, strict=True):
        drawn = along(table, axis, len(each), bounds, colours)
        step = max(1, len(each) // 10)
        axis.set_xticks(np.arange(0, len(each), step) + 0.5, [f"{each[at]:,}" for at in range(0, len(each), step)])
        axis.set_title(name, loc="left", fontsize=10)
        plain_norm_axis(axis, "y")
    panels[-1].set_xlabel("training step")
    figure.supylabel("norm of a patch token", fontsize=10)
    figure.colorbar(drawn, ax=panels.tolist(), pad=0.01).set_label("share of tokens")
    return figure
