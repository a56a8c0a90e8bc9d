"""Tells what the strongest directions among patch tokens show: section 1.11 of the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dinoreg.models.maps import component_colours
from eval.inside.features.measures import SIGMAS
from eval.inside.finding import COLOURS, Album, Finding, Picture, Seen, counted, percent
from eval.inside.maps import MOST_PHOTOS, WIDTH, bare, basis, draw_photo, fitting, numbered, of_same_photos, sheet
from eval.results import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WAYS = (("own_maps", "by itself"), ("joint_maps", "all together"))
MUCH = 50.0  # percent of the first component that a single number explains: it is mostly that


def findings(seen: Sequence[Seen], album: Album) -> list[Finding]:
    """One section."""
    together = of_same_photos(seen)
    pictures = [draw(group, at, album) for draw in (first_maps, colour_maps) for at, group in enumerate(together)]
    return [
        Finding(
            "1.11",
            "What tells patches apart",
            "The tokens of an image's patches are put in order along the direction in which they differ most. Does "
            "that order follow the things on the photo?",
            " ".join(map(_told, seen)),
            "The paper's figure 20 (15 in its first version) shows this map, and gives no figures for it. Its figure "
            "17 shows three components of MAE, which has no artifacts: the authors suppose because it learns from "
            "patches alone.",
            basis(seen),
            [*pictures, spectrum(seen, album)],
            ["network", "first component, each image by itself", "first three", "beyond 3 σ",
             "like its neighbours", "explained by the norm", "all images: first", "explained by place", "by norm"],
            list(map(_row, seen)),
            how=[
                *map(_setting, seen),
                "A component is scaled by its standard deviation, over the photo or over all photos, and clipped at ±3 "
                "of them (colours of three components at ±2.3). Signs of components are arbitrary: they are chosen so "
                "that the skew is positive, and colours that are swapped between networks mean nothing.",
                "The paper does not say whether components were those of each image or of all; both are shown. All "
                f"together, in the pictures, means {_photos(seen)}, of which at most {MOST_PHOTOS} are shown; "
                "in the table and the curve, all images.",
                "Like its neighbours: correlation of the first component of patches beside one another, 0 where the "
                "map is noise.",
                "Explained by the norm, each image by itself: squared correlation with the length of the token before "
                "the final norm; by chance it is one in the number of patches. All images: share of the variance that "
                "is between places of the grid, or between norms, corrected for chance.",
            ],
        )
    ]  # fmt: skip


def first_maps(seen: Sequence[Seen], at: int, album: Album) -> Picture:
    """Figure 20: the first component, whitened, in diverging colours."""

    def draw(axes: Axes, scores: NDArray[np.floating]) -> Any:
        return axes.imshow(scores[..., 0], cmap="coolwarm", vmin=-SIGMAS, vmax=SIGMAS)

    caption = (
        "The first principal component of the patch tokens, in standard deviations: of each photo by itself, and with "
        "the same direction for all photos. Patches of the same colour are alike in that direction."
    )
    return _maps(seen, album, draw, numbered("features_first", at), caption, "standard deviations")


def colour_maps(seen: Sequence[Seen], at: int, album: Album) -> Picture:
    """Figure 17: the first three components as red, green and blue."""

    def draw(axes: Axes, scores: NDArray[np.floating]) -> None:
        axes.imshow(component_colours(torch.from_numpy(scores)).numpy())

    caption = "The first three components as red, green and blue, of each photo by itself, and of all photos together."
    return _maps(seen, album, draw, numbered("features_colours", at), caption)


def _maps(
    seen: Sequence[Seen], album: Album, draw: Callable[[Axes, NDArray[np.floating]], Any], name: str, caption: str,
    scale: str = "",
) -> Picture:  # fmt: skip
    """A row a photo; for each network a column each way."""
    photos = seen[0].arrays["photos"][:MOST_PHOTOS]
    figure, axes = sheet(len(photos), 1 + len(WAYS) * len(seen))
    drawn = None
    for number, row in enumerate(axes):
        draw_photo(row[0], photos[number])
        cells = iter(row[1:])
        for each in seen:
            for key, _ in WAYS:
                cell = next(cells)
                drawn = draw(cell, each.arrays[key][number])
                bare(cell)
    width = WIDTH / len(axes[0])
    for at, each in enumerate(seen):
        for column, (_, way) in enumerate(WAYS):
            # The name is over both of its columns.
            over = "" if column else each.name
            cell = axes[0][1 + at * len(WAYS) + column]
            cell.set_title(f"{over}\n{way}", fontsize=min(fitting(way, width), fitting(over, 2 * width)), loc="left")
    axes[0][0].set_title("photo", fontsize=9)
    if drawn is not None and scale:
        bar = figure.colorbar(drawn, ax=axes, location="bottom", shrink=0.35, aspect=40, pad=0.01)
        bar.set_label(scale, fontsize=8)
        bar.ax.tick_params(labelsize=8)
    return album.save(figure, name, caption)


def spectrum(seen: Sequence[Seen], album: Album) -> Picture:
    """Share of the variance that so many components hold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.subplots()
    for at, each in enumerate(seen):
        held = 100 * each.arrays["spectrum"].cumsum()
        axes.plot(np.arange(1, len(held) + 1), held, color=COLOURS[at % len(COLOURS)], label=each.name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("components, of all images together")
    axes.set_ylabel("variance that they hold, %")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    caption = "How many directions it takes to tell the patches of all images apart."
    return album.save(figure, "features_spectrum", caption)


def _told(each: Seen) -> str:
    scores, joint = each.evaluation.scores, _joint(each)
    first, beyond, norm = (
        scores[name].value for name in ("first_component", "first_beyond_3_sigma", "first_explained_by_norm")
    )
    smooth = scores["first_neighbour_correlation"].value
    said = (
        f"{each.name}: within an image, the first component holds {first:.0f} % of what tells patches apart; "
        f"neighbours agree in it with a correlation of {smooth:.2f}, {beyond:.2g} % of the patches are beyond 3 σ, and "
        f"norms explain {norm:.0f} % of it"
    )
    if norm > MUCH:
        said += ": it mostly says how long tokens are"
    if 100 * joint["of_place"] > MUCH:
        said += f". Over all images, it mostly says where a patch lies ({percent(joint['of_place'])})"
    return said + "."


def _row(each: Seen) -> list[str]:
    scores, joint = each.evaluation.scores, _joint(each)
    return [
        each.name,
        _text(scores["first_component"], " %"),
        _text(scores["first_three_components"], " %"),
        _text(scores["first_beyond_3_sigma"], " %"),
        _text(scores["first_neighbour_correlation"], ""),
        _text(scores["first_explained_by_norm"], " %"),
        percent(joint["first"]),
        percent(joint["of_place"]),
        percent(joint["of_norm"]),
    ]


def _text(score: Score, unit: str) -> str:
    return f"{score.value:.3g}{unit} ({score.low:.3g} to {score.high:.3g})"


def _setting(each: Seen) -> str:
    details: Any = each.details
    norm = "after" if details["norm"] else "without"
    return (
        f"{each.name}: patch tokens of layer {details['layer'] + 1} of {details['depth']}, {norm} the final norm, "
        f"{details['width']} numbers each. Maps of photos are computed at {details['map_size']} pixels."
    )


def _photos(seen: Sequence[Seen]) -> str:
    kept: Any = [each.details["photos"] for each in seen]
    return " or ".join(dict.fromkeys(counted(len(names), "photo") for names in kept))


def _joint(each: Seen) -> dict[str, float]:
    joint: Any = each.details["joint"]
    return joint
