"""Suites, scores and protocols in words, for readers who have not read the papers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from eval.report.read import Evaluation
from eval.suites import SUITES

ABOUT = {
    "knn": "Each test image is given the class that is commonest, weighted by likeness, among the training images most "
    "like it in the eyes of the network. Nothing is trained: it says how well that likeness agrees with the classes.",
    "imagenet-linear": "A linear classifier is trained on what the frozen network says of each image. The score says "
    "how easily the classes can be read from the features.",
    "logreg": "Logistic regression, solved to its optimum, on the frozen network's class token; the strength of its "
    "regularisation is the only choice.",
    "ade20k-linear": "A linear layer on the frozen patch tokens names the class of every pixel. The score says how "
    "much of objects and surroundings the patches know.",
    "ade20k-ms": "A linear layer on the patch tokens of the last four blocks names the class of every pixel; its "
    "answers for several sizes of the image are averaged.",
    "nyud-linear": "A linear layer on the frozen patch tokens says how far every pixel is from the camera. The score "
    "says how much geometry the patches know.",
}
# By the beginning of a score's name, the first that fits; suites put suffixes behind.
SCORES: list[tuple[str, str]] = [
    (r"top1_k(\d+)", "the same with {0} neighbours"),
    (r"top1", "test images whose first guess is right"),
    (r"top(\d+)", "test images whose class is among the first {0} guesses"),
    (r"miou", "overlap of predicted and true areas (intersection over union), the mean over classes"),
    (r"pixel_accuracy", "pixels with the right class"),
    (r"mean_accuracy", "pixels of a class that are found, the mean over classes"),
    (r"rmse", "root of the mean squared error in metres, the mean over images; less is better"),
    (r"absrel", "error as a share of the true distance; less is better"),
    (r"log10", "error of the distance's logarithm; less is better"),
    (r"delta(\d)", "share of pixels whose distance is wrong by less than a factor of 1.25 to the power {0}"),
]
# Values of a protocol that the published figures used where our defaults, on purpose, are others.
PUBLISHED: dict[str, dict[str, Any]] = {"imagenet-linear": {"select": "val"}}
# Options that change how fast a figure is there, or follow from the network, and not what it means.
CIRCUMSTANCES = {
    "batch",
    "precision",
    "save_every",
    "max_bad_share",
    "image_size",
    "view",
    "preset",
    "seed",
    "pictures",
}
# Of the standard data: training images, test images, and what they are called.
STANDARD = {
    "imagenet": (1_281_167, 50_000, "ImageNet-1k"),
    "ade20k": (20_210, 2_000, "ADE20k"),
    "nyud": (24_231, 654, "NYU Depth v2"),
}


def about(suite: str) -> str:
    """What a suite does and what its score says; nothing for a suite without words."""
    return next((said for name, said in ABOUT.items() if suite == name or suite.startswith(name)), "")


def about_score(name: str) -> str:
    """What a score is."""
    for pattern, said in SCORES:
        if found := re.match(pattern + r"(?![a-z0-9])", name.lower()):
            blocks = name.partition("_lin")[2]
            return said.format(*found.groups()) + (f" (from {blocks} block{'s' * (blocks != '1')})" if blocks else "")
    return ""


def as_text(value: Any) -> str:
    """A value of a protocol."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, list | tuple):
        return ", ".join(map(as_text, value))
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def standard_of(evaluation: Evaluation) -> str | None:
    """The name of the standard data set it was measured on, all of its images; None for any other data."""
    kind = SUITES[evaluation.suite].data if evaluation.suite in SUITES else ""
    train, test, name = STANDARD.get(kind, (0, 0, ""))
    # Which images they are nobody can know from here; so many of each part are hardly those of another set.
    found = evaluation.data.get("train"), evaluation.data.get("test")
    if "official" in evaluation.data:  # the suite looked at what they are; several training sets are in use
        return name if evaluation.data["official"] and found[1] == test else None
    return name if train and found == (train, test) else None


