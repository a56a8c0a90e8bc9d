"""Tells where CLS and the registers look: sections 1.10, 1.10.1 and 1.10.2 of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from eval.inside.attention.pictures import average_maps, cls_maps, head_maps, register_maps, similarities
from eval.inside.finding import Album, Finding, Seen, counted, percent
from eval.inside.maps import basis, of_same_photos, times
from eval.results import Score

MANY_TIMES = 2.0  # as much attention as its share of the patches: outliers that get less are no artifacts of the map
ALIKE, APART = 0.9, 0.5  # cosines from which maps are called alike, and below which they are called different
SAME = 0.005  # by which that may be beside 1 and mean nothing, as where all patches are outliers
NEARLY = 0.1  # relative difference of two reaches that is not worth telling
BORDER = 1.25  # times the weight inside, or its inverse, from which a token prefers the border or avoids it


def findings(seen: Sequence[Seen], album: Album) -> list[Finding]:
    """Maps of CLS; of the registers, where a network has some; and averages over all images."""
    found = [_of_cls(seen, album)]
    with_registers = [each for each in seen if _registers(each)]
    if with_registers:
        found.append(_of_registers(with_registers, seen, album))
    return [*found, _of_average(seen, album)]


# -- the class token -----------------------------------------------------------------------------------------------


def _of_cls(seen: Sequence[Seen], album: Album) -> Finding:
    together = of_same_photos(seen)
    pictures = [cls_maps(group, at, album) for at, group in enumerate(together)]
    pictures += [head_maps(each, at, album) for at, each in enumerate(each for group in together for each in group)]
    return Finding(
        "1.10",
        "Where the class token looks",
        "Does the map of what the network attends to follow the things on the photo, or is it spoilt by single bright "
        "patches where there is nothing to see?",
        " ".join(map(_told_cls, seen)),
        "The paper's figures 1, 2, 18 and 19: without registers the maps of large networks are full of isolated bright "
        "patches, in all heads, though not equally; with registers (one is enough, figure 8) they are clean.",
        basis(seen),
        pictures,
        ["network", "spread evenly", "as if on so many patches", "brightest patch, of the median", "on patches",
         "outliers among patches", "attention on them", "times their share"],
        list(map(_cls_row, seen)),
        how=[
            *_settings(seen),
            "Spread: entropy of the weights over the patches, as a share of the highest possible (log of their "
            "number); 100 % is a map without any content, 0 % one patch alone. What goes to the class token "
            "itself and to registers is taken out first, and told as what is not “on patches”.",
            "The brightest patch in units of the median one is a geometric mean over images.",
            "The paper shows maps and gives no figures for them; heads are averaged, which it does not say either.",
            "Intervals: 95 %, were there other images of this kind.",
        ],
    )  # fmt: skip


def _told_cls(each: Seen) -> str:
    scores, cls = each.evaluation.scores, _tokens(each)[0]
    patches: Any = each.details["patches"]
    said = (
        f"{each.name}: the map is spread as over {math.exp(cls['entropy']):.0f} of {patches} patches, the brightest "
        f"{times(cls['peak'], 2)} times the median"
    )
    outliers: Any = each.details["outliers"]
    if "cls_outlier_excess" not in scores:
        return f"{said}; no patch is an outlier, so there is none to attend to."
    excess = scores["cls_outlier_excess"]
    return (
        f"{said}; outliers are {outliers['tokens']:,} of {each.details['images'] * patches:,} patches "
        f"({percent(outliers['share'])}) and get {percent(cls['outlier_mass'])} of the attention, "
        f"{times(excess.value, 2)} times their share: {verdict(excess)}."
    )


def verdict(excess: Score) -> str:
    """Whether outliers get more attention than other patches, as far as can be told."""
    if abs(excess.value - 1) < SAME:
        return "as much as others"
    if excess.low > MANY_TIMES:
        return "they are artifacts of the map"
    if excess.low > 1 and excess.value > MANY_TIMES:
        return "more than others"
    if excess.low > 1:
        return "a little more than others"
    if excess.high < 1:
        return "less than others, so they do not spoil the map"
    between = f"{times(excess.low, 2)} to {times(excess.high, 2)} times"
    return f"with an interval of {between}, it cannot be told whether more than others"


def _cls_row(each: Seen) -> list[str]:
    scores, cls = each.evaluation.scores, _tokens(each)[0]
    outliers: Any = each.details["outliers"]
    spread = scores["cls_entropy"]
    excess = scores.get("cls_outlier_excess")
    return [
        each.name,
        _with_interval(spread, " %"),
        f"{math.exp(cls['entropy']):.0f} of {each.details['patches']}",
        _with_interval(scores["cls_peak"], " ×"),
        percent(cls["on_patches"]),
        percent(outliers["share"]),
        "–" if cls["outlier_mass"] is None else percent(cls["outlier_mass"]),
        "–" if excess is None else _with_interval(excess, " ×"),
    ]


# -- the registers ---------------------------------------------------------------------------------------------------


def _of_registers(mine: Sequence[Seen], seen: Sequence[Seen], album: Album) -> Finding:
    pictures = [
        register_maps(each, at, album) for at, each in enumerate(seen) if each in mine and "photo_maps" in each.arrays
    ]
    return Finding(
        "1.10.1",
        "Where the registers look",
        "Do registers all look at the same, or does each take another part of the image?",
        " ".join(map(_told_registers, mine)),
        "The paper's figure 9: some registers look at different things on the photo, as if each had its own, though "
        "nothing in the training asks for that. It gives no figure for it.",
        basis(mine),
        [*pictures, similarities(mine, album)],
        ["network and token", "spread evenly", "brightest patch, of the median", "on patches", "attention on outliers"],
        [row for each in mine for row in _token_rows(each)],
        how=[
            *_settings(mine),
            "Two maps of one image are compared by their cosine, which for maps that overlap little is 0, and by the "
            "Jensen-Shannon divergence of the two as distributions over patches: 0 bits for equal ones, 1 bit for "
            "maps that share no patch.",
            "Even maps are alike too: maps are only apart in a telling way where they are not spread evenly.",
        ],
    )


def _told_registers(each: Seen) -> str:
    scores, number = each.evaluation.scores, _registers(each)
    if "registers_cosine" not in scores:
        alike, apart = scores["cls_registers_cosine"], scores["cls_registers_divergence"]
        return (
            f"{each.name}: the one register's map and that of CLS have a cosine of {alike.value:.2f} "
            f"({apart.value:.2f} bits apart)."
        )
    alike, apart = scores["registers_cosine"], scores["registers_divergence"]
    matrix: Any = each.details["pairs"]
    least, first, second = min(
        (matrix["cosine"][i][j], i - 1, j - 1) for i in range(1, number + 1) for j in range(i + 1, number + 1)
    )
    return (
        f"{each.name}: {how_alike(alike.value, least)}. The maps of two registers have a cosine of "
        f"{alike.value:.2f} on average ({apart.value:.2f} bits apart), of {least:.2f} for the two least alike, {first} "
        f"and {second}; a register's and that of CLS {scores['cls_registers_cosine'].value:.2f}."
    )


def how_alike(average: float, least: float) -> str:
    """From the cosines of the registers' maps, two at a time."""
    if least > ALIKE:
        return "registers look at nearly the same"
    if average > ALIKE:
        return "most registers look at nearly the same, and some do not"
    return "registers look at different places" if average < APART else "registers look at partly the same"


