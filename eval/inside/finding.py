"""One experiment as it is told on the page: a picture or a table, what is seen on it, and what the paper saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eval.report.read import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A colour for each checkpoint, told apart also by those who see few colours (Okabe & Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class Seen:
    """The results of one experiment on one checkpoint, as they are drawn. name: short, for legends."""

    name: str
    evaluation: Evaluation

    @property
    def details(self) -> dict[str, object]:
        return self.evaluation.details

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        return self.evaluation.arrays


@dataclass(frozen=True)
class Picture:
    """A figure as two files, relative to the page: for the screen, and as vectors for a paper."""

    png: str
    pdf: str
    caption: str


@dataclass(frozen=True)
class Finding:
    """A section of the page.

    number: of the experiment in the papers' checklist ("1.1", "2", "L3", "D2"), which orders and links sections;
    question: what it asks, in words that need no paper; seen: what these networks show, in a sentence or two with the
    figures; paper: what the paper saw, in one; basis: how many images and tokens the figures stand on; how: what was
    chosen where papers leave it open, folded away. head, rows: a table, whose cells are text.
    """

    number: str
    title: str
    question: str
    seen: str
    paper: str
    basis: str
    pictures: Sequence[Picture] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    how: Sequence[str] = ()


@dataclass(frozen=True)
class Album:
    """Where figures are saved: in the folder `figures` beside the page."""

    folder: Path

    def save(self, figure: Figure, name: str, caption: str) -> Picture:
        """As figures/NAME.png and figures/NAME.pdf. The figure is not used afterwards."""
        place = self.folder / "figures"
        place.mkdir(parents=True, exist_ok=True)
        for ending in ("png", "pdf"):
            figure.savefig(place / f"{name}.{ending}", dpi=160, bbox_inches="tight")
            figure.set_layout_engine("none")  # it is laid out, and the second file need not be again
        return Picture(f"figures/{name}.png", f"figures/{name}.pdf", caption)


def counted(number: float, what: str) -> str:
    """ "1 image", "1,000 images"."""
    return f"{number:,.0f} {what}{'' if number == 1 else 's'}"


def percent(share: float) -> str:
    """A share of 1 in percent with two digits that count; "–" where it is undefined."""
    if share != share:
        return "–"
    value = 100 * share
    if value == 0 or value >= 10:
        return f"{value:.1f} %" if value else "0 %"
    return f"{value:.2g} %"
