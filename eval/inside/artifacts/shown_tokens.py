"""1.4 and 1.5: what is in a token, of its own patch and of the whole image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.inside.artifacts import drawing
from eval.inside.artifacts.telling import details, each_says, interval, names, number
from eval.inside.finding import Album, Finding, Seen, counted

GROUPS = ("normal", "outlier")


def tell_probes(seen: Sequence[Seen], album: Album) -> Finding | None:
    """1.4"""
    seen = [each for each in seen if "probes" in details(each)]
    if not seen:
        return None
    mix = seen[0].evaluation.protocol["probe_mix"]
    mixed = "drawn as they come" if mix == "natural" else "half of them outliers where there are enough"
    return Finding(
        "1.4", "What outliers still know of their own patch",
        "Can a linear map read from a token where its patch lies, and what its pixels are?",
        each_says(seen, _probes_say),
        "DINOv2 ViT-g: normal patches tell their position in 41.7 % of the cases, outliers in 22.8 %, being off by "
        "0.79 and 5.09 patches in the mean; the error of reconstructed pixels is 18.38 and 25.23 (figure 5b, read "
        "second-hand).",
        "; ".join(_probes_basis(each) for each in seen), (),
        ["network", "tokens", "number", "position", "95 % interval", "patches off", "95 % interval", "pixel error",
         "95 % interval", "mean patch's error"],
        [row for each in seen for row in _probes_rows(each)],
        ["One softmax over all positions, one ridge regression of the normalised pixels, from standardised tokens "
         f"of the last layer; trained on every second image, tokens {mixed}; tested on the other images.",
         "The pixel error is the L2 distance for a patch. What always guessing the mean patch costs stands beside "
         "it, for flat patches are easier to guess. Absolute errors cannot be compared with the paper's, whose "
         "scaling is not given."],
    )  # fmt: skip


def _probes_say(each: Seen) -> str:
    told = details(each)["probes"]
    normal, outlier = (told[group] for group in GROUPS)
    if not normal["tokens"]:
        return "no normal patches to compare"
    guess = 100 * told["chance"]["top1"]
    right = f"{normal['position_top1']:.1f}"
    says = f"a normal patch tells its position in {right} % of the cases (chance {number(guess, 2)} %)"
    if not outlier["tokens"]:
        return f"{says}; there are no outliers to compare"
    return (
        f"{says}, an outlier in {outlier['position_top1']:.1f} %; pixels are reconstructed with an error of "
        f"{number(normal['pixel_error'])} and {number(outlier['pixel_error'])}"
    )


def _probes_basis(each: Seen) -> str:
    told = details(each)["probes"]
    tested = " and ".join(
        f"{counted(told[group]['tokens'], 'token')} of {group} patches" for group in GROUPS if told[group]["tokens"]
    )
    trained = (
        f"trained on {counted(told['trained']['tokens'], 'token')} of {counted(told['trained']['images'], 'image')}"
    )
    return f"{each.name}: {trained}, tested on {tested} of {counted(told['normal']['images'], 'other image')}"


def _probes_rows(each: Seen) -> list[list[str]]:
    told = details(each)["probes"]
    rows = [_probes_row(each, group, told[group]) for group in GROUPS]
    guess = told["chance"]
    return [
        *rows,
        [each.name, "chance", "", f"{100 * guess['top1']:.2g} %", "", number(guess["distance"]), "", "", "", ""],
    ]


def _probes_row(each: Seen, group: str, told: dict[str, Any]) -> list[str]:
    top1 = told.get("position_top1")
    return [
        each.name, group, f"{told['tokens']:,}",
        "–" if top1 is None else f"{top1:.1f} %", interval(each, f"position_top1_{group}"),
        number(told.get("position_distance")), interval(each, f"position_distance_{group}"),
        number(told.get("pixel_error"), 4), interval(each, f"pixel_error_{group}", 4),
        number(told.get("pixel_error_of_mean"), 4),
    ]  # fmt: skip


def tell_single(seen: Sequence[Seen], album: Album) -> Finding | None:
    """1.5"""
    seen = [each for each in seen if "single" in details(each)]
    if not seen:
        return None
    columns = [_columns(each) for each in seen]
    figure = drawing.accuracy_bars(names(seen), columns, [_scores(each) for each in seen])
    caption = "Accuracy from one token of each image; lines are 95 % intervals."
    how = details(seen[0])["single"]
    return Finding(
        "1.5", "One token as the description of the whole image",
        "Does a single outlier tell what is in the whole image, where a single normal patch cannot?",
        each_says(seen, _single_say),
        "DINOv2 ViT-g, mean of draws: on ImageNet CLS 86.0, a normal patch 65.8, an outlier 69.0; on Aircraft 87.3, "
        "17.1 and 79.1; on Caltech-101 96.9, 73.2 and 97.6 %. With a register, it takes the outliers' part.",
        "; ".join(_single_basis(each) for each in seen),
        [album.save(figure, "1.5_single", caption)],
        ["network", "token", "top-1", "95 % interval", "std over draws", "mean of classes", "C"],
        [row for each in seen for row in _single_rows(each)],
        ["Logistic regression on one token an image; C is chosen on held-out training images in the first of "
         f"{counted(how['draws'], 'draw')} of random tokens.",
         "Images without an outlier count in no column, so that all columns are of the same images; '–' where too "
         "few images have one, and then all images count."],
    )  # fmt: skip


def _columns(each: Seen) -> dict[str, dict[str, Any] | None]:
    """CLS, normal, outlier (None where there is none), registers."""
    found = details(each)["single"]["columns"]
    return {"CLS": found["CLS"], "normal": found["normal"], "outlier": found.get("outlier")} | found


def _scores(each: Seen) -> dict[str, tuple[float, float]]:
    """Intervals by column."""
    scores = each.evaluation.scores
    named = {column: scores.get(f"single_{column.lower().replace(' ', '_')}_top1") for column in _columns(each)}
    return {column: (score.low, score.high) for column, score in named.items() if score is not None}


def _single_say(each: Seen) -> str:
    said = [
        f"{column} {found['top1']:.1f} %"
        for column, found in _columns(each).items()
        if found and "register" not in column
    ]
    registers = {column: found["top1"] for column, found in _columns(each).items() if found and "register" in column}
    if registers:
        best = max(registers, key=lambda column: registers[column])
        said.append(f"best of the registers ({best}) {registers[best]:.1f} %")
    guess = 100 / details(each)["single"]["classes"]
    text = f"top-1 accuracy from one token is {', '.join(said)} (chance {guess:.2g} %)"
    return text if _columns(each)["outlier"] else f"{text}; too few images have an outlier to classify by one"


def _single_basis(each: Seen) -> str:
    told = details(each)["single"]
    skipped = told["skipped_train"] + told["skipped_test"]
    left_out = f", {counted(skipped, 'image')} without an outlier left out" if skipped else ""
    return (
        f"{each.name}: {told['train']:,} training and {counted(told['test'], 'test image')} of "
        f"{told['classes']} classes, one token each{left_out}"
    )


def _single_rows(each: Seen) -> list[list[str]]:
    rows = []
    for column, found in _columns(each).items():
        if found is None:
            rows.append([each.name, column, "–", "–", "–", "–", "–"])
            continue
        score = f"single_{column.lower().replace(' ', '_')}_top1"
        spread = number(found["std"], 2)
        rows.append(
            [each.name, column, f"{found['top1']:.1f} %", interval(each, score), spread,
             f"{found['mean_per_class']:.1f} %", number(found["C"], 2)]
        )  # fmt: skip
    return rows
