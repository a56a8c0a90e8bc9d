"""Tells what registers cost: a plot like figure 12 of the registers paper, and the counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval.inside.finding import COLOURS, Album, Finding, Picture, Seen, counted
from eval.inside.maps import times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

USUAL = 4  # registers
ALIKE = 1e-9  # relative difference of two counts that are the same


@dataclass(frozen=True)
class _Kind:
    """Networks that differ in nothing but their registers, and so cost the same with the same number of them.

    own: the registers of each; costs: by number of registers, in that order.
    """

    names: list[str]
    own: list[int]
    costs: dict[int, dict[str, Any]]
    details: dict[str, Any]

    @property
    def name(self) -> str:
        return " / ".join(self.names)

    def more(self, key: str) -> dict[int, float]:
        """By number of registers, percent more than without."""
        return {number: 100 * (cost[key] / self.costs[0][key] - 1) for number, cost in self.costs.items()}


def findings(seen: Sequence[Seen], album: Album) -> list[Finding]:
    """One section."""
    kinds = _kinds(seen)
    return [
        Finding(
            "1.13",
            "What registers cost",
            "Each register is one token more in every layer. How much longer is the network's work, and how much "
            "larger is the network?",
            " ".join(_told(kind, alone=len(kinds) == 1) for kind in kinds) + " " + _agreement(kinds),
            "The paper's figure 12: next to no parameters; less than 2 % more operations with 4 registers, up to about "
            "6 % with 16.",
            "Counts, which are exact: " + "; ".join(_basis(kind, alone=len(kinds) == 1) for kind in kinds) + ".",
            [_picture(kinds, album)],
            *_table(kinds),
            how=[
                "Operations are counted by fvcore on the real modules (one block is traced and counted as often as "
                "there are blocks), and again by a formula from the layers' shapes.",
                "A multiplication with its addition counts as two operations. Norms, softmax and activations count "
                "for nothing. The heads of training are left out.",
                "A register is one token beside those of the patches: on small images, which have few, it adds more.",
                "Registers are added to the network's own architecture: without any, it is what is called 0 here, "
                "whatever the network has. The mask token counts among the parameters.",
                "The paper does not say how it counted, nor at which image size; the grey curve is the formula's for "
                "a ViT-L/14 on images of 224 pixels.",
            ],
        )
    ]  # fmt: skip


def _kinds(seen: Sequence[Seen]) -> list[_Kind]:
    kinds: list[_Kind] = []
    for each in seen:
        details: Any = each.details
        costs = {cost["registers"]: cost for cost in details["costs"]}
        same = next((kind for kind in kinds if kind.costs[0] == costs[0]), None)
        if same is None:
            same = _Kind([], [], {}, details)
            kinds.append(same)
        merged = {**same.costs, **costs}
        same.costs.clear()
        same.costs.update(sorted(merged.items()))
        same.names.append(each.name)
        same.own.append(details["own"])
    return kinds


def _told(kind: _Kind, alone: bool) -> str:
    shown = dict.fromkeys([*(number or USUAL for number in kind.own), max(kind.costs)])
    operations, parameters = kind.more("counted"), kind.more("parameters")
    said = [
        f"{counted(number, 'register')} add{'s' * (number == 1)} {operations[number]:.2f} % to the operations and "
        f"{parameters[number]:.2g} % to the parameters"
        for number in shown
        if number in operations
    ]
    whose = "" if alone else f"{kind.name}: "
    return f"{whose}{'; '.join(said)}."


def _agreement(kinds: Sequence[_Kind]) -> str:
    apart = max(abs(cost["counted"] / cost["formula"] - 1) for kind in kinds for cost in kind.costs.values())
    if apart < ALIKE:
        return "Both ways of counting agree."
    return f"The two ways of counting differ by up to {100 * apart:.2g} %."


def _basis(kind: _Kind, alone: bool) -> str:
    details = kind.details
    whose = "" if alone else f"{kind.name}, "
    return f"{whose}one image of {details['image_size']} pixels, {details['patches']:,} patches; none was looked at"


def _picture(kinds: Sequence[_Kind], album: Album) -> Picture:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    operations, parameters = figure.subplots(1, 2)
    _draw(operations, kinds, "counted", "operations, % more than without")
    _draw(parameters, kinds, "parameters", "parameters, % more than without")
    paper = kinds[0].details["paper"]
    operations.plot(
        paper["registers"], [100 * more for more in paper["increase"]], "--", color="0.5", linewidth=1.2,
        label="ViT-L/14, 224 pixels (formula)",
    )  # fmt: skip
    operations.legend(frameon=False, fontsize=8)
    caption = (
        "What registers add to one forward pass, left, and to the network, right. A ring: a number that a network has."
    )
    return album.save(figure, "cost", caption)


def _draw(axes: Axes, kinds: Sequence[_Kind], key: str, label: str) -> None:
    for at, kind in enumerate(kinds):
        more, colour = kind.more(key), COLOURS[at % len(COLOURS)]
        axes.plot(list(more), list(more.values()), ".-", color=colour, markersize=9, label=kind.name, clip_on=False)
        axes.plot(
            kind.own, [more[number] for number in kind.own], "o", color=colour, markersize=13,
            markerfacecolor="none", clip_on=False,
        )  # fmt: skip
    axes.set_xlabel("registers")
    axes.set_ylabel(label)
    axes.set_xticks(sorted({number for kind in kinds for number in kind.costs}))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _table(kinds: Sequence[_Kind]) -> tuple[list[str], list[list[str]]]:
    head = ["network", "registers", "operations, 10⁹", "more", "by the formula, 10⁹", "parameters", "more"]
    rows = []
    for kind in kinds:
        operations, parameters = kind.more("counted"), kind.more("parameters")
        rows += [
            [
                kind.name,
                str(number),
                times(cost["counted"] / 1e9, 5),
                f"{operations[number]:+.2f} %" if number else "",
                times(cost["formula"] / 1e9, 5),
                f"{cost['parameters']:,}",
                f"{parameters[number]:+.4f} %" if number else "",
            ]
            for number, cost in kind.costs.items()
        ]
    return head, rows