def changed(evaluation: Evaluation) -> dict[str, tuple[Any, Any]]:
    """Options with another value than the published protocol's: (value, published)."""
    if evaluation.suite not in SUITES:
        return {}
    defaults = vars(SUITES[evaluation.suite].schema()()) | PUBLISHED.get(evaluation.suite, {})
    return {
        key: (evaluation.protocol[key], published)
        for key, published in defaults.items()
        if key not in CIRCUMSTANCES and key in evaluation.protocol and not _same(evaluation.protocol[key], published)
        if not key.startswith("max_") or evaluation.data.get(key[4:]) == evaluation.protocol[key]  # else all are used
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) or isinstance(other, float):
        return abs(float(one) - float(other)) <= 1e-9 * max(1.0, abs(float(other)))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def differences(evaluation: Evaluation) -> list[str]:
    """In which ways the figures are not what papers report, in sentences."""
    said = []
    kind = SUITES[evaluation.suite].data if evaluation.suite in SUITES else ""
    if kind in STANDARD and standard_of(evaluation) is None:
        train, test, name = STANDARD[kind]
        said.append(f"The data: published figures are for {name}, {train:,} training and {test:,} test images.")
    for key, (value, published) in changed(evaluation).items():
        if key == "select":
            said.append("The choice: published figures are of the setting that is best on the test images themselves.")
        elif key in ("max_train", "max_test"):
            which = "training" if key == "max_train" else "test"
            said.append(f"{value:,} {which} images are used; published figures use all.")
        else:
            said.append(f"{key} = {as_text(value)}; published: {as_text(published)}.")
    return said + [sentence(note) for note in evaluation.notes if "published" in note and "preset" not in note]


def notes(evaluation: Evaluation) -> list[str]:
    """The suite's own, but for those on published figures, which `differences` has."""
    return [sentence(note) for note in evaluation.notes if "published" not in note]


def sentence(note: str) -> str:
    """A note with a capital letter and a full stop."""
    return f"{note[0].upper()}{note[1:]}."


def protocol(evaluation: Evaluation) -> list[str]:
    """How it was measured, in sentences."""
    said = _PROTOCOLS.get(evaluation.suite, _plain)(evaluation.protocol, evaluation)
    if view := evaluation.protocol.get("view"):
        said.insert(0, f"Each image: {view}; in {_precision(evaluation.protocol)}.")
    return said


def _precision(options: dict[str, Any]) -> str:
    return {"bf16": "bfloat16", "fp16": "half precision", "fp32": "single precision"}.get(
        str(options.get("precision")), str(options.get("precision"))
    )


def _plain(options: dict[str, Any], evaluation: Evaluation) -> list[str]:
    return []


def _chosen_on(options: dict[str, Any]) -> str:
    if options.get("select") == "val":
        return "on the test images themselves, as published, which flatters the score a little"
    return f"on {options.get('heldout', 0.1):.0%} of the training images, held out; the test images chose nothing"


def _knn(options: dict[str, Any], evaluation: Evaluation) -> list[str]:
    return [
        f"Feature: the class token after the final norm, at length 1. The {options['main_k']} most similar of the "
        f"training images vote, each with the weight exp(similarity / {options['temperature']:g}).",
        f"Nothing is chosen on the test images: k = {options['main_k']} was set beforehand, and the other numbers of "
        "neighbours are reported beside it.",
    ]


def _linear(options: dict[str, Any], evaluation: Evaluation) -> list[str]:
    trials = len(evaluation.details.get("grid", []))
    return [
        f"{trials} classifiers with different learning rates and features are trained side by side, for "
        f"{options['steps']:,} steps of {options['batch_size']:,} images, by SGD without weight decay.",
        f"One of them is chosen {_chosen_on(options)}.",
    ]


def _logreg(options: dict[str, Any], evaluation: Evaluation) -> list[str]:
    return [
        f"L-BFGS with at most {options['max_iter']:,} iterations on the class token after the final norm, in "
        f"{'double' if options['dtype'] == 'fp64' else 'single'} precision.",
        f"C is chosen out of {options['c_steps']} values from 1e{options['c_low']:g} to 1e{options['c_high']:g} "
        f"{_chosen_on(options)}. The last fit is on all training images.",
    ]


def _dense(options: dict[str, Any], evaluation: Evaluation) -> list[str]:
    """For suites on whole images, whose protocols hold sentences of their own."""
    said = [
        f"Trained for {options['steps']:,} steps of {options['batch_size']:,} images by AdamW (learning rate "
        f"{options['rate']:g}, weight decay {options['weight_decay']:g}); the network itself is frozen. Nothing is "
        "chosen on the test images.",
    ]
    names = {
        "resized": "Images resized", "features": "Features", "tested": "Tested on", "compared": "Compared over",
        "miou": "Mean IoU", "loss": "Loss",
    }  # fmt: skip
    for key, name in names.items():
        if key in options:
            said.append(f"{name}{':' * (key in ('features', 'loss', 'miou', 'resized'))} {options[key]}.")
    return said


_PROTOCOLS: dict[str, Callable[[dict[str, Any], Evaluation], list[str]]] = {
    "knn": _knn,
    "imagenet-linear": _linear,
    "logreg": _logreg,
    "ade20k-linear": _dense,
    "ade20k-ms": _dense,
    "nyud-linear": _dense,
}
