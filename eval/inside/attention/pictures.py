"""Draws attention maps of several networks side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eval.inside.finding import Album, Picture, Seen
from eval.inside.maps import BRIGHTEST, MOST_PHOTOS, WIDTH, bare, draw_map, draw_photo, fitting, numbered, sheet, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_OVERLAYS = 2  # networks beside one another for which there is room to lay maps over photos
HEADS_A_ROW = 8
LABELLED = 6  # tokens up to which each cell of a matrix holds its number
OUTLIER_COLOUR = "#00E5FF"


def cls_maps(seen: Sequence[Seen], at: int, album: Album) -> Picture:
    """Figures 1, 2, 8 and 19: a row a photo, and for each network the map of CLS, bare and over the photo.

    seen: networks that were shown the same photos.
    """
    each_has = ["map", "overlay"] if len(seen) <= MOST_OVERLAYS else ["map"]
    photos = seen[0].arrays["photos"][:MOST_PHOTOS]
    figure, axes = sheet(len(photos), 1 + len(each_has) * len(seen))
    for row, photo in zip(axes, photos, strict=True):
        draw_photo(row[0], photo)
    for place, each in enumerate(seen):
        for number, row in enumerate(axes):
            mine = row[1 + place * len(each_has) :]
            weights = each.arrays["photo_maps"][number, 0]
            draw_map(mine[0], weights)
            _mark(mine[0], each.arrays["photo_outliers"][number])
            mine[0].set_xlabel(_range(weights), fontsize=7, labelpad=2)
            if "overlay" in each_has:
                _overlay(mine[1], each.arrays["photos"][number], weights)
        title = axes[0][1 + place * len(each_has)]
        title.set_title(each.name, fontsize=fitting(each.name, WIDTH / len(axes[0])))
        if "overlay" in each_has:
            axes[0][2 + place * len(each_has)].set_title("over the photo", fontsize=8, color="0.4")
    axes[0][0].set_title("photo", fontsize=10)
    marked = any(each.arrays["photo_outliers"][: len(photos)].any() for each in seen)
    caption = (
        "What the class token attends to, mean over heads. Black is nothing, the brightest is as bright in each map; "
        "below it its lowest and highest weight, in units of what each patch would get if all got the same."
        + (" Framed: patches that are outliers by their norm." if marked else "")
    )
    return album.save(figure, numbered("attention_cls", at), caption)


def head_maps(each: Seen, at: int, album: Album) -> Picture:
    """Figure 18: the heads of CLS one by one, on one photo."""
    maps, told = each.arrays["photo_heads"][0], _told(each, "heads")
    columns = min(HEADS_A_ROW, len(maps) + 1)
    figure, axes = sheet(math.ceil((len(maps) + 1) / columns), columns)
    cells = axes.ravel()
    draw_photo(cells[0], each.arrays["photos"][0])
    for number, weights in enumerate(maps):
        draw_map(cells[1 + number], weights)
        _mark(cells[1 + number], each.arrays["photo_outliers"][0])
        mass = told[number]["outlier_mass"]
        cells[1 + number].set_title(f"head {number}", fontsize=8)
        if mass is not None:
            cells[1 + number].set_xlabel(f"{100 * mass:.2g} % on outliers", fontsize=7, labelpad=2)
    for cell in cells[1 + len(maps) :]:
        cell.set_visible(False)
    caption = f"{each.name}: the class token's attention in each head."
    if told[0]["outlier_mass"] is not None:
        caption += " Framed: outliers by their norm. Percentages are means over all images."
    return album.save(figure, f"attention_heads_{at}", caption)


def register_maps(each: Seen, at: int, album: Album) -> Picture:
    """Figure 9: CLS and some registers, a row a photo."""
    photos, maps = each.arrays["photos"][:MOST_PHOTOS], each.arrays["photo_maps"]
    shown: Any = each.details["shown"]
    figure, axes = sheet(len(photos), 2 + len(shown))
    for number, (row, photo) in enumerate(zip(axes, photos, strict=True)):
        draw_photo(row[0], photo)
        for cell, weights in zip(row[1:], maps[number], strict=True):
            draw_map(cell, weights)
            cell.set_xlabel(_range(weights), fontsize=7, labelpad=2)
    for cell, name in zip(axes[0], ["photo", "CLS", *(f"register {number}" for number in shown)], strict=True):
        cell.set_title(name, fontsize=10)
    caption = f"{each.name}: what the class token and the registers attend to, mean over heads."
    return album.save(figure, f"attention_registers_{at}", caption)


def average_maps(seen: Sequence[Seen], album: Album) -> Picture:
    """Figure 16: a row a network, a column a token; the average over all images."""
    columns = max(len(_shown_rows(each)) for each in seen)
    figure, axes = sheet(len(seen), columns, text=0.42)
    for row, each in zip(axes, seen, strict=True):
        average, tokens = each.arrays["average"], _told(each, "tokens")
        rows = _shown_rows(each)
        for cell, token in zip(row, rows, strict=False):
            cell.imshow(average[token], cmap="viridis")
            bare(cell)
            cell.set_title(tokens[token]["name"], fontsize=9)
            cell.set_xlabel(_range(average[token]), fontsize=7, labelpad=2)
        for cell in row[len(rows) :]:
            cell.set_visible(False)
        row[0].set_ylabel(each.name, fontsize=fitting(each.name, WIDTH / columns))
    caption = (
        "Attention to each place, averaged over all images and heads: what a token looks at whatever the image shows. "
        "Each map has its own scale; below it the lowest and highest weight, in units of an even one."
    )
    return album.save(figure, "attention_average", caption)


def similarities(seen: Sequence[Seen], album: Album) -> Picture:
    """How alike the maps of CLS and of the registers are, one pair of matrices a network, with the same limits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.78 * WIDTH, 0.36 * WIDTH * len(seen)), layout="constrained")
    axes = figure.subplots(len(seen), 2, squeeze=False)
    for column, (key, title) in enumerate(
        (("cosine", "cosine (1: alike)"), ("jensen_shannon", "Jensen-Shannon, bits (0: alike)"))
    ):
        matrices = [_matrix_of(each, key) for each in seen]
        least, most = min(each.min() for each in matrices), max(each.max() for each in matrices)
        low, high = (math.floor(10 * least) / 10, 1.0) if key == "cosine" else (0.0, math.ceil(10 * most) / 10 or 0.1)
        for row, each, values in zip(axes, seen, matrices, strict=True):
            drawn = _draw_matrix(row[column], values, (low, high), reverse=key != "cosine")
            row[column].set_title(f"{each.name}: {title}", fontsize=9)
            figure.colorbar(drawn, ax=row[column], shrink=0.85).ax.tick_params(labelsize=7)
    caption = "How alike the maps of two tokens are on the same image, averaged over all images. Dark: alike."
    return album.save(figure, "attention_similarity", caption)


