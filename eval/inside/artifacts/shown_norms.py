"""1.1, 1.2 and 1.6: norms, along layers and training, and by type of token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.inside.artifacts import drawing
from eval.inside.artifacts.bins import share_above
from eval.inside.artifacts.clouds import APART
from eval.inside.artifacts.telling import basis, cutoff, details, each_says, interval, names, number
from eval.inside.finding import Album, Finding, Seen, counted, percent


def tell_norms(seen: Sequence[Seen], album: Album) -> Finding:
    """1.1"""
    tables = [each.arrays["layers"][details(each)["layer"], 1] for each in seen]
    cutoffs = [cutoff(each) for each in seen]
    medians = [details(each)["norms"]["percentiles"]["0.5"] for each in seen]
    pictures = [
        album.save(
            drawing.norm_histograms(names(seen), tables, cutoffs), "1.1_histogram",
            "How long patch tokens are, before the final norm. Artifacts would be a second hump far to the right.",
        )
    ]  # fmt: skip
    if all(len(each.arrays["photos"]) for each in seen):
        photos = [each.arrays["photos"] for each in seen]
        maps = [each.arrays["photo_norms"] for each in seen]
        pictures.append(
            album.save(
                drawing.norm_maps(names(seen), photos, maps, medians), "1.1_maps",
                "Norms of these photos' tokens by the median of all images; artifacts would be single bright patches.",
            )
        )  # fmt: skip
    return Finding(
        "1.1", "Tokens that stand out by their norm",
        "Are a few patch tokens far longer than the rest?",
        each_says(seen, _norms_say),
        "DINOv2 ViT-g: 2.37 % of the patch tokens are longer than 150 while the rest lie below 100, about ten times "
        "as long as the others. DINO ViT-B shows no such tokens.",
        basis(seen), pictures,
        ["network", "median", "99.9 %", "largest", "outliers", "95 % interval", "beyond mean + 3 std", "two clouds?"],
        [_norms_row(each) for each in seen],
        _norms_how(seen),
    )  # fmt: skip


def _norms_say(each: Seen) -> str:
    told, cut = details(each)["norms"], details(each)["cutoff"]
    if not told["outliers"]:
        times = told["percentiles"]["1.0"] / told["percentiles"]["0.5"]
        return f"no patch stands out, the largest norm being {times:.2g} times the median; {cut['how']}"
    share = told["outliers"] / told["tokens"]
    images = percent(told["images_with"] / told["images"])
    two = "" if told["clouds"]["two"] else (
        "; but the norms are one cloud, of which these are the end, and no artifacts as in the paper"
    )  # fmt: skip
    return (
        f"{percent(share)} of the patches stand out with a norm beyond {number(cut['value'], 4)} (the median is "
        f"{number(told['percentiles']['0.5'])}), in {images} of the images{two}"
    )


def _norms_row(each: Seen) -> list[str]:
    told = details(each)["norms"]
    clouds, at = told["clouds"], told["percentiles"]
    ratio = f"yes, {clouds['centres'][1] / clouds['centres'][0]:.3g} times as long" if clouds["two"] else "no"
    return [
        each.name, number(at["0.5"]), number(at["0.999"]), number(at["1.0"]),
        percent(told["outliers"] / told["tokens"]), f"{interval(each, 'outlier_share', 2)} %",
        percent(told["rules"]["3std"]["share"]), ratio,
    ]  # fmt: skip


def _norms_how(seen: Sequence[Seen]) -> list[str]:
    said = [
        "Norms are of the residual stream, before the final norm, which would hide them.",
        "Two clouds: two Gaussians on the logarithms of norms are better than one by BIC, and there are two peaks "
        "with a valley between them that is at most half as high as the lower one. BIC alone calls any skewed cloud "
        "two where there are many tokens.",
        "Outliers, by the valley: a minority of tokens, around a norm at least 1.5 times that of the others.",
    ]
    for each in seen:
        cut, layer = details(each)["cutoff"], details(each)["layer"]
        on = f", found on {counted(cut['images'], 'image')}" if cut["images"] else ""
        told = "; every token of every image was held against it" if cut["value"] is not None else ""
        said.append(f"{each.name}, after layer {layer + 1}: {cut['how']}{on}{told}.")
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
    running = [each for each in seen if "steps" in details(each)]
    if running:
        steps = [[told["step"] for told in details(each)["steps"]["told"]] for each in running]
        figure = drawing.step_histograms(names(running), [each.arrays["steps"] for each in running], steps)
        caption = "The same along the training, as patches leave the layer at which outliers are told."
        pictures.append(album.save(figure, "1.2_training", caption))
    return Finding(
        "1.2", "Where in the network, when in training, and in which size they appear",
        "In which layer do outliers part from the others, and is it attention or the feed-forward that lengthens them?",
        each_says(seen, _layers_say),
        "In DINOv2 ViT-g (40 layers) they part around layer 15, after a third of the training, and only the sizes "
        "L, H and g have them. In DINOv2 ViT-L the feed-forward of layer 17 makes them, in OpenCLIP ViT-B/16 that "
        "of layer 6 (Jiang et al. 2025, who count from 0).",
        basis(seen), pictures,
        ["network", "width x layers", "outliers", "made by", "growth there", "times as long in the end"],
        [_layers_row(each) for each in seen],
        ["Along the training: each checkpoint was shown a part of the images, and its cutoff found by the same rule.",
         "The layer is where the median norm of the patches that are outliers grows most against that of the "
         "others; layers count from 1."],
    )  # fmt: skip


def _layers_say(each: Seen) -> str:
    rise, since = details(each)["layers"]["rise"], _steps_say(each)
    if rise is None:
        return "no outliers, so that no layer makes them" + since
    if rise["most"] < APART * rise["entering"]:
        return (
            f"outliers are {number(rise['entering'])} times as long as other patches when they enter the first layer "
            f"and at most {number(rise['most'])} times after any, so that no layer makes them{since}"
        )
    return (
        f"the {rise['branch']} of layer {rise['layer'] + 1} lengthens outliers from {number(rise['before'])} to "
        f"{number(rise['after'])} times the norm of other patches{since}"
    )


def _steps_say(each: Seen) -> str:
    """The rest of a sentence, on the training of the run."""
    if "steps" not in details(each):
        return ""
    told = details(each)["steps"]["told"]
    having = [at for at in told if at["own_share"]]
    images = counted(details(each)["steps"]["images"], "image")
    steps = f"steps {told[0]['step']:,} to {told[-1]['step']:,}"
    what = f"{counted(len(told), 'checkpoint')} of the run ({images} each), {steps}"
    if not having:
        return f"; none of {what}, has any"
    first = having[0]
    return (
        f"; of {what}, {len(having)} have some by their own cutoff, the first at step {first['step']:,} "
        f"({percent(first['own_share'])})"
    )


def _layers_row(each: Seen) -> list[str]:
    told, built = details(each), each.evaluation.content.get("architecture", {})
    rise = told["layers"]["rise"]
    size = f"{built.get('embed_dim', '?')} x {built.get('depth', '?')}"
    share = percent(told["norms"]["outliers"] / told["norms"]["tokens"])
    if rise is None:
        return [each.name, size, share, "–", "–", "–"]
    growth = f"{rise['after'] / rise['before']:.3g} times"
    return [
        each.name,
        size,
        share,
        f"{rise['branch']} of layer {rise['layer'] + 1}",
        growth,
        number(rise["in_the_end"]),
    ]


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
        "For DINOv2, OpenCLIP and DeiT-III the outliers among patches are gone with registers; high norms are left "
        "in some registers only, about the same in every image.",
        basis(seen), [album.save(figure, "1.6_types", caption)],
        ["network", "token", "median", "1 to 99 %", "largest", "variation (CV)", "beyond the cutoff"],
        rows,
        ["CV: standard deviation over images divided by the mean. 'Beyond the cutoff': with the cutoff of the "
         "first network without registers that has one, for all networks, read off histograms whose bins are 1.1 % "
         "wide; '–' where there is none."],
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
    patches = details(each)["norms"]["percentiles"]["0.5"]
    cls, *registers = details(each)["types"]
    said = []
    if reference is not None and each is not reference:
        table = each.arrays["layers"][details(each)["layer"], 1]
        rate, value = share_above(table, cutoff(reference)) or 0.0, number(cutoff(reference))
        said.append(f"{percent(rate)} of the patches are beyond the cutoff of “{reference.name}”, {value}")
    if registers:
        longest = max(registers, key=lambda told: told["percentiles"]["0.5"])
        times = longest["percentiles"]["0.5"] / patches
        varies = "" if longest["cv"] is None else f", and varies by {percent(longest['cv'])} from image to image"
        said.append(f"{longest['type']} is the longest register, {times:.3g} times as long as the median patch{varies}")
    else:
        times = cls["percentiles"]["0.5"] / patches
        said.append(f"there are no registers, and CLS is {times:.3g} times as long as the median patch")
    return "; ".join(said)
