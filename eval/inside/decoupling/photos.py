"""The finding L5: attention maps of CLS, and how much of what it reads comes from the patches of the map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.inside.decoupling import drawing
from eval.inside.decoupling.measure import ROW
from eval.inside.decoupling.telling import basis, chosen, details, each_says, last, names, number
from eval.inside.finding import Album, Finding, Picture, Seen, counted

FAITHFUL = 0.9  # mean cosine from which is said that patches give nearly the direction of all that is read


def tell_photos(seen: Sequence[Seen], album: Album) -> Finding | None:
    """L5; None where there are no photos."""
    having = [each for each in seen if "photos" in each.arrays]
    if not having:
        return None
    *fewer, most = sorted({len(each.arrays["photos"]) for each in having})
    count = " or ".join([*map(str, fewer), counted(most, "photo")])
    pictures = [_draw_photos(group, album, at) for at, group in enumerate(_same_photos(having))]
    return Finding(
        "L5", "A clean map need not be a faithful one",
        "An attention map shows which patches are read. Is what is read from them what CLS becomes?",
        each_says(seen, _photos_say),
        "DINOv2-g with registers: an image with a clean attention map, whose patches alone give an output with a "
        "cosine of −0.0092 to the whole.",
        f"{count}; means are over all: {basis(seen)}", pictures,
        how=["A cosine near 1 says that patches together give what is read, and not that bright ones give more of it "
             "than dark ones. What all images have in common counts for it; CKA (L3) leaves that out.",
             "Brightness is scaled for each map, from the patch that is read least to the one that is read most, but "
             "for the brightest 1 %. Below it, the smallest and the largest weight by the mean of the map.",
             *chosen(seen)],
    )  # fmt: skip


def _same_photos(seen: Sequence[Seen]) -> list[list[Seen]]:
    """Networks that were shown the same photos share a figure."""
    alike: dict[tuple[str, ...], list[Seen]] = {}
    for each in seen:
        alike.setdefault((str(each.evaluation.data["hash"]), *details(each)["photos"]), []).append(each)
    return list(alike.values())


def _draw_photos(group: Sequence[Seen], album: Album, at: int) -> Picture:
    maps = [each.arrays["maps"] for each in group]
    texts = [_under(_cosines(each), each.arrays["maps"]) for each in group]
    figure = drawing.photo_maps(names(group), group[0].arrays["photos"], maps, texts)
    caption = (
        "What CLS attends to in the last layer, mean over heads, and the cosine between what it reads from patches and "
        "all that it reads. The nearer to 0, the less the map says of CLS."
    )
    return album.save(figure, f"L5_photos_{at + 1}" if at else "L5_photos", caption)


def _cosines(each: Seen) -> NDArray[Any]:
    """Of what is read from patches to all that is read, a photo each."""
    return each.arrays["photo_rows"][:, ROW.index("cosine_patches")]


def _under(cosines: NDArray[Any], maps: NDArray[Any]) -> list[str]:
    """Under each map: how uneven it is, and the cosine."""
    said = []
    for cosine, each in zip(cosines, maps, strict=True):
        told = number(float(cosine)) if np.isfinite(cosine) else "–"
        even = f"{each.min() / each.mean():.2g} to {each.max() / each.mean():.2g} × the mean" if each.any() else "all 0"
        said.append(f"cosine {told}\n{even}")
    return said


def _photos_say(each: Seen) -> str:
    if "photos" not in each.arrays:
        return "no photos"
    known = _cosines(each)[np.isfinite(_cosines(each))]
    if not len(known):
        return "nothing is read from patches"
    said = f"the cosine is {number(float(known.min()))} to {number(float(known.max()))} on these photos"
    mean = last(each, "cosine_patches")
    said += f", and {number(mean)} on average over all images"
    return said + ("; patches alone give nearly the same direction" if mean is not None and mean > FAITHFUL else "")