def _matrix_of(each: Seen, key: str) -> NDArray[np.floating]:
    pairs: Any = each.details["pairs"]
    return np.array(pairs[key])


def _draw_matrix(axis: Axes, values: NDArray[np.floating], limits: tuple[float, float], reverse: bool) -> Any:
    """reverse: low numbers are dark."""
    low, high = limits
    names = ["CLS", *(str(number) for number in range(len(values) - 1))]
    drawn = axis.imshow(values, cmap="Blues_r" if reverse else "Blues", vmin=low, vmax=high)
    few = len(names) <= LABELLED
    axis.set_xticks(range(len(names)), names, fontsize=8 if few else 6, rotation=0 if few else 90)
    axis.set_yticks(range(len(names)), names, fontsize=8 if few else 6)
    axis.set_xlabel("register", fontsize=8)
    for (i, j), value in np.ndenumerate(values) if few else ():
        place = (value - low) / max(high - low, 1e-9)
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7,
                  color="w" if (place < 0.4 if reverse else place > 0.6) else "k")  # fmt: skip
    return drawn


def _overlay(axes: Axes, photo: NDArray[np.uint8], weights: NDArray[np.floating]) -> None:
    """The map over the photo in grey, so that colours are the map's alone."""
    side = photo.shape[-1]
    axes.imshow(photo.mean(0), cmap="gray", vmin=0, vmax=255)
    axes.imshow(
        weights, cmap="magma", alpha=0.6, extent=(-0.5, side - 0.5, side - 0.5, -0.5), interpolation="bilinear",
        vmin=0, vmax=float(np.quantile(weights, BRIGHTEST)),
    )  # fmt: skip
    bare(axes)


def _mark(axes: Axes, outliers: NDArray[np.bool_]) -> None:
    """Frames around the outliers of a map (h, w)."""
    from matplotlib.patches import Rectangle

    for row, column in np.argwhere(outliers):
        frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=OUTLIER_COLOUR, linewidth=0.7)
        axes.add_patch(frame)


def _range(weights: NDArray[np.floating]) -> str:
    """Lowest and highest weight in units of an even one."""
    even = float(weights.mean()) or 1.0
    low, high = float(weights.min()) / even, float(weights.max()) / even
    return f"{low:.2f} to {f'{high:.2f}' if high < 10 else times(high)} ×"


def _shown_rows(each: Seen) -> list[int]:
    """Rows of the average maps: CLS, the central patch, the shown registers."""
    shown: Any = each.details["shown"]
    return [0, len(each.arrays["average"]) - 1, *(1 + number for number in shown)]


def _told(each: Seen, key: str) -> list[dict[str, Any]]:
    told: Any = each.details[key]
    return told
