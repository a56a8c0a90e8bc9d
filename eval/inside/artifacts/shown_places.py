"""1.3 and 1.12: what is beside outliers, and where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.inside.artifacts import drawing
from eval.inside.artifacts.telling import basis, details, each_says, interval, names, number
from eval.inside.finding import Album, Finding, Picture, Seen, counted, percent


def tell_neighbours(seen: Sequence[Seen], album: Album) -> Finding:
    """1.3"""
    figure = drawing.cosine_densities(names(seen), [each.arrays["cosines"] for each in seen])
    protocol = seen[0].evaluation.protocol
    pairs = "each pair of neighbours counts" if protocol["neighbours"] == "pairs" else "the mean over its neighbours"
    border = "with the neighbours they have" if protocol["neighbours_border"] else "not at all"
    after = "after" if protocol["neighbours_embedded"] else "before"
    return Finding(
        "1.3", "Do outliers sit where there is nothing new to see?",
        "Are outliers patches that look like the patches beside them, before the network has looked at anything?",
        each_says(seen, _neighbours_say),
        "In DINOv2 ViT-g outliers are very similar to their neighbours, with cosines piled up near 1; normal "
        "patches spread out.",
        basis(seen),
        [album.save(figure, "1.3_neighbours", "Cosine of a patch to its neighbours after the patch embedding.")],
        ["network", "normal", "outliers", "AUROC", "95 % interval"],
        [_neighbours_row(each) for each in seen],
        [f"Cosine of a patch to those above, below, left and right ({pairs}), {after} positions were added; patches "
         f"on the border count {border}.",
         "AUROC: the chance that an outlier is more like its neighbours than a normal patch is. 0.5 is chance."],
    )  # fmt: skip


def _neighbours_say(each: Seen) -> str:
    found = details(each)["neighbours"]["auroc"]
    if found is None:
        return "no outliers to compare"
    score = each.evaluation.scores["neighbour_auroc"]
    if score.low <= 0.5 <= score.high:
        return (
            "no difference can be told: an outlier is more like its neighbours than a normal patch in "
            f"{percent(found)} of the pairs, where half would be chance"
        )
    side = "more" if found > 0.5 else "less"
    return (
        f"an outlier is {side} like its neighbours than a normal patch in {percent(max(found, 1 - found))} of the pairs"
    )


def _neighbours_row(each: Seen) -> list[str]:
    told = details(each)["neighbours"]
    between = interval(each, "neighbour_auroc")
    return [each.name, f"{told['normal']:,}", f"{told['outlier']:,}", number(told["auroc"]), between]


def tell_places(seen: Sequence[Seen], album: Album) -> Finding:
    """1.12"""
    maps = [_rates(each, "places", "seen") for each in seen]
    means = [_rates(each, "place_norms", "seen") for each in seen]
    pictures: list[Picture] = []
    if any(each.any() for each in maps):
        shares = [100 * each for each in maps]
        figure = drawing.heat_maps(names(seen), shares, "% of images", min(3, len(seen)), drawing.from_zero(shares))
        pictures.append(album.save(figure, "1.12_places", "How often the token at each position is an outlier."))
    ratios = [_by_median(each) for each in means]
    scale = drawing.around_one(ratios)
    figure = drawing.heat_maps(names(seen), ratios, "mean norm / median", min(3, len(seen)), scale)
    pictures.append(album.save(figure, "1.12_norms", "Mean norm at each position, by the median over positions."))
    pictures += [picture for each in seen if "resampled" in details(each) for picture in _both_ways(each, album)]
    return Finding(
        "1.12", "Where in the image they are, and what resampling of positions has to do with it",
        "Do outliers prefer certain positions: the border, or every other column?",
        each_says(seen, lambda each: _places_say(each) + _resampled_say(each)),
        "Official DINOv2 resamples positions without antialiasing and has outliers in vertical stripes; with "
        "antialiasing the stripes are gone and a preference for the border stays. Some positions are outliers in "
        "more than 20 % of the images.",
        basis(seen), pictures,
        ["network", "seen with", "outliers", "border / inside", "95 % interval", "most at one place",
         "stripes of outliers", "stripes of norms"],
        [row for each in seen for row in (_places_row(each), *_resampled_rows(each))],
        ["Stripes: autocorrelation at lag 2 of the mean by column, less its best parabola; 1 for every other "
         "column, about 0 without a pattern, – for fewer than 6 columns.",
         "With and without antialiasing: the same network and cutoff, with images at a size for which positions "
         "must be resampled, and offset 0.",
         "The gradient is of the sum of all resampled positions by each learnt one (figure 11): where it is "
         "uneven, some learnt positions count for more than others."],
    )  # fmt: skip


def _rates(each: Seen, name: str, by: str) -> np.ndarray:
    """A map (h, w) of means over images."""
    grid = tuple(each.evaluation.protocol["grid"])
    return (each.arrays[name] / each.arrays[by]).reshape(grid)


def _by_median(norms: np.ndarray) -> np.ndarray:
    """1 everywhere where all are 0."""
    middle = float(np.median(norms))
    return norms / middle if middle else np.ones_like(norms)


def _both_ways(each: Seen, album: Album) -> list[Picture]:
    """With and without antialiasing, side by side: figures 10 and 11."""
    told = details(each)["resampled"]
    side, images = told["side"], told["told"][0]["images"]
    titles = ["antialiased", "not antialiased"]
    name = each.name.replace(" ", "_").replace("/", "_")
    norms = each.arrays["resampled_norms"].reshape(2, side, side) / images
    places = 100 * each.arrays["resampled_places"].reshape(2, side, side) / images
    ratios = [_by_median(both) for both in norms]
    columns = [("mean norm / median", ratios, drawing.around_one(ratios))]
    if places.any():
        columns.append(("% of images with an outlier", list(places), drawing.from_zero(places)))
    gradients = list(each.arrays["resampling_gradients"])
    columns.append(("weight of learnt positions", gradients, drawing.around_zero(gradients)))
    figure = drawing.map_columns(titles, columns)
    caption = (
        f"{each.name}: {side} x {side} patches of {counted(images, 'image')}, from {told['native']} x {told['native']}."
    )
    return [album.save(figure, f"1.12_antialias_{name}", caption)]


def _places_say(each: Seen) -> str:
    told = details(each)["places"]
    if not told["outliers"]:
        return "no outliers"
    ratio = told["border_ratio"]
    where = f"{number(ratio)} times as frequent on the border as inside" if ratio else "all of them on the border"
    return f"{counted(told['outliers'], 'outlier')}, {where}"


def _resampled_say(each: Seen) -> str:
    """The rest of a sentence."""
    protocol = each.evaluation.protocol
    if details(each)["rotary"]:
        return "; positions are rotary, so that nothing is resampled"
    if "resampled" not in details(each):
        return ""
    told = details(each)["resampled"]
    both = [_stripes(at) for at in told["told"]]
    said = (
        f"stripes of norms by column are {both[0]} with and {both[1]} without antialiasing" if "–" not in both else ""
    )
    native = "" if told["as_used"] else (
        f"; at {protocol['image_size']} pixels positions are used as they were learnt, and nothing is resampled"
    )  # fmt: skip
    return native + (f"; at {told['side']} x {told['side']} patches {said}" if said else "")


def _stripes(told: dict[str, Any]) -> str:
    return number(told["norm_stripes"]["columns"], 2)


def _places_row(each: Seen) -> list[str]:
    told, side = details(each)["places"], each.evaluation.protocol["grid"][0]
    what = f"{side} x {side} patches, {counted(told['images'], 'image')}"
    return _row(each.name, what, told, number(told["border_ratio"]), interval(each, "border_ratio"))


def _resampled_rows(each: Seen) -> list[list[str]]:
    if "resampled" not in details(each):
        return []
    found = details(each)["resampled"]
    size = f"{found['side']} x {found['side']} patches, {counted(found['told'][0]['images'], 'image')}"
    kinds = ("antialiased", "aliased")
    return [_row(each.name, f"{size}, {kind}", told, "", "") for kind, told in zip(kinds, found["told"], strict=True)]


def _row(name: str, what: str, told: dict[str, Any], ratio: str, between: str) -> list[str]:
    most = percent(told["most"]) if told["outliers"] else "–"
    return [
        name, what, f"{told['outliers']:,}", ratio, between, most,
        number(told["stripes"]["columns"], 2), _stripes(told),
    ]  # fmt: skip
