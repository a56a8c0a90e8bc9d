"""The findings L1 to L4: what CLS reads in the last layer, and what of it each part tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.inside.decoupling import drawing
from eval.inside.decoupling.drawing import Bar
from eval.inside.decoupling.measure import ROW
from eval.inside.decoupling.registers import FEW
from eval.inside.decoupling.split import GROUPS, KINDS
from eval.inside.decoupling.telling import (
    WORDS,
    basis,
    chosen,
    cka_bars,
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

MOST = 0.7  # of the attention, from which is said that it goes there
DOTS = 1000  # images with a dot each in the figure of registers
FAITHFUL, FAINT = 0.9, 0.5  # CKA or cosine: above it is said to be much like the whole, below not


def tell_attention(seen: Sequence[Seen], album: Album) -> Finding:
    """L1"""
    panels = [(f"to {WORDS[group]}", [_column(each, f"share_{group}", 100) for each in seen]) for group in GROUPS]
    even = [[_even(each, group) for each in seen] for group in GROUPS]
    picture = album.save(
        drawing.histograms(names(seen), panels, "attention of CLS, %", (0, 100), even), "L1_attention",
        "Where CLS looks in the last layer, mean over heads: how many images (up) give how much of it (across).",
    )  # fmt: skip
    return Finding(
        "L1", "Where CLS looks in the last layer",
        "CLS is read as the description of the whole image. In the last layer, does it still take it from the patches?",
        each_says(seen, _attention_says),
        "DINOv2 with registers: S and B look mostly at patches, L and g mostly at registers; in g this differs widely "
        "between images, and some almost ignore patches. The paper gives no numbers.",
        basis(seen), [picture],
        ["network", *(f"to {WORDS[group]}" for group in GROUPS), "patches : registers, without CLS",
         "patches, were all tokens read alike", "patches, by head"],
        [_attention_row(each) for each in seen],
        ["Attention after the softmax, of the query of CLS, mean over heads; summed over the tokens of a group.",
         "The paper's shares of registers and patches sum to 1: the share of CLS itself was dropped or scaled away. "
         "Here it is shown, and left out in the column “patches : registers”.",
         "The table has the mean over images with its 95 % interval.", *drawn(seen)],
    )  # fmt: skip


def _column(each: Seen, name: str, factor: float = 1.0) -> NDArray[Any] | None:
    """A figure of the last layer, an image each; None where it is undefined."""
    values = factor * each.arrays["last"][:, ROW.index(name)]
    return values if np.isfinite(values).any() else None


def _even(each: Seen, group: str) -> float | None:
    """Percent of the tokens that are of a group; None where there are none."""
    told = details(each)
    count = {"patches": told["patches"], "registers": told["registers"], "cls": 1}
    return 100 * count[group] / sum(count.values()) if count[group] else None


def _attention_says(each: Seen) -> str:
    found = {group: last(each, f"share_{group}") for group in GROUPS}
    said = f"{share(found['patches'])} of the attention goes to patches"
    said += f", {share(found['registers'])} to registers" if found["registers"] is not None else ""
    said += f" and {share(found['cls'])} to CLS itself"
    quantiles = details(each)["layers"]["share_patches"]["quantiles"][-1]
    spread = f" (90 % of the images: {share(quantiles[0])} to {share(quantiles[-1])} to patches)"
    most = next((f"; it looks mostly at {WORDS[group]}" for group in GROUPS if (found[group] or 0) > MOST), "")
    return f"{said}{spread}{most}; were all tokens read alike, {_even(each, 'patches'):.1f} % would go to patches"


def _attention_row(each: Seen) -> list[str]:
    scores = each.evaluation.scores
    told = [" ".join(_texts(scores.get(f"attention_{group}"))) for group in GROUPS]
    patches, registers = last(each, "share_patches") or 0.0, last(each, "share_registers")
    both = None if registers is None else patches / (patches + registers)
    alike, heads = f"{_even(each, 'patches'):.1f} %", each.arrays["heads"][:, GROUPS.index("patches")]
    by_head = f"{share(heads.min())} to {share(heads.max())}"
    return [each.name, *told, "–" if both is None else f"{share(both)} : {share(1 - both)}", alike, by_head]


def _texts(score: Any) -> tuple[str, ...]:
    return ("–",) if score is None else (score.texts()[0], f"({score.texts()[1]})")


def tell_longest(seen: Sequence[Seen], album: Album) -> Finding:
    """L2"""
    having = [each for each in seen if details(each)["longest"]]
    pictures = []
    if having:
        lengths = [each.arrays["lengths"][:: -(-len(each.arrays["lengths"]) // DOTS)] for each in seen]
        figure = drawing.registers(names(seen), lengths, [_profile(each) for each in seen])
        caption = (
            "Norms of the registers, and the dimensions of the longest one before and after the norm of the block."
        )
        pictures = [album.save(figure, "L2_registers", caption)]
    return Finding(
        "L2", "The longest register",
        "Is one register always the longest, and does it say anything of the image?",
        each_says(seen, _longest_says),
        "DINOv2-g with registers: the same register is the longest in every image, by an order of magnitude. Its mean "
        "cosine between two images is 0.9989, since a few dimensions dominate; the norm of the block scales these "
        "down, so that what is read from it can still differ between images.",
        basis(seen), pictures,
        ["network", "longest", "in so many images", "norm", "times the next", "cosine between images",
         "as it is read", f"{FEW} dimensions hold", "as it is read"],
        [_longest_row(each) for each in seen],
        ["Registers as they leave the last layer but one, before any norm; “as it is read” is after the norm with "
         "which the last block begins.",
         f"“{FEW} dimensions hold”: the share of the squared length in the {FEW} strongest dimensions.",
         "The cosine is the mean over all pairs of different images. The dimensions drawn are the 100 strongest; dots "
         f"are drawn for at most {DOTS:,} images, evenly spaced."],
    )  # fmt: skip


def _profile(each: Seen) -> NDArray[Any] | None:
    """The strongest dimensions of the longest register before and after the norm, the first by the mean over all."""
    if "profile" not in each.arrays:
        return None
    told, profile = details(each)["longest"], each.arrays["profile"]
    mean = told["norms"][told["index"]] / each.evaluation.content["architecture"]["embed_dim"] ** 0.5
    return np.stack([profile[0] / mean if mean else profile[0], profile[1]])


def _longest_says(each: Seen) -> str:
    told = details(each)["longest"]
    if told is None:
        return "no registers, so that there is nothing to measure"
    index, over = told["index"], told["over_second"]
    cosines = [told["cosine"][at][index] for at in range(2)]
    said = f"register {index} is the longest in {share(told['largest'][index])} of the images"
    said = f"{said}, {number(over)} times as long as the next on average"
    said = "there is one register" if len(told["norms"]) == 1 else said
    said += f"; two images give it a cosine of {number(cosines[0], 4)}, and {number(cosines[1], 4)} as it is read"
    return said + ("" if over is None or over > 2 else "; no register stands out")


def _longest_row(each: Seen) -> list[str]:
    told = details(each)["longest"]
    if told is None:
        return [each.name, *["–"] * 8]
    index = told["index"]
    return [
        each.name, f"register {index}", share(told["largest"][index]), f"{told['norms'][index]:.3g}",
        number(told["over_second"]), number(told["cosine"][0][index], 4), number(told["cosine"][1][index], 4),
        *(share(each) for each in told["few"]),
    ]  # fmt: skip


def tell_cka(seen: Sequence[Seen], album: Album) -> Finding:
    """L3"""
    panels = [
        (title, [WORDS[group] for group in GROUPS], [cka_bars(each, GROUPS, kind) for each in seen])
        for kind, title in (("plain", "CKA"), ("debiased", "CKA, debiased"))
    ]  # fmt: skip
    figure = drawing.bars(names(seen), panels, "likeness to all that attention adds", 1.05)
    caption = (
        "How much like the whole output of attention each part of it is, over all images; lines: 95 % intervals; "
        "dotted: "
        "what chance gives, which is 0 for the debiased one."
    )
    return Finding(
        "L3", "Which part of CLS is like the whole",
        "Keep only what CLS reads from patches, or only what it reads from registers. Are images still laid out alike? "
        "(CKA: 1 is the same, 0 is nothing in common.)",
        each_says(seen, _cka_says),
        "DINOv2 with registers: patches alone are almost the same as the whole for S and B, less so with size; for g "
        "registers alone are closer to the whole than patches alone. The same on ImageNet. The paper gives no numbers.",
        basis(seen), [album.save(figure, "L3_cka", caption)],
        ["network", "part", "CKA", "chance", "debiased", "mean cosine to the whole", "CKA with the stream",
         "CKA after the final norm"],
        [_cka_row(each, group) for each in seen for group in GROUPS],
        [*chosen(seen),
         "Linear CKA compares how images lie to each other: 1 is the same up to rotation and scale. The residual "
         "stream is left out, as in the paper; the last two columns have it in, the second with the feed-forward layer "
         "and the final norm too.",
         "Chance is the mean CKA over all ways to pair the two sets of images at random, which is known exactly from "
         "their spectra; it falls with the number of images. The debiased CKA has the unbiased HSIC of Song et al. "
         "(2012); by chance it is 0.",
         "Intervals: a jackknife that leaves out each eighth of the images in turn."],
    )  # fmt: skip


def _cka_says(each: Seen) -> str:
    told = details(each)["cka"]["last"]
    found = {group: told[group]["debiased"]["value"] for group in GROUPS if group in told}
    parts = [f"{number(value, 3)} for {WORDS[group]}" for group, value in found.items()]
    said = f"debiased CKA with the whole: {', '.join(parts)}"
    patches, registers = found.get("patches"), found.get("registers")
    if patches is None:
        return said + "; nothing that varies is read from patches, or there are too few images"
    if registers is not None and registers > patches:
        return said + "; registers alone are closer to the whole than patches are"
    return said + (
        "; what is read from patches is the whole, nearly" if patches > FAITHFUL
        else "; what is read from patches is far from the whole" if patches < FAINT else ""
    )  # fmt: skip


def _cka_row(each: Seen, group: str) -> list[str]:
    told, after = details(each)["cka"]["last"].get(group), details(each)["cka"]["after"].get(group)
    if told is None:
        return [each.name, WORDS[group], *["–"] * 6]
    cells = []
    for kind in ("plain", "debiased"):
        low, high = told[kind]["interval"] or (None, None)
        cells.append(scored({"value": told[kind]["value"], "low": low, "high": high}, 3) if low is not None else "–")
    stream = details(each)["cka"]["last"][f"{group}+residual"]["plain"]["value"]
    others = (last(each, f"cosine_{group}"), stream, after["plain"] if after else None)
    return [each.name, WORDS[group], cells[0], number(told["floor"], 3), cells[1], *(number(one, 3) for one in others)]


def tell_one_shot(seen: Sequence[Seen], album: Album) -> Finding | None:
    """L4; None without labels."""
    if not any(details(each)["one_shot"] for each in seen):
        return None
    words = {"whole": "whole", **WORDS}
    panels = [(f"top-{top}", list(words.values()), [_shots(each, top) for each in seen]) for top in (1, 5)]
    figure = drawing.bars(names(seen), panels, "images whose class is found, %", 100)
    caption = (
        "A classifier that knows one image a class, by the whole output of attention, is given parts of it. Lines: 95 "
        "% "
        "intervals; dots: other training images; dotted: guessing."
    )
    return Finding(
        "L4", "One training image a class",
        "A classifier learns classes from whole outputs. Does it still find them when given one part only?",
        each_says(seen, _shots_say),
        "DINOv2 with registers, 1,000 classes, top-5: patches alone do poorly for L and g. The paper gives no numbers.",
        "; ".join(dict.fromkeys(_shots_basis(each) for each in seen)),
        [album.save(figure, "L4_one_shot", caption)],
        ["network", "given", "top-1", "top-5", "with the stream, top-1", "after the final norm, top-1"],
        [_shot_row(each, kind, words[kind]) for each in seen for kind in KINDS],
        ["The paper does not name its classifier. Here: the class of the training image with the highest cosine, which "
         "with one image a class is the nearest class mean too. It learns from whole outputs and is tested on parts.",
         "The paper has one test image a class; here all test images that are looked at, for a steadier figure. The "
         "training images are drawn again several times.",
         "Intervals are those of other classes (a bootstrap over classes, and at least Wilson's over images), as "
         "images of a class share their training image.",
         "“With the stream”: added to CLS as it enters the last block, where classes can already be told."],
    )  # fmt: skip


def _shots(each: Seen, top: int) -> list[Bar]:
    """Given each of KINDS."""
    told = details(each)["one_shot"] or {}
    found = [told.get(f"branch/{kind}/top{top}") for kind in KINDS]
    guessing = 100 * min(1, top / details(each)["shots"][1]) if told else None
    return [Bar(one["value"], one["low"], one["high"], guessing, one["draws"]) if one else Bar(None) for one in found]


def _shots_say(each: Seen) -> str:
    told = details(each)["one_shot"]
    if told is None:
        return "no labels, so that there is nothing to measure"
    said = [
        f"{told[f'branch/{kind}/top1']['value']:.1f} % {what}"
        for kind, what in (("whole", "given the whole"), ("patches", "given patches"), ("registers", "given registers"))
        if f"branch/{kind}/top1" in told
    ]
    return f"the class is found for {', '.join(said)}; guessing gives {100 / details(each)['shots'][1]:.3g} %"


def _shots_basis(each: Seen) -> str:
    told = details(each)
    if told["one_shot"] is None:
        return f"{each.name}: no labels"
    draws, classes = told["shots"]
    many = f"{classes:,} classes" if classes != 1 else "1 class"
    return f"{counted(told['images'], 'test image')}, {many} with one training image each, drawn {draws} times"


def _shot_row(each: Seen, kind: str, word: str) -> list[str]:
    told = details(each)["one_shot"] or {}
    names = (f"branch/{kind}/top1", f"branch/{kind}/top5", f"residual/{kind}/top1", f"output/{kind}/top1")
    return [each.name, word, *(scored(told.get(name), 1) for name in names)]
