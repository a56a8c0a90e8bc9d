"""The figures of this part, networks side by side in one colour each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eval.inside.finding import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9.0  # inches, of a page
WIDE = 10  # times: what differs by more is drawn on a logarithmic axis
MOST_NUMBERS = 24  # bars in a figure, up to which each has its figure written over it
Number = float | None  # None where undefined


@dataclass(frozen=True)
class Curve:
    """A figure by layer, with the band in which most images lie, and what chance gives."""

    layers: Sequence[int]
    values: Sequence[Number]
    low: Sequence[Number] = ()
    high: Sequence[Number] = ()
    chance: Sequence[Number] = ()


@dataclass(frozen=True)
class Panel:
    """One plot over layers. curves: one a network, empty where it has none."""

    title: str
    label: str
    curves: Sequence[Curve | None]
    limits: tuple[float | None, float | None] = (None, None)
    logarithmic: bool = False


@dataclass(frozen=True)
class Bar:
    """A figure, its interval, what chance gives, and single values around it."""

    value: Number
    low: Number = None
    high: Number = None
    chance: Number = None
    dots: Sequence[float] = field(default_factory=tuple)


def colour(at: int) -> str:
    return COLOURS[at % len(COLOURS)]


def histograms(
    names: Sequence[str],
    panels: Sequence[tuple[str, Sequence[NDArray[Any] | None]]],
    label: str,
    limits: tuple[float, float],
    even: Sequence[Sequence[float | None]],
) -> Figure:
    """Of figures of images, a panel each with all networks. panels: title, and values (n,) a network or None.

    even: [panel][network], what it would be, were all tokens read alike: dotted.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    edges = np.linspace(*limits, 51)
    for axis, (title, values), lines in zip(axes, panels, even, strict=True):
        for at, (each, line) in enumerate(zip(values, lines, strict=True)):
            if line is not None:
                axis.axvline(line, color=colour(at), linestyle=":", linewidth=1.4)
            if each is not None:
                finite = np.clip(each[np.isfinite(each)], *limits)  # sums of weights may be 1.0000001
                weights = np.full(len(finite), 100 / len(finite))
                axis.hist(finite, edges, weights=weights, histtype="stepfilled", color=colour(at), alpha=0.2)
                axis.hist(finite, edges, weights=weights, histtype="step", color=colour(at), linewidth=1.5)
        if all(each is None for each in values):
            _nothing(axis)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(label, fontsize=9)
        axis.set_xlim(*limits)
        _plain(axis)
    axes[0].set_ylabel("images, %", fontsize=9)
    _name(figure, names, "all tokens read alike")
    return figure


def along_layers(names: Sequence[str], panels: Sequence[Panel], columns: int) -> Figure:
    """Plots over layers, those of a row with the same limits."""
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else 0.7 * WIDTH, 0.4 + 2.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey="row")
    for axis, panel in zip(grid.flat, panels, strict=False):
        _draw_curves(axis, panel)
    for axis in grid[:, 1:].flat:
        axis.set_ylabel("")
    chance = any(curve and len(curve.chance) for panel in panels for curve in panel.curves)
    _name(figure, names, "chance" if chance else "")
    return figure


