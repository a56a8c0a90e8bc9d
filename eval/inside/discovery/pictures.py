"""Figures of what LOST does: its steps on photos, the features compared, and scores against the bias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eval.inside.finding import COLOURS, Album, Picture, Seen
from eval.metrics import share_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE_BY_SIDE = 2  # networks in one figure; maps of more would be too small
ROWS = 4  # photos in one figure
WIDTH, LARGEST_CELL = 10.0, 1.8  # inches
NAMES = {"q": "queries", "k": "keys", "v": "values"}
RULES_AT = (0.14, 0.42)  # where the two rules stand beyond the last bias, in widths of the biases' span
TRUE = "#111111"  # boxes that people drew


@dataclass(frozen=True)
class Shot:
    """A photo as one network sees it. about, pixels, maps, features: as in `photos.Photo`."""

    about: dict[str, Any]
    pixels: NDArray[np.uint8]
    maps: NDArray[np.float32]
    features: NDArray[np.float32]

    def show(self, axes: Axes, values: NDArray[np.float32], colours: str, low: float, high: float) -> None:
        """A map over the area of the photo, without the padding."""
        height, width = self.pixels.shape[:2]
        patch = (
            self.about["patch"] * height / self.about["seen"][0],
            self.about["patch"] * width / self.about["seen"][1],
        )
        extent = (0.0, values.shape[1] * patch[1], values.shape[0] * patch[0], 0.0)
        axes.imshow(values, cmap=colours, vmin=low, vmax=high, extent=extent, interpolation="nearest")
        axes.set(xlim=(0, width), ylim=(height, 0))

    def seed(self, axes: Axes, setting: str) -> None:
        """A cross where the seed is."""
        row, column = self.about["found"][setting]["seed"]
        down, across = (
            (at + 0.5) * self.about["patch"] * side / seen
            for at, side, seen in zip((row, column), self.pixels.shape, self.about["seen"], strict=False)
        )
        height, width = self.pixels.shape[:2]
        axes.plot(min(across, width), min(down, height), "+", color="#00e000", markersize=8, markeredgewidth=2)

    def box(self, axes: Axes, setting: str, colour: str, width: float = 2.0) -> None:
        """The box that was found."""
        _rectangle(axes, self.about["found"][setting]["box"], colour, width)


def shots(seen: Seen) -> list[Shot]:
    """The photos of one network."""
    photos: Any = seen.details.get("photos", [])
    parts = ("pixels", "maps", "features")
    return [
        Shot(about, *(seen.arrays[f"photo{at}_{part}"] for part in parts)) for at, about in enumerate(photos[:ROWS])
    ]


def side_by_side(seen: Sequence[Seen]) -> Iterator[list[int]]:
    """Which networks share a figure: those that were shown the same photos."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for at, each in enumerate(seen):
        if names := tuple(shot.about["name"] for shot in shots(each)):
            # Sets of images often have the same names.
            alike.setdefault((str(each.evaluation.data["hash"]), *names), []).append(at)
    for places in alike.values():
        for start in range(0, len(places), SIDE_BY_SIDE):
            yield places[start : start + SIDE_BY_SIDE]


def draw_steps(seen: Sequence[Seen], album: Album) -> list[Picture]:
    """As figure 13 of the registers paper: inverse degree, agreement with the seed, expansion; and the boxes."""
    found = []
    for number, places in enumerate(side_by_side(seen)):
        networks = [seen[at] for at in places]
        heads = ["agrees with few", "agrees with the seed", "… and its company"]
        figure, rows = _grid([f"{each.name}: {_setting(each)}" for each in networks], heads, networks)
        for at, axes in enumerate(rows):
            taken = [shots(each)[at] for each in networks]
            _photo(axes[0], taken, [COLOURS[place % len(COLOURS)] for place in places])
            for column, shot in enumerate(taken):
                _steps(axes[1 + 3 * column : 4 + 3 * column], shot)
        drawn = ", ".join(f"{_colour_name(place)}: {seen[place].name}" for place in places)
        caption = (
            f"Left: the photo; black the boxes that people drew, in colour what is found ({drawn}). "
            "Right: bright patches agree with few others, and the green cross is "
            "the one with the fewest, the seed; then how far each patch agrees with the seed, and with the seed and "
            "its company (red: yes, blue: no). The object is the red part around the seed in the last."
        )
        found.append(album.save(figure, f"discovery_steps_{number + 1}", caption))
    return found


