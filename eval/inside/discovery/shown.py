"""Tells what object discovery shows: section 2 how LOST gets there, section 1.9 how often it is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.inside.discovery.pictures import NAMES, draw_curves, draw_features, draw_steps
from eval.inside.discovery.rules import CENTRED, MINUS_MEAN, PUBLISHED
from eval.inside.discovery.search import MEASURED
from eval.inside.finding import Album, Finding, Seen, counted, percent
from eval.metrics import share_interval
from eval.report.paired import difference

# Table 3 of the registers paper, CorLoc without and with registers, and of the LOST paper DINO's ViT-S/16.
SETS = ("VOC07", "VOC12", "COCO20k")
PUBLISHED_SCORES = {
    "DINO S/16 (LOST paper, keys, no bias)": (61.9, 64.0, 50.7),
    "DINOv2 L/14": (35.3, 40.2, 26.9),
    "DINOv2 L/14 + registers": (55.4, 60.0, 42.0),
    "DeiT-III B": (11.7, 13.1, 10.7),
    "DeiT-III B + registers": (27.1, 32.7, 25.1),
    "OpenCLIP B/16": (38.8, 44.3, 31.0),
    "OpenCLIP B/16 + registers": (37.1, 42.0, 27.9),
}
IMAGES = {"VOC07": 5011, "VOC12": 11540, "COCO20k": 19817}


def findings(seen: Sequence[Seen], album: Album) -> list[Finding]:
    """Two sections."""
    return [_scores(seen, album), _steps(seen, album)]


def _scores(seen: Sequence[Seen], album: Album) -> Finding:
    return Finding(
        "1.9",
        "Finding objects, with and without registers",
        "From one image alone, without labels and without training: where is the object? An answer is one box, and is "
        "right if it overlaps by at least a half with a box that a person drew. How often is it right (CorLoc)?",
        " ".join([*(_told(each) for each in seen), *_compared(seen)]),
        "Registers helped DINOv2 (VOC 2007: 35.3 % without, 55.4 % with) and DeiT-III (11.7 % and 27.1 %); OpenCLIP "
        "became slightly worse (38.8 % and 37.1 %). The biases there were set by hand.",
        "; ".join(f"{each.name}: {_basis(each)}" for each in seen) + ".",
        draw_curves(seen, album),
        ("", "no bias", "bias −mean", "centred", "bias chosen with boxes", "what was chosen"),
        [*(_row(each) for each in seen), *_floor_rows(seen), *_published_rows(seen)],
        how=[
            "No bias, −mean and centred need no labels, and stand on all images: the first block and the first feature "
            "that were tried, by default keys of the last block, as in the LOST paper.",
            "The bias that is chosen, with its block and feature, is the best on some images by their boxes, and its "
            "score is that of all other images. Papers do not say on which images theirs was set; where it was set "
            "on those that are scored, it is better than ours by that.",
            "Intervals are Wilson's, for 95 %. An image without a box counts as not found.",
            "Boxes drawn without looking say what a score is worth: where objects are large, a box around the middle "
            "of the image is often right.",
            *(f"{each.name}: {_speed(each)}" for each in seen),
        ],
    )


def _steps(seen: Sequence[Seen], album: Album) -> Finding:
    pictures = [*draw_steps(seen, album), *draw_features(seen, album)]
    return Finding(
        "2",
        "How LOST gets to its box, step by step",
        "LOST asks of every pair of patches whether they agree, that is whether their dot product is positive. Patches "
        "of the background agree with many, those of the object with few. Artifacts and whatever all patches have in "
        "common disturb that, unless a bias takes it away. Which layer, which feature, which bias?",
        " ".join(_told_steps(each) for each in seen),
        "Figure 13 draws these maps for DeiT-III, OpenCLIP and DINOv2, with and without registers. Figure 14: in "
        "OpenCLIP without registers, queries and keys have artifacts and values have none, as if values did not see "
        "the patches that stand out. The paper took values for "
        "DeiT-III and OpenCLIP, and keys for DINOv2.",
        "; ".join(f"{each.name}: {_basis(each)}" for each in seen) + ".",
        pictures,
        ("network, layer, feature", "no bias", "bias −mean", "centred", "best bias", "right with it, other images"),
        [row for each in seen for row in _table(each)],
        how=[
            "Features are those of an attention layer, all heads side by side, with the layer's bias, unscaled and not "
            "normalised; class token and registers are left out.",
            "Images are seen at their own size, filled up with zeros below and on the right to whole patches, unless a "
            "note says that they were resized.",
            f"The seed expands among the {_company(seen)} patches that agree with the fewest, whatever the number of "
            "patches; among all where an image has fewer. Where several patches agree with equally few, the first from "
            "the top left is the seed; the "
            "authors' code leaves that open.",
            "With a bias, the seed can be outside of what grows from it. Then its own patch is the box, where the "
            "authors' code would stop; how often that happened is said above.",
            "Only biases below 0 are tried: above 0 more patches agree, and boxes grow towards the whole image.",
            f"A patch stands out if its norm is beyond the mean plus three standard deviations on {MEASURED} of the "
            "images. Some patches are in any network, also in one without artifacts.",
            f"Biases are multiples of the patches' mean squared length on {MEASURED} of the images, without labels.",
        ],
    )  # fmt: skip


def _told(seen: Seen) -> str:
    """The figures of one network in words."""
    scores = seen.evaluation.scores
    best = scores.get("corloc_tuned", scores["corloc"])
    floor = max((scores["floor_whole_image"], scores["floor_middle"]), key=lambda score: score.value)
    how = "with the chosen bias" if "corloc_tuned" in scores else "without a bias"
    said = f"{seen.name}: right in {best.value:.1f} % of images {how} ({best.low:.1f} to {best.high:.1f} %)"
    if "corloc_tuned" in scores:
        said += f", {scores['corloc'].value:.1f} % without a bias"
    said += f", {scores['corloc_centred'].value:.1f} % with centred features; "
    if best.low > floor.high:
        return said + f"clearly more than a box drawn without looking ({floor.value:.1f} %)."
    if best.high < floor.low:
        return said + f"less than a box drawn without looking ({floor.value:.1f} %): it does not find objects."
    return said + f"not told apart from a box drawn without looking ({floor.value:.1f} %)."


def _compared(seen: Sequence[Seen]) -> list[str]:
    """What the others have more than the first, on the same images."""
    said = []
    for other in seen[1:]:
        name = "corloc_tuned" if _split(seen[0]) is not None and _split(seen[0]) == _split(other) else "corloc"
        if other.evaluation.data["hash"] != seen[0].evaluation.data["hash"]:
            said.append(f"{other.name} was not shown the same images as {seen[0].name}.")
            continue
        gap = difference(other.evaluation, seen[0].evaluation, name)
        chance = "which may be chance" if gap.verdict == "within" else "which is more than chance"
        how = "with the chosen bias" if name == "corloc_tuned" else "without a bias"
        said.append(
            f"{other.name} less {seen[0].name}, {how}: {gap.value:+.1f} points ({gap.low:+.1f} to {gap.high:+.1f}), "
            f"{chance}."
        )
    return said


def _split(seen: Seen) -> tuple[Any, ...] | None:
    """By what it was drawn which images choose, and which judge that; None where none choose."""
    protocol = seen.evaluation.protocol
    return (protocol["tune_share"], protocol["seed"]) if "corloc_tuned" in seen.evaluation.scores else None


def _told_steps(seen: Seen) -> str:
    details = seen.evaluation.details
    outside = int(seen.arrays["outside"][0, 0, 0])
    said = f"{seen.name}: "
    if chosen := details["chosen"]:
        at = details["tried"].index(chosen["tried"])
        place = details["blocks"].index(chosen["block"]), details["features"].index(chosen["feature"]), at
        outside = int(seen.arrays["outside"][place])
        right, count = chosen["tuning"]
        said += (
            f"best were the {NAMES[chosen['feature']]} of block {chosen['block'] + 1} with a bias of "
            f"{chosen['bias']:.3g}, right in {right} of the {count} images that it was chosen with. "
        )
        area = float(seen.arrays["areas"][place])
    else:
        area = float(seen.arrays["areas"][0, 0, 0])
    return said + (
        f"The box covers {100 * area:.0f} % of the image on average, and the seed was outside of what grew "
        f"from it in {counted(outside, 'image')}. {_told_standing_out(details)}"
    )


def _told_standing_out(details: dict[str, Any]) -> str:
    """Whether patches with large norms are far from the others in some features and not in others."""
    first = details["standing_out"][0]
    where = f"at the entrance of block {details['blocks'][0] + 1}"
    if not first["patches"]:
        return f"No patch stands out by its norm {where} (cutoff {first['cutoff']:g})."
    ratios = [
        f"{NAMES[name]} {ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        for name, ratio in zip(details["features"], first["ratio"], strict=True)
        if ratio
    ]
    said = f"{percent(first['patches'] / first['of'])} of the patches stand out by their norm {where}"
    how = f"; times as far from the mean of their image as other patches: {', '.join(ratios)}" if ratios else ""
    return f"{said} (beyond {first['cutoff']:g}){how}."


def _basis(seen: Seen) -> str:
    details = seen.evaluation.details
    few, middle, many = details["patches"]
    size = f"{few:,} patches each" if few == many else f"{few:,} to {many:,} patches each, median {middle:,}"
    said = f"{counted(details['images'], 'image')} of {seen.evaluation.data['name']}, {size}"
    if chosen := details["chosen"]:
        said += f"; chosen on {chosen['tuning'][1]:,} of them, judged on {chosen['tested'][1]:,}"
    return said


def _speed(seen: Seen) -> str:
    details, speed = seen.evaluation.details, seen.evaluation.details["speed"]
    settings = seen.arrays["right"].size
    return (
        f"{details['images'] / max(speed['seconds'], 1e-3):.3g} images a second, each with {settings:,} settings at "
        f"once; {100 * speed['share_computing']:.0f} % of the time was the network's and LOST's, the rest was waiting."
    )


def _row(seen: Seen) -> list[str]:
    scores, chosen = seen.evaluation.scores, seen.evaluation.details["chosen"]
    names = ("corloc", "corloc_minus_mean", "corloc_centred", "corloc_tuned")
    cells = [
        f"{score.value:.1f} ({score.low:.1f}–{score.high:.1f})" if (score := scores.get(name)) else "–"
        for name in names
    ]
    what = f"{NAMES[chosen['feature']]}, block {chosen['block'] + 1}, {chosen['tried']:g}" if chosen else "–"
    return [seen.name, *cells, what]


def _floor_rows(seen: Sequence[Seen]) -> list[list[str]]:
    scores = seen[0].evaluation.scores
    names = {
        "floor_whole_image": "the whole image, without looking",
        "floor_middle": "its middle 80 %, without looking",
    }
    return [[said, f"{scores[name].value:.1f}", "", "", "", ""] for name, said in names.items()]


def _published_rows(seen: Sequence[Seen]) -> list[list[str]]:
    """For orientation, where the images are those of a paper."""
    at = _set_of(seen)
    if at is None:
        return []
    return [
        [
            f"published, {SETS[at]}: {name}",
            *([f"{scores[at]}", "", "", ""] if "no bias" in name else ["", "", "", f"{scores[at]}"]),
            "",
        ]
        for name, scores in PUBLISHED_SCORES.items()
    ]


def _set_of(seen: Sequence[Seen]) -> int | None:
    """Which of SETS the images are, by their number and layout."""
    data, layout = seen[0].evaluation.data, str(seen[0].evaluation.protocol.get("boxes", ""))
    for at, name in enumerate(SETS):
        if data["test"] == IMAGES[name] and layout.startswith("COCO" if name == "COCO20k" else "Pascal VOC, trainval"):
            return at
    return None


def _table(seen: Seen) -> list[list[str]]:
    rows: Any = seen.details["table"]
    found = []
    for row in rows:
        shares = [f"{100 * row[rule] / row['images']:.1f}" for rule in (PUBLISHED, MINUS_MEAN, CENTRED)]
        best, tested = "–", "–"
        if "best" in row:
            best = f"{seen.evaluation.details['tried'][row['best']]:g}"
            low, high = share_interval(*row["tested"])
            tested = f"{100 * row['tested'][0] / row['tested'][1]:.1f} ({low:.1f}–{high:.1f})"
        found.append([f"{seen.name}, block {row['block'] + 1}, {NAMES[row['feature']]}", *shares, best, tested])
    return found


def _company(seen: Sequence[Seen]) -> str:
    return " / ".join(dict.fromkeys(str(each.evaluation.protocol["company"]) for each in seen))
