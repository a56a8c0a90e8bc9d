"""What the findings of this part have in common: figures out of results, and how they are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from eval.inside.decoupling.drawing import Bar, Curve
from eval.inside.finding import Seen, counted

WORDS = {"patches": "patches", "registers": "registers", "cls": "CLS itself"}


def details(each: Seen) -> dict[str, Any]:
    return dict(each.details)


def names(seen: Sequence[Seen]) -> list[str]:
    return [each.name for each in seen]


def number(value: float | None, digits: int = 2) -> str:
    """With so many digits after the point; "–" where it is undefined."""
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")  # no "−0.00"


def share(value: float | None) -> str:
    """A share of 1 in percent; "–" where it is undefined."""
    return "–" if value is None else f"{100 * value:.1f} %"


def scored(told: dict[str, Any] | None, digits: int = 2) -> str:
    """A score with its interval."""
    if told is None:
        return "–"
    unit = f" {told['unit']}" if told.get("unit") else ""
    low, high = (number(told[end], digits) for end in ("low", "high"))
    return f"{number(told['value'], digits)}{unit} ({low} to {high})"


def bar(told: dict[str, Any] | None) -> Bar:
    """Of a score; – where there is none."""
    return Bar(None) if told is None else Bar(told["value"], told["low"], told["high"])


def cka_bars(each: Seen, which: Sequence[str], kind: str) -> list[Bar]:
    """Figures of `summary.ckas` in the last layer, and what chance gives; – where undefined."""
    return [_cka_bar(details(each)["cka"]["last"].get(name), kind) for name in which]


def _cka_bar(told: dict[str, Any] | None, kind: str) -> Bar:
    if told is None or told[kind]["value"] is None:
        return Bar(None)
    low, high = told[kind]["interval"] or (None, None)
    return Bar(told[kind]["value"], low, high, told["floor"] if kind == "plain" else 0.0)


def curve(each: Seen, name: str, factor: float = 1.0) -> Curve | None:
    """A figure of `measure.ROW` over all layers: its mean, and between which 90 % of the images lie."""
    told = details(each)["layers"][name]
    if not any(told["defined"]):
        return None
    scaled = [None if value is None else factor * value for value in told["mean"]]
    low, high = ([None if each is None else factor * each[at] for each in told["quantiles"]] for at in (0, -1))
    return Curve(range(len(scaled)), scaled, low, high)


def last(each: Seen, name: str) -> float | None:
    """The mean of a figure of `measure.ROW` in the last layer."""
    return details(each)["layers"][name]["mean"][-1]


def each_says(seen: Sequence[Seen], say: Callable[[Seen], str]) -> str:
    """A sentence for each network, with its name where there are several."""
    if len(seen) == 1:
        said = say(seen[0])
        return said[0].upper() + said[1:] + "."
    return " ".join(f"{each.name}: {say(each)}." for each in seen)


def basis(seen: Sequence[Seen]) -> str:
    """How many images and tokens the figures stand on."""
    found = [(told["images"], told["patches"], told["registers"]) for told in map(details, seen)]
    if len({each[:2] for each in found}) == 1:
        images, patches, _ = found[0]
        registers = " or ".join(str(each) for each in sorted({each[2] for each in found}))
        whose = ", for each network" if len(seen) > 1 else ""
        return (
            f"{counted(images, 'image')}{whose}; of each the {patches:,} patches, CLS and the registers ({registers})"
        )
    return "; ".join(
        f"{each.name}: {counted(images, 'image')}, of each the {patches:,} patches, CLS and the registers ({registers})"
        for each, (images, patches, registers) in zip(seen, found, strict=True)
    )


def drawn(seen: Sequence[Seen]) -> list[str]:
    """Where figures show fewer images than the numbers stand on."""
    return [
        f"{each.name}: figures show {counted(shown, 'image')} of the {images:,}, evenly spaced."
        for each in seen
        if (shown := len(each.arrays["last"])) < (images := details(each)["images"])
    ]


def chosen(seen: Sequence[Seen]) -> list[str]:
    """What the paper leaves open of the split, as it was chosen."""
    said = []
    options = {
        "renormalise": (
            "Where one group is kept alone, its attention weights are scaled so that they sum to 1 in each head.",
            "Where one group is kept alone, all other attention weights are 0 and its own stay as they are.",
        ),
        "own": (
            "All that attention adds has in it what CLS reads from itself.",
            "What CLS reads from itself is left out of all that attention adds.",
        ),
        "bias": (
            "The output bias is part of what attention adds, and of each part of it.",
            "The output bias, the same for all images, is left out of what attention adds.",
        ),
    }
    for key, (yes, no) in options.items():
        values = {bool(each.evaluation.protocol.get(key)) for each in seen}
        said += [text for value, text in ((True, yes), (False, no)) if value in values]
    return said
