"""The page with which the demo ends: what was trained, what it learnt, what it sees, how good it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoreg.charts import Dot, Series, lines, whisker
from dinoreg.pages import Html, figure, image, page, row, table, tag, text

PAGE = "index.html"
SCORES = {
    "knn": "which photo do its nearest neighbours come from?",
    "imagenet-linear": "a linear classifier on its features",
    "logreg": "logistic regression on its features",
}


@dataclass(frozen=True)
class Facts:
    """What the page is about. photos: their number; seconds: of all of it; next: commands with what they do."""

    run: Path
    picture: Path
    weights: Path
    steps: int
    photos: int
    next: Sequence[tuple[str, str]]


def write_page(about: Facts, history: Sequence[Mapping[str, float]], results: Sequence[Path]) -> Path:
    """Write RUN/index.html. results: the results.json files of the last step."""
    path = about.run / PAGE
    path.write_text(_page(about, history, [json.loads(each.read_text()) for each in results]), encoding="utf-8")
    return path


def _page(about: Facts, history: Sequence[Mapping[str, float]], results: Sequence[dict[str, Any]]) -> str:
    name = "A small vision transformer with registers, trained on your machine"
    return page(
        name,
        tag("h1", name),
        tag("p", f"It saw tiles of {about.photos} photographs for {about.steps} steps and was not told what they show: "
            "a student network learns to say of small, hidden or recoloured parts what its teacher, a slow average of "
            "itself, says of the whole.", class_="soft"),
        tag("h2", "What it learnt"),
        _curves(history, about.photos),
        tag("h2", "What it sees"),
        tag("p", "Attention of the class token and of each register: bright is where it looks. Registers are tokens "
            "that belong to no place in the image; large networks without them misuse patches for what they hold, "
            "which shows as specks in such maps. The colours say which patches are alike."),
        figure(image(about.picture, "attention maps"),
               "Two photographs; the maps are of the last block. This network is far too small for specks."),
        tag("h2", "How good it is"),
        _scores(results, about),
        tag("h2", "What to try next"),
        table(("command", "what it does"), [(tag("code", command), said) for command, said in about.next]),
        _files(about),
    )  # fmt: skip


def _curves(history: Sequence[Mapping[str, float]], photos: int) -> Html:
    """The loss, and the k-NN during the training."""
    loss = _series(history, "loss", "loss/total")
    knn = _series(history, "k-NN", "knn/top1", scale=100.0, marks=True)
    drawn = []
    if loss.dots:
        said = "What is optimised: DINO, iBOT and KoLeo together."
        drawn.append(figure(lines([loss], across="step", up="loss", width=440, height=270), said))
    if knn.dots:
        said = f"From which photo is a crop of a part that was never trained on? Guessing: {100 / photos:.1f} %."
        drawn.append(figure(lines([knn], across="step", up="right, %", width=440, height=270), said))
    return tag("div", *drawn, class_="side")


def _series(
    history: Sequence[Mapping[str, float]], name: str, key: str, scale: float = 1.0, marks: bool = False
) -> Series:
    return Series(name, [Dot(each["step"], scale * each[key]) for each in history if key in each], marks)


def _scores(results: Sequence[dict[str, Any]], about: Facts) -> Html:
    """What dinoreg-eval found, the first score of each suite."""
    rows = []
    for result in results:
        score = next(iter(result["scores"].values()))
        value, low, high = (score[key] for key in ("value", "low", "high"))
        cells = (
            result["suite"], SCORES.get(result["suite"], ""), tag("strong", f"{value:.1f} %"),
            f"{low:.1f} to {high:.1f}", f"{result['data']['test']:,}", whisker(value, low, high, (0, 100)),
        )  # fmt: skip
        rows.append(row(cells, numbers=(2, 3, 4)))
    head = ("suite", "how it is asked", "right", "95 % interval", "test images", "0 to 100 %")
    return text(
        tag("p", "The network is frozen. From crops of the parts that it was trained on, with the photos' names, it is "
            f"learnt to name crops of the parts that it never saw. Guessing would find {100 / about.photos:.1f} %."),
        table(head, rows, numbers=(2, 3, 4)),
        tag("p", tag("a", "The whole report", href="eval/report.html"), ": protocols, classes, everything that was "
            "chosen."),
    )  # fmt: skip


def _files(about: Facts) -> Html:
    """Where things lie."""
    places = (
        (about.weights, "the backbone, for dinoreg.load_backbone and dinoreg-eval"),
        (about.run / "metrics.jsonl", "every number of the training, step by step"),
        (about.run / "config.yaml", "the recipe with everything resolved"),
    )
    items = [tag("p", tag("code", path), f" {said}", class_="small") for path, said in places]
    return text(tag("h3", "Where everything is"), *items)
