"""Maps of a few photos, in a higher resolution than that of the measurements, so that something is seen on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoreg.config import ConfigError
from eval.compute import autocast
from eval.inside.finding import Seen, counted
from eval.inside.look import Look, LookConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

R = TypeVar("R")
WIDTH = 9.0  # inches of a page
MOST_PHOTOS = 4  # rows of a figure
FINER = 2  # times the image size; the paper's maps are "calculated in high resolution"
BRIGHTEST = 0.99  # quantile of a map that is drawn brightest: a few patches may take so much that all others are black


@dataclass
class MapConfig(LookConfig):
    """Options of experiments whose outcome is mostly a map."""

    layer: int = -1  # block that is looked at, as an index into a list
    map_size: int = 0  # pixels of the photos whose maps are drawn; 0 = twice image_size

    def check(self) -> None:
        """Raises ConfigError."""
        super().check()
        if self.map_size < 0:
            raise ConfigError("must be at least 0", "map_size")


def choose_map_size(look: Look, asked: int) -> int:
    """A multiple of the patch size. Raises ConfigError where the asked one is none."""
    if asked % look.backbone.patch_size:
        raise ConfigError(f"{asked} pixels are not tiled by patches of {look.backbone.patch_size}", "map_size")
    return asked or FINER * look.size


def of_each_photo(look: Look, size: int, measure: Callable[[Tensor], R]) -> tuple[Tensor, list[str], list[R]]:
    """The photos (uint8, (n, 3, size, size)), their names, and what `measure` finds in each.

    measure: of normalised images (1, 3, size, size) on the device. The main rank computes, and tells the others.
    """

    @torch.no_grad()
    def compute() -> tuple[Tensor, list[str], list[R]]:
        pixels, names = look.photos(size)
        with autocast(look.context.device, look.precision):
            return pixels, names, [measure(look.prepare(photo[None])) for photo in pixels]

    return look.context.ranks.from_main(compute)


def sheet(rows: int, columns: int, text: float = 0.18) -> tuple[Figure, NDArray[Any]]:
    """A figure with axes (rows, columns), squares that fill the width of a page, or less where there are few.

    text: inches above and below the squares of each row.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    side = min(WIDTH / columns, 2.0)
    close = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03, wspace=0.01, hspace=0.01)
    figure = Figure(figsize=(side * columns, (side + text) * rows + 0.25), layout=close)
    axes: NDArray[Any] = figure.subplots(rows, columns, squeeze=False)
    return figure, axes


def fitting(text: str, width: float) -> float:
    """The size of letters, in points, at which a line is no wider than so many inches."""
    return max(5.0, min(10.0, 72 * width / (0.6 * max(1, len(text)))))


def basis(seen: Sequence[Seen]) -> str:
    """On how many images and tokens figures stand; said once where that is the same for all networks."""
    said = []
    for each in seen:
        details: Any = each.details
        images, patches = details["images"], details["patches"]
        said.append(f"{counted(images, 'image')} of {patches:,} patches ({images * patches:,} in all)")
    if len(set(said)) == 1:
        return said[0] + (", for each network" if len(said) > 1 else "")
    return "; ".join(f"{each.name}: {text}" for each, text in zip(seen, said, strict=True))


def of_same_photos(seen: Sequence[Seen]) -> list[list[Seen]]:
    """Networks that may stand side by side in a row for each photo; those that have photos at all."""
    groups: dict[tuple[str, ...], list[Seen]] = {}
    for each in seen:
        names: Any = each.details["photos"]
        if names:
            groups.setdefault((each.evaluation.data["hash"], *names), []).append(each)
    return list(groups.values())


def numbered(name: str, at: int) -> str:
    """Of the first figure of a kind, and of further ones."""
    return f"{name}_{at}" if at else name


def times(value: float, digits: int = 3) -> str:
    """A number of which so many digits count, without powers of ten: 0.0123, 1.23, 12,300."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10**digits else f"{rounded:.{digits}g}"


def draw_photo(axes: Axes, photo: NDArray[np.uint8]) -> None:
    """uint8 (3, H, W), without ticks."""
    axes.imshow(photo.transpose(1, 2, 0))
    bare(axes)


def draw_map(axes: Axes, weights: NDArray[np.floating], colours: str = "magma") -> None:
    """A map (h, w) of weights without ticks, from 0, so that an even one looks even, to nearly its highest."""
    axes.imshow(weights, cmap=colours, vmin=0, vmax=float(np.quantile(weights, BRIGHTEST)))
    bare(axes)


def bare(axes: Axes) -> None:
    """Nothing but the picture."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
