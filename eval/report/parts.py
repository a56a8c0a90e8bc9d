"""The parts of a suite's section: its scores, what was tried, classes, pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from dinoreg.charts import Bar, Dot, Series, bars, heat, lines, whisker
from dinoreg.pages import Html, folded, row, table, tag, text
from eval.metrics import share_interval
from eval.report.read import Evaluation
from eval.report.wording import about_score
from eval.results import Score

ALL_CLASSES = 24  # up to so many are shown, else the best and the worst
ENDS = 12


def scores_table(evaluation: Evaluation) -> Html:
    """Each score with its meaning, its interval and the number of images."""
    rows = []
    for name, score in evaluation.scores.items():
        value, between = score.texts()
        cells = (name, about_score(name), value, between, f"{evaluation.images:,}", interval(score))
        rows.append(row(cells, numbers=(2, 3, 4), class_="main" if name in evaluation.headlines else ""))
    head = ("score", "what it is", "value", "95 % interval", "test images", axis_of(evaluation.scores.values()))
    return table(head, rows, numbers=(2, 3, 4))


def axis_of(scores: Iterable[Score]) -> str:
    """The heading over their pictures."""
    return "0 to 100 %" if any(score.unit == "%" for score in scores) else ""


def interval(score: Score) -> Html:
    """Percent from 0 to 100; other figures have no common axis."""
    return whisker(score.value, score.low, score.high, (0, 100)) if score.unit == "%" else Html()


def tried(evaluation: Evaluation) -> Html:
    """The grid over hyperparameters, where the suite has one."""
    grid = evaluation.details.get("grid") or []
    if grid and {"rate", "layers", "avgpool", "chosen_by"} <= set(grid[0]):
        return _rates(grid, evaluation)
    if grid and {"C", "top1"} <= set(grid[0]):
        return _strengths(grid, evaluation)
    return Html()


def _rates(grid: Sequence[dict[str, Any]], evaluation: Evaluation) -> Html:
    """Accuracy by learning rate and features."""
    count = held_out(evaluation)
    where = f"the {count:,} held-out images" if count else "the test images"
    return text(
        tag("h3", "What was tried"),
        tag("p", f"Top-1 accuracy in percent on {where}, by which the setting in bold was chosen, for each learning "
            "rate (of 256 images).", class_="small soft"),
        _map(grid, "chosen_by"),
        folded("the same on the test images, which chose nothing", _map(grid, "test"))
        if count
        else "",
    )  # fmt: skip


def held_out(evaluation: Evaluation) -> int:
    """How many training images the choice was made on; 0 where it was made on the test images."""
    if evaluation.protocol.get("select") == "val":
        return 0
    return max(1, round(evaluation.data["train"] * evaluation.protocol.get("heldout", 0.1)))


def _map(grid: Sequence[dict[str, Any]], key: str) -> Html:
    """A line for each set of features, a column for each learning rate."""
    rates = sorted({trial["rate"] for trial in grid})
    values = [trial[key] for trial in grid]
    best = max(grid, key=lambda trial: trial["chosen_by"])
    rows = []
    for (layers, avgpool), trials in groupby(grid, key=lambda trial: (trial["layers"], trial["avgpool"])):
        found = {trial["rate"]: trial for trial in trials}
        name = f"{layers} class token{'s' * (layers > 1)}{' + patch mean' * avgpool}"
        cells = [
            heat(found[rate][key], min(values), max(values), f"{found[rate][key]:.1f}", found[rate] is best)
            if rate in found
            else ""
            for rate in rates
        ]
        rows.append(row([name, *cells]))
    return table(["features", *(f"{rate:g}" for rate in rates)], rows, numbers=range(1, 1 + len(rates)))


def _strengths(grid: Sequence[dict[str, Any]], evaluation: Evaluation) -> Html:
    """Accuracy by C."""
    count = held_out(evaluation)
    where = f"{count:,} held-out" if count else "test"
    dots = [Dot(math.log10(trial["C"]), trial["top1"]) for trial in grid]
    chart = lines(
        [Series("accuracy", dots)], across="log10 of C (to the right: less regularisation)", up="top-1, %", height=240
    )
    chosen = math.log10(evaluation.details["C"])
    said = f"Top-1 accuracy in percent on the {where} images for each C. Chosen: log10 C = {chosen:.3g}."
    return text(tag("h3", "What was tried"), tag("p", said, class_="small soft"), chart)


def classes(evaluation: Evaluation) -> Html:
    """Bars for the classes; for many, the best and the worst."""
    found, meaning = _class_bars(evaluation)
    if not found:
        return Html()
    ordered = sorted(found, key=lambda bar: -bar.value)
    heading = tag("h3", "Classes"), tag("p", meaning, class_="small soft")
    if len(ordered) <= ALL_CLASSES:
        return text(*heading, bars(ordered))
    longest = max(len(bar.label) for bar in ordered)
    return text(
        *heading,
        tag("p", f"The best {ENDS} of {len(ordered)}", class_="small"),
        bars(ordered[:ENDS], letters=longest),
        tag("p", f"The worst {ENDS}", class_="small"),
        bars(ordered[-ENDS:], letters=longest),
    )


def _class_bars(evaluation: Evaluation) -> tuple[list[Bar], str]:
    """What is known of each class, and what it means."""
    data, details = evaluation.data, evaluation.details
    names = list(data.get("class_names") or [])
    rows = details.get("by_class") or details.get("classes") or []
    if rows and isinstance(rows[0], dict):
        said = "Intersection over union of each class that occurs, in percent; beside it, its share of the true pixels."
        return [
            Bar(str(each["class"]), each["iou"], f"{each['iou']:.1f} %, {each['pixels'] or 0:.2g} % of pixels")
            for each in rows
            if each.get("iou") is not None
        ], said
    counts = data.get("test_of_class") or []
    bars_found = []
    for number, value in enumerate(rows):
        count = counts[number] if number < len(counts) else 0
        low, high = share_interval(round(value / 100 * count), count) if count else (None, None)
        images = f" of {count}" if count else ""
        name = str(names[number]) if number < len(names) else f"class {number}"
        bars_found.append(Bar(name, value, f"{value:.0f} %{images}", low, high))
    return bars_found, (
        "Test images of each class that are recognised, and of how many; the thin line is the 95 % interval (Wilson's) "
        "for so many images."
    )