def _token_rows(each: Seen) -> list[list[str]]:
    return [
        [
            f"{each.name}: {token['name']}",
            _share(token["entropy_share"]),
            f"{times(token['peak'])} ×",
            percent(token["on_patches"]),
            _share(token["outlier_mass"]),
        ]
        for token in _tokens(each)[:-1]
    ]


# -- the average over images -----------------------------------------------------------------------------------------


def _of_average(seen: Sequence[Seen], album: Album) -> Finding:
    return Finding(
        "1.10.2",
        "Where tokens look whatever the image shows",
        "Averaged over many images, what is left of the maps is a habit: a place that a token prefers.",
        " ".join(map(_told_average, seen)),
        "The paper's figure 16: blobs around the centre of the image; one of four registers prefers the border, "
        "one the upper part; the map of a patch is much more local.",
        basis(seen),
        [average_maps(seen, album)],
        ["network and token", "centre, across", "centre, down", "a border patch, of one inside", "reach"],
        [row for each in seen for row in _place_rows(each)],
        how=[
            *_settings(seen),
            "Centre: the map's centre of gravity, from 0 % (left, top) to 100 %. Reach: root mean square distance of "
            "what is attended to, from the middle of the image or from the patch itself, in units of what it would be "
            "were all patches attended to alike: less than 1 × is local.",
            "Photos are cropped around their centre, and photographers put things there.",
        ],
    )