def _draw_curves(axis: Axes, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    for at, curve in enumerate(panel.curves):
        if curve is None:
            continue
        layers = np.array(curve.layers) + 1
        axis.plot(layers, _numbers(curve.values), ".-", color=colour(at), linewidth=1.5, markersize=6)
        if len(curve.low):
            axis.fill_between(
                layers, _numbers(curve.low), _numbers(curve.high), color=colour(at), alpha=0.18, linewidth=0
            )
        if len(curve.chance):
            axis.plot(layers, _numbers(curve.chance), ":", color=colour(at), linewidth=1.2)
    if all(curve is None for curve in panel.curves):
        _nothing(axis)
    axis.set_title(panel.title, fontsize=9)
    axis.set_xlabel("layer", fontsize=9)
    axis.set_ylabel(panel.label, fontsize=9)
    if panel.logarithmic:
        axis.set_yscale("log")
    if panel.limits != (None, None):  # which would end autoscaling
        axis.set_ylim(*panel.limits)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain(axis)


def bars(
    names: Sequence[str], panels: Sequence[tuple[str, Sequence[str], Sequence[Sequence[Bar]]]], label: str, top: float
) -> Figure:
    """Bars in groups, a network each. panels: title, the groups, and the bars [network][group]; – where undefined."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, groups, networks) in zip(axes, panels, strict=True):
        wide, few = 0.8 / len(networks), len(networks) * len(groups) * len(panels) <= MOST_NUMBERS
        for at, row in enumerate(networks):
            for group, bar in enumerate(row):
                _draw_bar(axis, group - 0.4 + wide * (at + 0.5), wide, bar, colour(at), top if few else None)
        axis.set_xticks(range(len(groups)), groups, fontsize=8)
        axis.set_xlim(-0.5, len(groups) - 0.5)
        axis.set_title(title, fontsize=9)
        axis.set_ylim(min([0.0, *_lowest(networks)]), top)
        _plain(axis)
    axes[0].set_ylabel(label, fontsize=9)
    _name(figure, names, "chance" if any(bar.chance for panel in panels for row in panel[2] for bar in row) else "")
    return figure


def _lowest(networks: Sequence[Sequence[Bar]]) -> list[float]:
    return [
        low for row in networks for bar in row if (low := bar.low if bar.low is not None else bar.value) is not None
    ]


def _draw_bar(axis: Axes, x: float, wide: float, bar: Bar, fill: str, top: float | None) -> None:
    """top: of the axis, where the figure is to be written over the bar."""
    if bar.value is None:
        axis.text(x, 0, "–", ha="center", va="bottom", color=fill, fontsize=14)
        return
    axis.bar(x, bar.value, 0.9 * wide, color=fill, alpha=0.75)
    if bar.low is not None and bar.high is not None:
        axis.plot([x, x], [bar.low, bar.high], color="0.15", linewidth=1.2)
    if bar.chance is not None:
        axis.plot([x - wide / 2, x + wide / 2], [bar.chance] * 2, ":", color="0.15", linewidth=1.4)
    axis.plot([x + wide / 4] * len(bar.dots), bar.dots, ".", color="0.15", markersize=3)
    if top is not None:
        highest = max(bar.value, bar.high or 0, bar.chance or 0, *bar.dots)
        text = f"{round(bar.value, 2) + 0.0:.2f}" if top < 10 else f"{bar.value:.0f}"  # + 0.0: without "-0.00"
        axis.text(x, highest + 0.01 * top, text, ha="center", va="bottom", fontsize=7, color="0.15")


def photo_maps(
    names: Sequence[str], photos: NDArray[Any], maps: Sequence[NDArray[Any]], under: Sequence[Sequence[str]]
) -> Figure:
    """A column a photo: itself, and the attention map of each network with a text below."""
    from matplotlib.figure import Figure

    cell = WIDTH / max(4, len(photos))
    figure = Figure(figsize=(cell * len(photos) + 0.3, (cell + 0.35) * (1 + len(maps))), layout="constrained")
    grid = figure.subplots(1 + len(maps), len(photos), squeeze=False)
    for column, photo in enumerate(photos):
        grid[0, column].imshow(photo)
        for row, (each, texts) in enumerate(zip(maps, under, strict=True), 1):
            # A few patches may take so much that all others would be black.
            grid[row, column].imshow(each[column], cmap="magma", vmax=np.quantile(each[column], 0.99))
            grid[row, column].set_xlabel(texts[column], fontsize=8)
    for axis in grid.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for row, name in enumerate(["photo", *names]):
        grid[row, 0].set_ylabel(name, fontsize=9)
    return figure


def registers(names: Sequence[str], lengths: Sequence[NDArray[Any]], profiles: Sequence[NDArray[Any] | None]) -> Figure:
    """Norms of registers (n, R), a dot each; and the strongest dimensions of the longest one (2, K), of both panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    norms, before, after = figure.subplots(1, 3, width_ratios=[1.2, 1, 1])
    place, ticks = 0, []
    for at, each in enumerate(lengths):
        for register in range(each.shape[1]):
            jitter = np.random.default_rng(register).uniform(-0.3, 0.3, len(each))
            norms.plot(
                place + jitter, each[:, register], ".", color=colour(at), markersize=1.5, alpha=0.4, rasterized=True
            )
            ticks.append((place, register))
            place += 1
        place += each.shape[1] > 0
    norms.set_xticks([at for at, _ in ticks], [str(register) for _, register in ticks])
    norms.set_xlabel("register", fontsize=9)
    norms.set_ylabel("norm", fontsize=9)
    norms.set_title("before the last block, a dot an image", fontsize=9)
    norms.margins(x=0.02)
    _log_where_wide(norms, [each for each in lengths if each.size])
    for at, profile in enumerate(profiles):
        if profile is not None:
            for axis, values in ((before, profile[0]), (after, profile[1])):
                axis.plot(np.arange(1, len(values) + 1), values, color=colour(at), linewidth=1.3)
    for axis, title in ((before, "longest register, in the stream"), (after, "the same, as the last block reads it")):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("dimension, by size in the stream", fontsize=9)
        axis.set_ylim(bottom=0)
        _plain(axis)
    before.set_ylabel("rms, 1 = that of all dimensions", fontsize=9)
    after.set_ylabel("rms over images", fontsize=9)
    _plain(norms)
    _name(figure, names)
    return figure


def scatters(
    names: Sequence[str], rows: Sequence[tuple[str, Sequence[NDArray[Any] | None]]], x: NDArray[Any] | Sequence[Any],
    texts: Sequence[Sequence[str]], label: str,
) -> Figure:  # fmt: skip
    """A figure of each image against another: a row a quantity, a column a network. x: (n,) a network."""
    from matplotlib.figure import Figure

    columns = max(3, len(names))
    figure = Figure(figsize=(WIDTH * len(names) / columns + 0.3, 2.6 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(names), squeeze=False, sharex=True, sharey="row")
    for row, (title, networks) in enumerate(rows):
        for column, values in enumerate(networks):
            axis = grid[row, column]
            if values is not None:
                axis.plot(
                    x[column],
                    values,
                    ".",
                    color=colour(column),
                    markersize=4,
                    alpha=0.5,
                    markeredgewidth=0,
                    rasterized=True,
                )
            else:
                _nothing(axis)
            axis.set_title(f"{names[column]}: {texts[row][column]}", fontsize=9)
            _plain(axis)
        grid[row, 0].set_ylabel(title, fontsize=9)
    for axis in grid[-1]:
        axis.set_xlabel(label, fontsize=9)
    return figure


def _log_where_wide(axis: Axes, values: Sequence[NDArray[Any]]) -> None:
    """Where networks differ so much that the smaller ones would lie on the axis."""
    medians = [float(np.median(each)) for each in values]
    if min(medians) > 0 and max(medians) > WIDE * min(medians):
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)


def _numbers(values: Sequence[Number]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _plain(axis: Axes) -> None:
    axis.grid(alpha=0.25)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _nothing(axis: Axes) -> None:
    axis.text(0.5, 0.5, "–", transform=axis.transAxes, ha="center", va="center", color="0.5", fontsize=14)


def _name(figure: Figure, names: Sequence[str], dotted: str = "") -> None:
    """One legend for all panels, below them. dotted: what a dotted line is."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour(at), linewidth=4, label=name) for at, name in enumerate(names)]
    if dotted:
        handles.append(Line2D([], [], color="0.15", linestyle=":", label=dotted))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