def draw_features(seen: Sequence[Seen], album: Album) -> list[Picture]:
    """As figure 14 of the registers paper: the expansion from queries, keys and values."""
    found = []
    for number, places in enumerate(side_by_side(seen)):
        networks = [seen[at] for at in places]
        names: Any = networks[0].details["features"]
        if any(each.details["features"] != names for each in networks):
            continue
        figure, rows = _grid([each.name for each in networks], [NAMES[name] for name in names], networks)
        for at, axes in enumerate(rows):
            taken = [shots(each)[at] for each in networks]
            _photo(axes[0], taken, [COLOURS[place % len(COLOURS)] for place in places], boxes=False)
            for column, shot in enumerate(taken):
                for feature, name in enumerate(names):
                    panel = axes[1 + column * len(names) + feature]
                    _signed(panel, shot, shot.features[feature])
                    shot.seed(panel, name)
                    shot.box(panel, name, TRUE)
        how = {each.name: "with the bias that suited it best" if each.details["chosen"] else "centred"
               for each in networks}  # fmt: skip
        which = ", ".join(f"{name}: {said}" for name, said in how.items())
        caption = (
            "The last step of LOST from what attention computes of a patch, in the same layer, each "
            f"{which if len({*how.values()}) > 1 else next(iter(how.values()))}. "
            "Red: belongs to the object; the black box is what is found."
        )
        found.append(album.save(figure, f"discovery_features_{number + 1}", caption))
    return found


def draw_curves(seen: Sequence[Seen], album: Album) -> list[Picture]:
    """CorLoc of the first block against the bias, a panel a feature; a figure for each unit of biases."""
    units = list(dict.fromkeys(str(each.details["bias_unit"]) for each in seen))
    return [_draw_curves(seen, unit, album, f"_{unit}" if at else "") for at, unit in enumerate(units)]


def _draw_curves(everyone: Sequence[Seen], unit: str, album: Album, suffix: str) -> Picture:
    from matplotlib.figure import Figure

    seen = [each for each in everyone if each.details["bias_unit"] == unit]
    names = list(dict.fromkeys(name for each in seen for name in _features(each)))
    span = _span(seen)
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        panel.set_title(NAMES[name], fontsize=11)
        for at, each in enumerate(everyone):
            if each.details["bias_unit"] == unit and name in _features(each):
                dodge = 0.03 * (at - (len(everyone) - 1) / 2)  # or intervals would hide each other
                _curve(panel, each, _features(each).index(name), COLOURS[at % len(COLOURS)], dodge, span)
        _floors(panel, seen)
        _ticks(panel, *span)
        panel.set_xlabel("bias" if unit == "absolute" else "bias / mean squared length")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("CorLoc (%)")
    panels[0].set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False, fontsize=9)
    caption = (
        "The share of images in which the box is right, by the bias that is added to all dot products; shaded: 95 % "
        "intervals. The points on the right are the two rules that need no labels. Dashed: boxes drawn without looking."
    )
    return album.save(figure, f"discovery_bias{suffix}", caption)


def _span(seen: Sequence[Seen]) -> tuple[float, float]:
    """The lowest and the highest bias that any of them tried."""
    tried: Any = [each.details["tried"] for each in seen]
    return min(map(min, tried)), max(map(max, tried))


def _features(seen: Seen) -> list[str]:
    found: Any = seen.details["features"]
    return list(found)