def _told_average(each: Seen) -> str:
    tokens = _tokens(each)
    cls, patch = tokens[0], tokens[-1]
    said = []
    for token in tokens[:-1]:
        if token["border"] is not None and token["border"] > BORDER:
            said.append(f"{token['name']} prefers the border ({token['border']:.2g} times the weight inside)")
        elif token["border"] is not None and token["border"] < 1 / BORDER:
            said.append(f"{token['name']} prefers the inside ({1 / token['border']:.2g} times the border's weight)")
    habits = "; ".join(said[:5]) if said else "no token prefers the border or the inside much"
    if patch["reach"] is None or cls["reach"] is None:
        return f"{each.name}: {habits}."
    ratio = patch["reach"] / cls["reach"]
    local = "about as local as" if abs(ratio - 1) < NEARLY else f"{'more' if ratio < 1 else 'less'} local than"
    reach = f"(reach {patch['reach']:.2f} × against {cls['reach']:.2f} ×)"
    return f"{each.name}: {habits}. The patch in the middle is {local} CLS {reach}."


def _place_rows(each: Seen) -> list[list[str]]:
    return [
        [
            f"{each.name}: {token['name']}",
            _middle(token["column"]),
            _middle(token["row"]),
            "–" if token["border"] is None else f"{token['border']:.2f} ×",
            "–" if token["reach"] is None else f"{token['reach']:.2f} ×",
        ]
        for token in _tokens(each)
    ]


def _middle(place: float | None) -> str:
    return "–" if place is None else f"{100 * place:.0f} %"


# -- what all of them say --------------------------------------------------------------------------------------------


def _tokens(each: Seen) -> list[dict[str, Any]]:
    tokens: Any = each.details["tokens"]
    return tokens


def _registers(each: Seen) -> int:
    return len(_tokens(each)) - 2  # without CLS and the patch


def _settings(seen: Sequence[Seen]) -> list[str]:
    said = []
    for each in seen:
        details: Any = each.details
        layer, cutoff = details["layer"] + 1, details["cutoff"]
        value = "" if cutoff["value"] is None else f"a norm beyond {cutoff['value']:.4g}; "
        found_on = f", on {counted(cutoff['images'], 'image')}" if cutoff["images"] else ""
        said.append(
            f"{each.name}: attention of layer {layer} of {details['depth']}; outliers by norms after layer "
            f"{cutoff['layer'] + 1}: {value}{cutoff['how']}{found_on}. Maps of photos are "
            f"computed at {details['map_size']} pixels."
        )
    return said


def _with_interval(score: Score, unit: str) -> str:
    return f"{times(score.value)}{unit} ({times(score.low)} to {times(score.high)})"


def _share(share: float | None) -> str:
    return "–" if share is None else percent(share)
