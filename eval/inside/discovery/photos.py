"""What LOST makes of a few photos, step by step, for figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from eval.inside.discovery.corloc import in_pixels
from eval.inside.discovery.images import Sized, resize
from eval.inside.discovery.judging import AT_CENTRED, AT_ZERO, Choice, Verdict
from eval.inside.discovery.lost import Maps, boxes_around
from eval.inside.discovery.search import Search

SIDE = 320  # pixels of the long side of a photo as it is drawn


@dataclass(frozen=True)
class Photo:
    """A photo and the maps of it.

    about: JSON values: its name, true boxes, and by setting ("published", "chosen", "q", "k", "v") the box that is
    found, in pixels of `pixels`, and the seed's (row, column) in patches. pixels: uint8 (h, w, 3). maps: (3, rows,
    columns), the share of the other patches with which each agrees, the dot product with the seed, the expansion;
    features: (F, rows, columns), the expansion of each feature. Maps reach over the padding.
    """

    about: dict[str, Any]
    pixels: NDArray[np.uint8]
    maps: NDArray[np.float32]
    features: NDArray[np.float32]


def choose_photos(verdict: Verdict, count: int) -> list[int]:
    """Places in the set, evenly spaced among images that were not used to choose and have true boxes."""
    outcome = verdict.outcome
    fit = ~outcome.empty & ~verdict.tuning if verdict.can_choose else ~outcome.empty
    places = outcome.places[fit]
    at = np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int)
    return [int(place) for place in places[np.unique(at)]]


def shown_choice(verdict: Verdict) -> Choice:
    """The setting whose maps are drawn: the chosen one, or the centred published one where none could be chosen."""
    return verdict.best_of_all() if verdict.can_choose else Choice(0, 0, AT_CENTRED)


def look_at(search: Search, verdict: Verdict, biases: Tensor, count: int) -> list[Photo]:
    """A few photos with what is found on them. biases: (L, F, S - 2)."""
    sized = Sized(search.images, search.sweep.sight)
    found = []
    for place in choose_photos(verdict, count):
        pixels, size = sized[place]
        if all(size):  # it could be read before
            found.append(_look(search, verdict, biases, place, pixels))
    return found


def _look(search: Search, verdict: Verdict, biases: Tensor, place: int, pixels: Tensor) -> Photo:
    sweep, shown = search.sweep, shown_choice(verdict)
    height, width = pixels.shape[1:]
    grid = sweep.sight.grid((height, width))
    told: dict[tuple[int, int], Maps] = {}
    for each in sweep.features(pixels[None].to(search.context.device)):
        if each.block in (0, shown.block):
            own = biases[each.block, each.kind].to(each.patches.device)
            told[each.block, each.kind] = sweep.maps(each.patches, own)
    photo = search.images.read(place)
    size = photo.shape[1:]
    factor = min(1.0, SIDE / max(size))
    drawn = max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
    settings = {"published": Choice(0, 0, AT_ZERO), "chosen": shown}
    by_feature = {name: _for_feature(verdict, shown, at) for at, name in enumerate(sweep.names)}
    boxes = {
        name: _box(told[choice.block, choice.feature], choice.bias, sweep.sight.patch, grid, (height, width), drawn)
        for name, choice in (settings | by_feature).items()
    }
    truth = search.images.entries[place].boxes
    row = verdict.outcome.places.tolist().index(place)
    scale = np.array([drawn[1] / size[1], drawn[0] / size[0]] * 2)
    right = {name: bool(verdict.right(choice)[row]) for name, choice in settings.items()}
    about = {"name": search.images.entries[place].file.name, "truth": (truth * scale).round(1).tolist(), "right": right}
    about |= {"found": boxes, "seen": [height, width], "patch": sweep.sight.patch}
    maps = told[shown.block, shown.feature]
    steps = [maps.degrees / max(1, maps.degrees.shape[-1] - 1), maps.similarity, maps.expansion]
    parts = [_on_grid(step, shown.bias, grid) for step in steps]
    expansions = [
        _on_grid(told[choice.block, choice.feature].expansion, choice.bias, grid) for choice in by_feature.values()
    ]
    image = resize(photo, drawn).permute(1, 2, 0).contiguous().numpy()
    return Photo(about, image, np.stack(parts), np.stack(expansions))


def _for_feature(verdict: Verdict, shown: Choice, feature: int) -> Choice:
    """The best that a feature of the same block can do, as far as that is known."""
    return verdict.best(shown.block, feature) if verdict.can_choose else Choice(shown.block, feature, AT_CENTRED)


def _on_grid(maps: Tensor, bias: int, grid: tuple[int, int]) -> NDArray[np.float32]:
    """(1, S, N) -> (rows, columns)."""
    return maps[0, bias].float().cpu().unflatten(0, grid).numpy()


def _box(maps: Maps, bias: int, patch: int, grid: tuple[int, int], seen: tuple[int, int],
         drawn: tuple[int, int]) -> dict[str, Any]:  # fmt: skip
    boxes, outside = boxes_around(maps.masks[0, bias], maps.seeds[0, bias], grid)
    seed = int(maps.seeds[0, bias])
    box = in_pixels(boxes, patch, seen, drawn).round(1).tolist()
    return {"box": box, "seed": list(divmod(seed, grid[1])), "outside": bool(outside)}


def as_arrays(photos: list[Photo]) -> dict[str, NDArray[Any]]:
    """For arrays.npz, by number."""
    parts = ("pixels", "maps", "features")
    return {f"photo{at}_{part}": vars(photo)[part] for at, photo in enumerate(photos) for part in parts}
