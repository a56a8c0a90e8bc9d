"""A sweep as a picture: for each score a panel with the values of one axis, and a line for each value of another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.grid import as_text

if TYPE_CHECKING:
    from launch.table import Point

COLUMNS = 3
LINES = 8  # so many lines in a panel can be told from each other; more values of a second axis are drawn as a map
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#222222")  # Paul Tol's
MARKERS = "osD^vPX*"


def draw(path: Path, title: str, axes: Sequence[str], points: Sequence[Point], shown: Sequence[str]) -> None:
    """Write a PNG. The first axis is the horizontal one; runs that go on are hollow."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(0.5 + 3.4 * columns, 0.7 + 2.8 * lines), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    groups = _groups(axes, points)
    for number, name in enumerate(shown):
        panel = figure.add_subplot(lines, columns, number + 1)
        measured = [point for point in points if name in point.scores]
        unit = next((point.scores[name].unit for point in measured), "")
        panel.set_title(f"{name} ({unit})" if unit else name, fontsize=10)
        if len(axes) == 2 and len(groups) > LINES:
            _map(figure, panel, axes, points, name)
        else:
            _lines(panel, axes[0], points, groups, name)
    figure.supxlabel(_legend(points), fontsize=8, color="#555555")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(groups) > 1 and labels:
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    partial = path.with_suffix(".png.new")
    figure.savefig(partial, format="png")
    partial.replace(path)


def _legend(points: Sequence[Point]) -> str:
    """What signs mean that are there."""
    bars = any(score.low is not None for point in points for score in point.scores.values())
    hollow = any(point.state != "finished" for point in points)
    return "; ".join(["bars: 95 % intervals"] * bars + ["hollow: not at its end yet"] * hollow)


def _groups(axes: Sequence[str], points: Sequence[Point]) -> dict[str, list[Point]]:
    """The lines, named by the values of all axes but the first."""
    found: dict[str, list[Point]] = {}
    for point in points:
        name = ", ".join(f"{axis}={as_text(v)}" for axis, v in zip(axes[1:], point.values[1:], strict=True))
        found.setdefault(name, []).append(point)
    return found


def _different(points: Sequence[Point], axis: int) -> list[str]:
    """The values of an axis, in order: the points are sorted by them."""
    from launch.table import order

    values = sorted((point.values[axis] for point in points), key=order)
    return list(dict.fromkeys(map(as_text, values)))


def _lines(panel: Any, axis: str, points: Sequence[Point], groups: dict[str, list[Point]], name: str) -> None:
    """Values at equal distances: they mostly grow by factors, and 0 is among them."""
    ticks = _different(points, 0)
    for number, (label, group) in enumerate(groups.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number // len(COLOURS) % len(MARKERS)]
        measured = [point for point in group if name in point.scores]
        where = [ticks.index(as_text(point.values[0])) for point in measured]
        scores = [point.scores[name] for point in measured]
        panel.plot(where, [score.value for score in scores], color=colour, linewidth=1.4, zorder=2)
        for x, point, score in zip(where, measured, scores, strict=True):
            if score.low is not None and score.high is not None:
                panel.vlines(x, score.low, score.high, color=colour, linewidth=1, alpha=0.5, zorder=1)
            face = colour if point.state == "finished" else "white"
            panel.plot(x, score.value, marker=marker, color=colour, markerfacecolor=face, markersize=5, zorder=3)
        panel.plot([], [], color=colour, marker=marker, markersize=5, linewidth=1.4, label=label)
    panel.set_xticks(range(len(ticks)), ticks, fontsize=8)
    if sum(map(len, ticks)) > 30:
        panel.tick_params(axis="x", rotation=45)
    panel.set_xlim(-0.4, len(ticks) - 0.6)
    panel.set_xlabel(axis, fontsize=9)
    panel.tick_params(axis="y", labelsize=8)
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _map(figure: Any, panel: Any, axes: Sequence[str], points: Sequence[Point], name: str) -> None:
    """A coloured rectangle for each pair of values."""
    across, down = _different(points, 0), _different(points, 1)
    grid = [[float("nan")] * len(across) for _ in down]
    for point in points:
        if name in point.scores:
            row, column = down.index(as_text(point.values[1])), across.index(as_text(point.values[0]))
            grid[row][column] = point.scores[name].value
    image = panel.imshow(grid, cmap="viridis", aspect="auto", origin="lower")
    figure.colorbar(image, ax=panel).ax.tick_params(labelsize=7)
    panel.set_xticks(range(len(across)), across, fontsize=7, rotation=45 if len(across) > 6 else 0)
    panel.set_yticks(range(len(down)), down, fontsize=7)
    panel.set_xlabel(axes[0], fontsize=9)
    panel.set_ylabel(axes[1], fontsize=9)
