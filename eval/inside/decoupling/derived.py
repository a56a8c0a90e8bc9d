"""The findings L6 to L8 on the residual stream, and D1, D3 and D7, which are in no paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.inside.decoupling import drawing
from eval.inside.decoupling.clutter import MEASURES
from eval.inside.decoupling.drawing import Curve, Panel
from eval.inside.decoupling.split import GROUPS
from eval.inside.decoupling.telling import (
    WORDS,
    bar,
    basis,
    chosen,
    cka_bars,
    curve,
    details,
    drawn,
    each_says,
    last,
    names,
    number,
    scored,
    share,
)
from eval.inside.finding import Album, Finding, Seen, counted

IN_SKIP = "CLS as it enters the layer, with what it reads from itself"
SOURCES = {
    "weighted": "patches, by attention",
    "mean": "patches, plain mean",
    "registers": "registers",
    "previous": "CLS before",
    "patches+registers": "patches and registers",
    "all": "all of them",
}
TICKS = ["patches,\nattention", "patches,\nmean", "registers", "CLS\nbefore", "patches +\nregisters", "all"]
BAND = "Bands hold 90 % of the images."


def tell_norms(seen: Sequence[Seen], album: Album) -> Finding:
    """L6"""
    words = {"skip": "skip", "patches": "from patches", "registers": "from registers", "cls": "from CLS itself"}
    panels = [
        Panel(word, "norm", [curve(each, f"norm_{name}") for each in seen], logarithmic=True)
        for name, word in words.items()
    ]
    figure = drawing.along_layers(names(seen), panels, columns=4)
    caption = f"Lengths of the parts that CLS is the sum of after each layer's attention. {BAND}"
    return Finding(
        "L6", "Skip or patches: what CLS is the sum of",
        "After each layer's attention, CLS is what it was before plus what it read. Which of the two is longer?",
        each_says(seen, _norms_say),
        "DINOv2 without registers, last layer: S, B and L are mixed; g is dominated by the skip part.",
        basis(seen), [album.save(figure, "L6_norms", caption)],
        ["network", "skip", "from patches", "from registers", "from CLS itself", "skip by patches"],
        [_norms_row(each) for each in seen],
        [f"Skip: {IN_SKIP} (equation 6 of the paper). All norms are of the residual stream, before the final norm.",
         "The table is of the last layer, means over images."],
    )  # fmt: skip


def _ratio(each: Seen) -> float | None:
    skip, patches = last(each, "norm_skip"), last(each, "norm_patches")
    return skip / patches if skip is not None and patches else None


def _norms_say(each: Seen) -> str:
    ratio = _ratio(each)
    if ratio is None:
        return "nothing is read from patches in the last layer"
    skip, patches = last(each, "norm_skip"), last(each, "norm_patches")
    long, short = ("the skip part", "what is read from patches")[:: 1 if ratio >= 1 else -1]
    return (
        f"in the last layer {long} is {max(ratio, 1 / ratio):.2g} times as long as {short} "
        f"(skip {skip:.3g}, patches {patches:.3g})"
    )


def _norms_row(each: Seen) -> list[str]:
    norms = [last(each, f"norm_{name}") for name in ("skip", "patches", "registers", "cls")]
    ratio = _ratio(each)
    return [each.name, *("–" if norm is None else f"{norm:.3g}" for norm in norms), number(ratio)]


def tell_settling(seen: Sequence[Seen], album: Album) -> Finding:
    """L7"""
    panel = Panel("", "cosine to CLS after the last layer", [curve(each, "cosine_last") for each in seen], (None, 1.02))
    figure = drawing.along_layers(names(seen), [panel], columns=1)
    caption = f"Mean cosine between CLS after each layer and at the end. {BAND}"
    return Finding(
        "L7", "When CLS becomes what it is",
        "How much is CLS after each layer already like CLS at the end?",
        each_says(seen, _settling_says),
        "DINOv2: S, B and L jump at the very last layer; g converges smoothly, earlier. CLIP and iBOT are like DINOv2, "
        "DeiT III shows no clear trend with size.",
        basis(seen), [album.save(figure, "L7_settling", caption)],
        how=["CLS in the residual stream, before the final norm, after each layer. The last layer is 1 by definition."],
    )  # fmt: skip


def _settling_says(each: Seen) -> str:
    found = details(each)["layers"]["cosine_last"]["mean"]
    if len(found) < 2 or found[-2] is None:
        return "there is one layer only"
    before = found[-2]
    at = next((layer for layer, value in enumerate(found, 1) if value is not None and value >= 0.5), len(found))
    said = f"one layer before the end the cosine is {number(before)}"
    return f"{said}, and it passes 0.5 after layer {at} of {len(found)}"


def tell_skip(seen: Sequence[Seen], album: Album) -> Finding:
    """L8"""
    parts = {"skip": "skip", "patches/attended": "patches", "registers/attended": "registers"}
    panels = [
        (title, list(parts.values()), [cka_bars(each, list(parts), kind) for each in seen])
        for kind, title in (("plain", "CKA"), ("debiased", "CKA, debiased"))
    ]  # fmt: skip
    figure = drawing.bars(names(seen), panels, "likeness to CLS after attention", 1.05)
    caption = "How much like CLS after the last layer's attention its parts are. Lines: 95 % intervals; dotted: chance."
    return Finding(
        "L8", "Skip or patches: which is like CLS",
        "Leave CLS with only what it was before the last layer, or with only what it reads from patches there. Which "
        "is like the real one?",
        each_says(seen, _skip_says),
        "Patches alone are less like the whole the larger the network is, in all recipes (DINOv2, DeiT III, CLIP, "
        "iBOT); DeiT III tiny behaves like its huge model. The paper gives no numbers.",
        basis(seen), [album.save(figure, "L8_skip", caption)],
        how=[
            f"Skip: {IN_SKIP}. The whole is CLS in the residual stream after the last layer's attention.",
            *chosen(seen),
        ],
    )  # fmt: skip


def _skip_says(each: Seen) -> str:
    told = details(each)["cka"]["last"]
    skip, patches = (told[name]["debiased"]["value"] for name in ("skip", "patches/attended"))
    said = (
        f"debiased CKA with CLS after attention: {number(skip, 3)} for the skip part, {number(patches, 3)} for patches"
    )
    if skip is None or patches is None:
        return said
    return said + ("; the last layer changes little in how images lie" if skip > 0.95 else "")


def tell_layers(seen: Sequence[Seen], album: Album) -> Finding:
    """D1"""
    shares = [
        Panel(f"attention to {WORDS[group]}", "%", [curve(each, f"share_{group}", 100) for each in seen], (0, 100))
        for group in GROUPS
    ]
    alike = "likeness to all that is read"
    likeness = [
        Panel(f"CKA, {WORDS[group]} alone", alike, [_ckas(each, group) for each in seen], (0, 1.05)) for group in GROUPS
    ]
    figure = drawing.along_layers(names(seen), [*shares, *likeness], columns=3)
    caption = f"L1 and L3 for every layer. {BAND} Dotted: the CKA that chance gives."
    return Finding(
        "D1", "What CLS reads in every layer",
        "Where in the network does CLS turn from patches to registers, if it does?",
        each_says(seen, _layers_say),
        "Not in the paper, which looks at the last layer. Expected: the turn comes about where long patches appear.",
        basis(seen), [album.save(figure, "D1_layers", caption)],
        how=["As L1 and L3, in each layer. Bands hold 90 % of the images.", *_thinned(seen)],
    )  # fmt: skip


def _ckas(each: Seen, group: str) -> Curve | None:
    told = details(each)["cka"]
    if group not in told["layers"]:
        return None
    found = told["layers"][group]
    return Curve(told["blocks"], [one["plain"] for one in found], chance=[one["floor"] for one in found])


def _layers_say(each: Seen) -> str:
    found = details(each)["layers"]
    means = {group: found[f"share_{group}"]["mean"] for group in GROUPS}
    shares = [{group: means[group][layer] or 0 for group in GROUPS} for layer in range(len(means["patches"]))]
    most = [max(GROUPS, key=each.__getitem__) for each in shares]
    if set(most) == {"patches"}:
        low = min(means["patches"])
        return f"in every layer most of the attention goes to patches, {share(low)} where it is least"
    runs: list[tuple[str, int, int]] = []
    for layer, group in enumerate(most, 1):
        if runs and runs[-1][0] == group:
            runs[-1] = (group, runs[-1][1], layer)
        else:
            runs.append((group, layer, layer))
    told = [f"{WORDS[group]} in layer{'' if a == b else 's'} {a if a == b else f'{a} to {b}'}" for group, a, b in runs]
    return "most of the attention goes to " + ", ".join(told)


def _thinned(seen: Sequence[Seen]) -> list[str]:
    return [
        f"{each.name}: CKA in {len(told['cka']['blocks'])} of {told['depth']} layers, as many as were asked for or fit "
        "into moments_gib."
        for each in seen
        for told in [details(each)]
        if len(told["cka"]["blocks"]) < told["depth"]
    ]


def tell_rebuilding(seen: Sequence[Seen], album: Album) -> Finding | None:
    """D3; None where too few images were seen."""
    if not any(details(each)["rebuilt"] for each in seen):
        return None
    unique = ("patches", "registers", "previous")
    panels = [
        ("what can be told from each", TICKS, [[bar(_r2(each, "r2", name)) for name in SOURCES] for each in seen]),
        ("what is lost without it", ["patches", "registers", "CLS\nbefore"],
         [[bar(_r2(each, "unique", name)) for name in unique] for each in seen]),
    ]  # fmt: skip
    figure = drawing.bars(names(seen), panels, "R² on held-out images", 1.05)
    caption = "How much of the final CLS is linear in what the last layer is given. Lines: 95 % intervals."
    return Finding(
        "D3", "What CLS can be rebuilt from",
        "From the patches, the registers or the CLS that enter the last layer: how well can the final CLS be "
        "predicted?",
        each_says(seen, _rebuilding_says),
        "Not in the paper. Expected: with size, less from patches and more from registers and from CLS before.",
        "; ".join(dict.fromkeys(_rebuilding_basis(each) for each in seen)),
        [album.save(figure, "D3_rebuilding", caption)],
        ["network", *SOURCES.values(), *(f"lost without {SOURCES.get(name, name)}" for name in unique)],
        [
            [each.name, *(scored(_r2(each, "r2", name)) for name in SOURCES),
             *(scored(_r2(each, "unique", name)) for name in unique)]
            for each in seen
        ],
        ["Ridge regression from tokens as the last block reads them (after its norm) to CLS after the final norm; half "
         "of the images are predicted from the other half, and the reverse. R² is 1 for a perfect prediction, 0 for "
         "one that is as good as the mean, and may be negative.",
         "The penalty is the one with the least error when each training image is left out in turn. Sources are scaled "
         "to the same variance. Registers are all of them, one after the other.",
         "Lost without it: R² of all sources less R² of all but this one. Sources that know the same lose nothing "
         "alone.",
         "More dimensions need more images: with few, what can be told is a lower bound."],
    )  # fmt: skip


def _r2(each: Seen, kind: str, name: str) -> dict[str, Any] | None:
    told = details(each)["rebuilt"]
    if told is None or ("registers" in name and not details(each)["registers"]):
        return None
    return told[kind].get(name)


def _rebuilding_says(each: Seen) -> str:
    if details(each)["rebuilt"] is None:
        return "too few images, or CLS is the same in all"
    found = {name: _r2(each, "r2", name) for name in ("weighted", "registers", "previous", "all")}
    said = [f"{number(told['value'])} from {SOURCES[name]}" for name, told in found.items() if told]
    return "R² is " + ", ".join(said)


def _rebuilding_basis(each: Seen) -> str:
    told = details(each)["rebuilt"]
    if told is None:
        return f"{each.name}: too few images, or CLS is the same in all"
    sizes = [told["sizes"][name] for name in ("weighted", "all")]
    return f"{each.name}: {counted(told['images'], 'image')}, {sizes[0]:,} to {sizes[1]:,} predictors"


def tell_clutter(seen: Sequence[Seen], album: Album) -> Finding:
    """D7"""
    rows, texts = [], []
    for other in ("registers", "skip"):
        values = [each.arrays[f"patch_against_{other}"] if other in details(each)["clutter"] else None for each in seen]
        if any(value is not None for value in values):
            rows.append((f"patches against {other}", values))
            texts.append([f"ρ = {_rho(each, other, 'edges')}" for each in seen])
    x = [each.arrays["clutter"][:, MEASURES.index("edges")] for each in seen]
    label = "edges: mean gradient, grey levels a pixel"
    pictures = []
    if rows:
        caption = "The share of patches in what CLS is made of, a dot an image, against how much goes on in the image."
        pictures = [album.save(drawing.scatters(names(seen), rows, x, texts, label), "D7_clutter", caption)]
    return Finding(
        "D7", "Does it depend on the image?",
        "Does CLS take more from patches in images where more goes on?",
        each_says(seen, _clutter_says),
        "Named by the paper as future work.",
        basis(seen), pictures,
        ["network", "patches against registers", *(f"with {name}, ρ" for name in MEASURES), "patches against skip",
         *(f"with {name}, ρ" for name in MEASURES)],
        [_clutter_row(each) for each in seen],
        ["Share of patches: ‖patches‖ / (‖patches‖ + ‖registers‖) of what CLS reads in the last layer, or with the "
         "skip part instead, which is there without registers too. Mean over images with its interval.",
         "How much goes on is told from pixels alone, without labels: edges, the mean length of the gradient of grey; "
         "entropy, of the distribution of grey over 64 levels. ρ is Spearman's rank correlation.", *drawn(seen)],
    )  # fmt: skip


def _rho(each: Seen, other: str, measure: str) -> str:
    told = details(each)["clutter"].get(other)
    return "–" if told is None else scored(told["correlation"][measure])


def _clutter_says(each: Seen) -> str:
    told = details(each)["clutter"]
    said = []
    for other in ("registers", "skip"):
        if other in told:
            mean, spread = told[other]["mean"]["value"], told[other]["spread"]
            rho = told[other]["correlation"]["edges"]
            known = rho is not None and (rho["low"] > 0 or rho["high"] < 0)
            goes = f"ρ = {number(rho['value'])} with edges" if known else "no correlation with edges to be seen"
            said.append(f"{number(mean)} against {other} (standard deviation over images {number(spread)}), {goes}")
    return "the share of patches is on average " + "; ".join(said) if said else "nothing is read"


def _clutter_row(each: Seen) -> list[str]:
    cells = []
    for other in ("registers", "skip"):
        told = details(each)["clutter"].get(other)
        cells += [scored(told["mean"] if told else None, 3), *(_rho(each, other, name) for name in MEASURES)]
    return [each.name, *cells]
