"""The findings 1.1 to 1.6 and 1.12, as they are told and drawn side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from eval.inside.artifacts import drawing
from eval.inside.artifacts.bins import share_above
from eval.inside.finding import Album, Finding, Picture, Seen, counted, percent


def findings(seen: Sequence[Seen], album: Album) -> list[Finding]:
    """For one network or several side by side."""
    tellers: list[Callable[[Sequence[Seen], Album], Finding | None]] = [
        tell_norms, tell_layers, tell_neighbours, tell_types, tell_places,
    ]  # fmt: skip
    return [finding for tell in tellers if (finding := tell(seen, album)) is not None]


def details(seen: Seen) -> dict[str, Any]:
    """Of one network, as its experiment left them."""
    return dict(seen.details)


def cutoff(seen: Seen) -> float | None:
    return details(seen)["cutoff"]["value"]


def basis(seen: Sequence[Seen]) -> str:
    """How many images and tokens the figures stand on."""
    said = [
        f"{counted(details(each)['norms']['images'], 'image')}, "
        f"{counted(details(each)['norms']['tokens'], 'patch token')}"
        for each in seen
    ]
    if len(set(said)) == 1:
        return said[0] + (" for each network" if len(seen) > 1 else "")
    return "; ".join(f"{each.name}: {what}" for each, what in zip(seen, said, strict=True))


def number(value: float | None, digits: int = 3) -> str:
    """With so many digits that count; "–" where it is undefined."""
    return "–" if value is None else f"{value:,.{digits}g}"


def of(count: int) -> str:
    """Of outliers, for sentences."""
    return counted(count, "outlier") if count else "no outlier"


def each_says(seen: Sequence[Seen], say: Callable[[Seen], str]) -> str:
    """A sentence for each network, with its name where there are several."""
    if len(seen) == 1:
        said = say(seen[0])
        return said[0].upper() + said[1:] + "."
    return " ".join(f"{each.name}: {say(each)}." for each in seen)


def tell_norms(seen: Sequence[Seen], album: Album) -> Finding:
    """1.1"""
    tables = [each.arrays["layers"][details(each)["layer"], 1] for each in seen]
    cutoffs = [cutoff(each) for each in seen]
    medians = [details(each)["norms"]["percentiles"]["0.5"] for each in seen]
    pictures = [
        album.save(
            drawing.norm_histograms(names(seen), tables, cutoffs), "1.1_histogram",
            "How long the tokens of patches are, before the final norm. A second hump far to the right is artifacts.",
        )
    ]  # fmt: skip
    if all(len(each.arrays["photos"]) for each in seen):
        photos = [each.arrays["photos"] for each in seen]
        maps = [each.arrays["photo_norms"] for each in seen]
        pictures.append(
            album.save(
                drawing.norm_maps(names(seen), photos, maps, medians), "1.1_maps",
                "Norms of the tokens of these photos by the median of all images; single bright patches are artifacts.",
            )
        )  # fmt: skip
    return Finding(
        "1.1", "Tokens that stand out by their norm",
        "Are a few patch tokens far longer than the rest?",
        each_says(seen, _norms_say),
        "DINOv2 ViT-g: 2.37 % of the patch tokens are longer than 150 while the rest lie below 100, about ten times as "
        "long as the others. DINO ViT-B shows no such tokens [P].",
        basis(seen), pictures,
        ["network", "median", "99.9 %", "largest", "outliers", "95 % interval", "beyond mean + 3 std", "two clouds?"],
        [_norms_row(each) for each in seen],
        _norms_how(seen),
    )  # fmt: skip


def _norms_say(each: Seen) -> str:
    told, cut = details(each)["norms"], details(each)["cutoff"]
    if not told["outliers"]:
        return f"no patch stands out; {cut['how']}"
    share = told["outliers"] / told["tokens"]
    images = percent(told["images_with"] / told["images"])
    return (
        f"{percent(share)} of the patches stand out with a norm beyond {number(cut['value'], 4)} (the median is "
        f"{number(told['percentiles']['0.5'])}), in {images} of the images"
    )


def _norms_row(each: Seen) -> list[str]:
    told = details(each)["norms"]
    score = each.evaluation.scores["outlier_share"]
    clouds, at = told["clouds"], told["percentiles"]
    ratio = f"yes, {clouds['centres'][1] / clouds['centres'][0]:.3g} times as long" if clouds["two"] else "no"
    return [
        each.name, number(at["0.5"]), number(at["0.999"]), number(at["1.0"]),
        percent(told["outliers"] / told["tokens"]), f"{score.low:.2g} to {score.high:.2g} %", percent(told["rules"]["3std"]["share"]), ratio,
    ]  # fmt: skip


def _norms_how(seen: Sequence[Seen]) -> list[str]:
    said = [
        "Norms are of the residual stream, before the final norm, which would hide them.",
        "Two clouds: two Gaussians on the logarithms of norms are better than one by BIC, and their sum "
        "has two peaks with a "
        "valley at most half as deep as the lower one. BIC alone calls any skewed cloud two where there "
        "are many tokens.",
        "Outliers, by the valley: a minority of tokens, around a norm at least 1.5 times that of the others.",
    ]
    for each in seen:
        cut, layer = details(each)["cutoff"], details(each)["layer"]
        on = f", found on {counted(cut['images'], 'image')}" if cut["images"] else ""
        said.append(f"{each.name}: layer {layer}; {cut['how']}{on}; with it every token of every image was counted.")
    return said


def tell_layers(seen: Sequence[Seen], album: Album) -> Finding:
    """1.2"""
    tables = [each.arrays["layers"] for each in seen]
    told = [details(each)["layers"] for each in seen]
    figure = drawing.layer_histograms(names(seen), tables, told, [cutoff(each) for each in seen])
    pictures = [
        album.save(
            figure, "1.2_layers", "Norms of patch tokens after each half of each layer; colours are shares of tokens."
        )
    ]
    return Finding(
        "1.2", "Where in the network, when in training, and in which size they appear",
        "In which layer do outliers part from the others, and is it attention or the feed-forward that lengthens them?",
        each_says(seen, _layers_say),
        "In DINOv2 ViT-g (40 layers) they part around layer 15, after a third of the training, and only "
        "the sizes L, H and g "
        "have them. In DINOv2 ViT-L the feed-forward of layer 17 makes them, in OpenCLIP ViT-B/16 that of "
        "layer 6 (Jiang "
        "et al. 2025) [P].",
        basis(seen), pictures,
        ["network", "width x layers", "outliers", "made by", "growth there", "times as long in the end"],
        [_layers_row(each) for each in seen],
        ["The layer is where the median norm of the patches that are outliers grows most against that of "
         "the others; layers "
         "count from 0."],
    )  # fmt: skip


def _layers_say(each: Seen) -> str:
    rise = details(each)["layers"]["rise"]
    if rise is None:
        return "no outliers, so that no layer makes them"
    return (
        f"the {rise['branch']} of layer {rise['layer']} lengthens outliers from {number(rise['before'])} to "
        f"{number(rise['after'])} times the norm of other patches"
    )


def _layers_row(each: Seen) -> list[str]:
    told, built = details(each), each.evaluation.content.get("architecture", {})
    rise = told["layers"]["rise"]
    size = f"{built.get('embed_dim', '?')} x {built.get('depth', '?')}"
    share = percent(told["norms"]["outliers"] / told["norms"]["tokens"])
    if rise is None:
        return [each.name, size, share, "–", "–", "–"]
    growth = f"{rise['after'] / rise['before']:.3g} times"
    return [each.name, size, share, f"{rise['branch']} of layer {rise['layer']}", growth, number(rise["in_the_end"])]


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
        "In DINOv2 ViT-g outliers are very similar to their neighbours, with cosines piled up near 1; "
        "normal patches spread "
        "out [P].",
        basis(seen),
        [album.save(figure, "1.3_neighbours", "Cosine of a patch to its neighbours after the patch embedding.")],
        ["network", "normal", "outliers", "AUROC", "95 % interval"],
        [_neighbours_row(each) for each in seen],
        [f"Cosine of a patch to those above, below, left and right ({pairs}), {after} positions were "
         f"added; patches on the "
         f"border count {border}.",
         "AUROC: the chance that an outlier is more like its neighbours than a normal patch is. 0.5 is chance."],
    )  # fmt: skip


def _neighbours_say(each: Seen) -> str:
    found = details(each)["neighbours"]["auroc"]
    if found is None:
        return "no outliers to compare"
    side = "more" if found > 0.5 else "less"
    return (
        f"an outlier is {side} like its neighbours than a normal patch in {percent(max(found, 1 - found))} of the pairs"
    )


def _neighbours_row(each: Seen) -> list[str]:
    told, score = details(each)["neighbours"], each.evaluation.scores.get("neighbour_auroc")
    interval = f"{score.low:.2f} to {score.high:.2f}" if score else "–"
    return [each.name, f"{told['normal']:,}", f"{told['outlier']:,}", number(told["auroc"]), interval]


def tell_types(seen: Sequence[Seen], album: Album) -> Finding:
    """1.6"""
    reference = reference_of(seen)
    tables = [
        {"patches": each.arrays["layers"][details(each)["layer"], 1]}
        | {told["type"]: row for told, row in zip(details(each)["types"], each.arrays["types"], strict=True)}
        for each in seen
    ]
    shared = cutoff(reference) if reference else None
    figure = drawing.type_strips(names(seen), tables, shared)
    caption = (
        "Norms by type of token: line from 1 to 99 %, box from 25 to 75 %, bar at the median, dot at the largest. "
        + ("Dashed: the cutoff of the network without registers." if shared else "")
    )
    rows = [_type_row(each, told, tables[at], shared) for at, each in enumerate(seen) for told in _all_types(each)]
    return Finding(
        "1.6", "Norms by type of token, with and without registers",
        "Do registers take over: are patches then free of outliers, and which tokens are long instead?",
        each_says(seen, lambda each: _types_say(each, reference)),
        "For DINOv2, OpenCLIP and DeiT-III the outliers among patches are gone with registers; high norms "
        "are left in some "
        "registers only, about the same in every image [P].",
        basis(seen), [album.save(figure, "1.6_types", caption)],
        ["network", "token", "median", "1 to 99 %", "largest", "variation (CV)", "beyond the cutoff"],
        rows,
        ["CV: standard deviation over images divided by the mean. 'Beyond the cutoff': with the cutoff of "
         "the first network "
         "without registers that has one, for all networks, read off histograms whose bins are 1.1 % "
         "wide; '–' where there "
         "is none."],
    )  # fmt: skip


def reference_of(seen: Sequence[Seen]) -> Seen | None:
    """The first network without registers that has a cutoff."""
    return next((each for each in seen if not each.evaluation.registers and cutoff(each) is not None), None)


def _all_types(each: Seen) -> list[dict[str, Any]]:
    patches = {"type": "patches", "cv": None, "percentiles": details(each)["norms"]["percentiles"]}
    return [patches, *details(each)["types"]]


def _type_row(each: Seen, told: dict[str, Any], tables: dict[str, Any], shared: float | None) -> list[str]:
    at = told["percentiles"]
    beyond = None if shared is None else share_above(tables[told["type"]], shared)
    return [
        each.name, told["type"], number(at["0.5"]), f"{number(at['0.01'])} to {number(at['0.99'])}", number(at["1.0"]),
        number(told["cv"], 2), "–" if beyond is None else percent(beyond),
    ]  # fmt: skip


def _types_say(each: Seen, reference: Seen | None) -> str:
    types = {told["type"]: told["percentiles"]["0.5"] for told in details(each)["types"]}
    patches = details(each)["norms"]["percentiles"]["0.5"]
    said = []
    if reference is not None and each is not reference:
        table = each.arrays["layers"][details(each)["layer"], 1]
        rate = share_above(table, cutoff(reference)) or 0.0
        said.append(
            f"{percent(rate)} of the patches are beyond the cutoff {number(cutoff(reference))} of {reference.name}"
        )
    registers = {kind: value for kind, value in types.items() if kind.startswith("register")}
    if registers and patches:
        longest = max(registers, key=lambda kind: registers[kind] or 0)
        said.append(f"the longest is {longest}, {registers[longest] / patches:.3g} times as long as the median patch")
    if not registers:
        said.append(
            f"there are no registers; CLS is {(types['CLS'] or 0) / patches:.3g} times as long as the median patch"
        )
    return "; ".join(said)


def tell_places(seen: Sequence[Seen], album: Album) -> Finding:
    """1.12"""
    maps = [each.arrays["places"] / each.arrays["seen"] for each in seen]
    grids = [tuple(each.evaluation.protocol["grid"]) for each in seen]
    shaped = [100 * each.reshape(grid) for each, grid in zip(maps, grids, strict=True)]
    means = [
        (each.arrays["place_norms"] / each.arrays["seen"]).reshape(grid) for each, grid in zip(seen, grids, strict=True)
    ]
    per_row = min(3, len(seen))
    pictures: list[Picture] = []
    if any(each.any() for each in shaped):
        figure = drawing.heat_maps(names(seen), shaped, "% of images with an outlier here", per_row)
        pictures.append(album.save(figure, "1.12_places", "How often the token at each position is an outlier."))
    relative = [each / np.median(each) for each in means]
    figure = drawing.heat_maps(names(seen), relative, "mean norm / median", per_row)
    pictures.append(album.save(figure, "1.12_norms", "Mean norm at each position, by the median over positions."))
    return Finding(
        "1.12", "Where in the image they are, and what resampling of positions has to do with it",
        "Do outliers prefer certain positions: the border, or every other column?",
        each_says(seen, _places_say),
        "Official DINOv2 resamples positions without antialiasing and has outliers in vertical stripes; "
        "with antialiasing the "
        "stripes are gone and a preference for the border stays [P].",
        basis(seen), pictures,
        ["network", "outliers", "border / inside", "95 % interval", "most at one place", "stripes"],
        [_places_row(each) for each in seen],
        ["Stripes: autocorrelation at lag 2 of the outliers by column, less its best parabola."],
    )  # fmt: skip


def _places_say(each: Seen) -> str:
    told = details(each)["places"]
    if not told["outliers"]:
        return "no outliers"
    ratio = told["border_ratio"]
    where = f"{number(ratio)} times as frequent on the border as inside" if ratio else "none inside the border"
    return f"{counted(told['outliers'], 'outlier')}, {where}"


def _places_row(each: Seen) -> list[str]:
    told, score = details(each)["places"], each.evaluation.scores.get("border_ratio")
    interval = f"{score.low:.2f} to {score.high:.2f}" if score else "–"
    return [
        each.name, f"{told['outliers']:,}", number(told["border_ratio"]), interval,
        percent(told["most"]) if told["outliers"] else "–", number(told["stripes"]["columns"], 2),
    ]  # fmt: skip


def names(seen: Sequence[Seen]) -> list[str]:
    return [each.name for each in seen]