def _curve(axes: Axes, seen: Seen, feature: int, colour: str, dodge: float, span: tuple[float, float]) -> None:
    tried: Any = seen.details["tried"]
    right, count = seen.arrays["right"][0, feature], seen.evaluation.details["images"]
    order = np.argsort(tried)[::-1]
    biases, found = np.array(tried)[order], right[:-2][order]
    low, high = np.array([share_interval(int(number), count) for number in found]).T
    axes.fill_between(biases, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(biases, 100 * found / count, color=colour, marker=".", markersize=4, label=seen.name)
    for at, number in enumerate(right[-2:]):
        value, (under, over) = 100 * number / count, share_interval(int(number), count)
        where = [span[0] - (RULES_AT[at] + dodge) * _width(*span)]
        axes.errorbar(where, [value], [[value - under], [over - value]], color=colour, fmt="so"[at], capsize=2)


def _width(low: float, high: float) -> float:
    return max(high - low, 1e-9)  # of a single bias


def _ticks(axes: Axes, low: float, high: float) -> None:
    """No bias on the left, as one begins with nothing; the two rules as words on the right."""
    from matplotlib.ticker import MaxNLocator

    span = _width(low, high)
    ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    axes.set_xlim(high + 0.03 * span, low - 0.56 * span)
    rules = [low - at * span for at in RULES_AT]
    axes.set_xticks([*ticks, *rules], [*(f"{tick:.3g}".replace("-", "−") for tick in ticks), "−mean", "centred"])
    for label in axes.get_xticklabels():
        label.set_fontsize(8)


def _floors(axes: Axes, seen: Sequence[Seen]) -> None:
    for name, key, line in (("whole image", "whole", ":"), ("middle 80 %", "middle", "--")):
        details = seen[0].evaluation.details
        axes.axhline(100 * details["floors"][key] / details["images"], color="#777777", linestyle=line, linewidth=1,
                     label=f"{name}, without looking")  # fmt: skip


def _setting(seen: Seen) -> str:
    """Which setting's maps are drawn."""
    chosen: Any = seen.details["chosen"]
    if not chosen:
        return f"{NAMES[_features(seen)[0]]}, centred"
    return f"{NAMES[chosen['feature']]} of block {chosen['block'] + 1}, bias {chosen['bias']:.3g}"


def _grid(titles: Sequence[str], heads: Sequence[str], networks: Sequence[Seen]) -> tuple[Figure, list[list[Axes]]]:
    """A row a photo: the photo, then a column for each head of each network."""
    from matplotlib.figure import Figure

    first = shots(networks[0])
    ratios = [shot.pixels.shape[0] / shot.pixels.shape[1] for shot in first]
    widths = [1.25, *([0.12, *[1.0] * len(heads)] * len(titles))]  # with a gap before each network
    cell = min(LARGEST_CELL, WIDTH / (sum(widths) + 0.04 * len(widths)))
    head = 0.5  # inches
    width = cell * (sum(widths) + 0.04 * len(widths))
    figure = Figure(figsize=(width, cell * sum(ratios) * 1.05 + head))
    grid = figure.add_gridspec(
        len(first), len(widths), width_ratios=widths, height_ratios=ratios, left=0.0, right=1.0, bottom=0.0,
        top=1 - head / figure.get_figheight(), wspace=0.04, hspace=0.05,
    )  # fmt: skip
    columns = [column for column, width in enumerate(widths) if width >= 1]
    rows = [[figure.add_subplot(grid[row, column]) for column in columns] for row in range(len(first))]
    for panel in (panel for row in rows for panel in row):
        panel.set_axis_off()
    for column, panel in enumerate(rows[0][1:]):
        panel.set_title(heads[column % len(heads)], fontsize=9, pad=3)
    for at, title in enumerate(titles):
        spots = [rows[0][1 + at * len(heads) + side].get_position() for side in (0, len(heads) - 1)]
        figure.text((spots[0].x0 + spots[1].x1) / 2, 1, title, ha="center", va="top", fontsize=10, weight="bold")
    return figure, rows


def _photo(axes: Axes, taken: Sequence[Shot], colours: Sequence[str], boxes: bool = True) -> None:
    axes.imshow(taken[0].pixels)
    thick = 2.5 if len(taken) == 1 else 4.5
    for at, (shot, colour) in enumerate(zip(taken if boxes else (), colours, strict=False)):
        shot.box(axes, "chosen", colour, thick / (1 + at))  # the same box of both is seen twice
    for truth in taken[0].about["truth"]:
        _rectangle(axes, truth, TRUE, 1.0)


def _steps(axes: Sequence[Axes], shot: Shot) -> None:
    degrees, similarity, expansion = shot.maps
    shot.show(axes[0], 1 - degrees, "magma", float(1 - degrees.max()), float(1 - degrees.min()) + 1e-6)
    _signed(axes[1], shot, similarity)
    _signed(axes[2], shot, expansion)
    for panel in axes:
        shot.seed(panel, "chosen")
    shot.box(axes[2], "chosen", TRUE)


def _signed(axes: Axes, shot: Shot, values: NDArray[np.float32]) -> None:
    """What counts is the sign; strong colours where most patches are, not where a few are extreme."""
    most = float(np.quantile(np.abs(values), 0.95)) or 1.0
    shot.show(axes, values, "RdBu_r", -most, most)


def _rectangle(axes: Axes, box: Sequence[float], colour: str, width: float) -> None:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = box
    for wider, shade in ((1.6, "white"), (0.0, colour)):  # seen before any background
        axes.add_patch(
            Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=shade, linewidth=width + wider)
        )


def _colour_name(place: int) -> str:
    return ("blue", "orange", "green", "pink", "yellow", "light blue")[place % len(COLOURS)]
