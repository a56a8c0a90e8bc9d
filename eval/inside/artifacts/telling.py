"""How figures of one network or of several become sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from eval.inside.finding import Seen, counted
from eval.inside.maps import times


def details(seen: Seen) -> dict[str, Any]:
    """Of one network, as its experiment left them."""
    return dict(seen.details)


def cutoff(seen: Seen) -> float | None:
    return details(seen)["cutoff"]["value"]


def basis(seen: Sequence[Seen]) -> str:
    """How many images and tokens the figures stand on."""
    said = [
        f"{counted(details(each)['norms']['images'], 'image')}, "
        f"{counted(details(each)['norms']['tokens'], 'patch token')}"
        for each in seen
    ]
    if len(set(said)) == 1:
        return said[0] + (" for each network" if len(seen) > 1 else "")
    return "; ".join(f"{each.name}: {what}" for each, what in zip(seen, said, strict=True))


def number(value: float | None, digits: int = 3) -> str:
    """With so many digits that count; "–" where it is undefined."""
    return "–" if value is None else times(value, digits)


def each_says(seen: Sequence[Seen], say: Callable[[Seen], str]) -> str:
    """A sentence for each network, with its name where there are several; those of which the same is said share one."""
    of: dict[str, list[str]] = {}
    for each in seen:
        of.setdefault(say(each), []).append(each.name)
    if len(seen) == 1:
        return "".join(f"{said[0].upper()}{said[1:]}." for said in of)
    return " ".join(f"{' and '.join(who)}: {said}." for said, who in of.items())


def names(seen: Sequence[Seen]) -> list[str]:
    return [each.name for each in seen]


def interval(seen: Seen, score: str, digits: int = 3) -> str:
    """Of a score, "–" where it is undefined."""
    found = seen.evaluation.scores.get(score)
    return "–" if found is None else f"{number(found.low, digits)} to {number(found.high, digits)}"
