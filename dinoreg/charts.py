"""Plots as inline SVG for `dinoreg.pages`: they take the page's colours, also in the dark and on paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dinoreg.pages import Html, tag, text

COLOURS = 6  # of the page's style
LETTER = 6.6  # pixels that a letter takes, roughly
LABEL = 34  # letters of a bar's label


@dataclass(frozen=True)
class Dot:
    """A value with the interval it lies in, where that is known."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """One line. marks: with a mark at each dot, for few dots."""

    name: str
    dots: Sequence[Dot]
    marks: bool = True


@dataclass(frozen=True)
class Bar:
    """label | bar | said, with the interval as a thin line over the bar."""

    label: str
    value: float
    said: str
    low: float | None = None
    high: float | None = None


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high, at most about `most`."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def lines(
    series: Sequence[Series],
    *,
    across: str,
    up: str,
    width: int = 560,
    height: int = 300,
    whole: bool = False,
) -> Html:
    """Lines over a common axis, their intervals as bands or whiskers. whole: ticks below at the dots themselves."""
    dots = [dot for each in series for dot in each.dots]
    xs = sorted({dot.x for dot in dots})
    ys = [y for dot in dots for y in (dot.y, dot.low, dot.high) if y is not None]
    frame = _Frame(_padded(xs, 0.03), _padded(ys, 0.06), width, height)
    legend = len(series) > 1
    drawn = [
        frame.axes(across, up, xs if whole else ticks(*frame.x)),
        *(frame.line(each, f"var(--c{number % COLOURS})", number) for number, each in enumerate(series)),
    ]
    label = f"{up} against {across}: " + ", ".join(each.name for each in series)
    plot = _svg(width, height, label, *drawn)
    return text(plot, _legend([each.name for each in series])) if legend else plot


def bars(rows: Sequence[Bar], *, limit: float = 100.0, width: int = 640, letters: int = 0) -> Html:
    """Horizontal bars from 0 to `limit`, one below the other. letters: room for labels, where several charts align."""
    left = 12 + LETTER * min(LABEL, letters or max(len(bar.label) for bar in rows))
    right = 14 + LETTER * max(len(bar.said) for bar in rows)
    length, step = width - left - right, 20
    drawn: list[Html] = []
    for number, bar in enumerate(rows):
        y = number * step
        end = left + length * min(1.0, bar.value / limit)
        label = bar.label if len(bar.label) <= LABEL else bar.label[: LABEL - 1] + "…"
        drawn.append(_label(left - 8, y + 14, label, "end"))
        drawn.append(_rect(left, y + 4, length, 12, "var(--line)", 0.45))
        drawn.append(_rect(left, y + 4, end - left, 12, "var(--accent)", 0.85))
        if bar.low is not None and bar.high is not None:
            x1, x2 = (left + length * min(1.0, v / limit) for v in (bar.low, bar.high))
            drawn.append(_path(f"M{x1:.1f} {y + 10}H{x2:.1f}M{x1:.1f} {y + 7}v6M{x2:.1f} {y + 7}v6", "var(--ink)", 1.2))
        drawn.append(_label(left + length + 8, y + 14, bar.said, "start", "soft"))
    said = "; ".join(f"{bar.label}: {bar.said}" for bar in rows)
    return _svg(width, len(rows) * step + 4, said, *drawn)


def whisker(value: float, low: float, high: float, axis: tuple[float, float], width: int = 190) -> Html:
    """A value and its interval on an axis, as a small picture within a line of a table."""
    start, end = axis
    span = (end - start) or 1.0
    x, x1, x2 = (6 + (width - 12) * min(1.0, max(0.0, (v - start) / span)) for v in (value, low, high))
    return _svg(
        width, 18, f"{value:.4g}, between {low:.4g} and {high:.4g}",
        _path(f"M6 9H{width - 6}", "var(--line)", 1),
        _path(f"M{x1:.1f} 9H{x2:.1f}M{x1:.1f} 5v8M{x2:.1f} 5v8", "var(--accent)", 2),
        tag("circle", cx=f"{x:.1f}", cy="9", r="4", fill="var(--accent)"),
    )  # fmt: skip


def heat(value: float, low: float, high: float, said: object, best: bool = False) -> Html:
    """A cell of a table, the darker the higher its value is between low and high; the best one is bold."""
    share = 0.0 if high <= low else (value - low) / (high - low)
    colour = f"background: color-mix(in srgb, var(--accent) {round(4 + 46 * share)}%, transparent)"
    return tag("td", tag("strong", said) if best else said, class_="heat", style=colour)


class _Frame:
    """The place of the axes, and what is drawn in it."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], width: int, height: int) -> None:
        self.x, self.y = x, y
        self.ticks = ticks(*y)
        self.left = 30 + LETTER * max(len(f"{tick:.6g}") for tick in self.ticks)
        self.right, self.top, self.bottom = width - 28.0, 12.0, height - 46.0

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A point in pixels."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    def axes(self, across: str, up: str, below: Sequence[float]) -> Html:
        """Grid, ticks and what the axes are."""
        drawn = []
        for tick in self.ticks:
            _, y = self.at(self.x[0], tick)
            drawn.append(_path(f"M{self.left:.1f} {y:.1f}H{self.right:.1f}", "var(--line)", 1))
            drawn.append(_label(self.left - 6, y + 4, f"{tick:.6g}", "end", "soft"))
        for tick in below:
            x, _ = self.at(tick, self.y[0])
            drawn.append(_path(f"M{x:.1f} {self.bottom:.1f}v5", "var(--soft)", 1))
            drawn.append(_label(x, self.bottom + 18, f"{tick:,.6g}", "middle", "soft"))
        drawn.append(_label((self.left + self.right) / 2, self.bottom + 38, across, "middle"))
        middle = (self.top + self.bottom) / 2
        turned = f"rotate(-90 12 {middle:.1f})"
        drawn.append(tag("text", up, x="12", y=f"{middle:.1f}", text_anchor="middle", transform=turned))
        return text(*drawn)

    def line(self, series: Series, colour: str, number: int) -> Html:
        """One series; whiskers of several ones stand a little beside each other."""
        dots = sorted(series.dots, key=lambda dot: dot.x)
        points = [self.at(dot.x, dot.y) for dot in dots]
        drawn = [_path("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points), colour, 2)] if len(points) > 1 else []
        for dot, (x, y) in zip(dots, points, strict=True):
            if dot.low is not None and dot.high is not None:
                (_, y1), (_, y2) = self.at(dot.x, dot.low), self.at(dot.x, dot.high)
                beside = x + 2.5 * ((number + 1) // 2) * (-1) ** number
                drawn.append(_path(f"M{beside:.1f} {y1:.1f}V{y2:.1f}m-3 0h6M{beside - 3:.1f} {y1:.1f}h6", colour, 1.2))
            if series.marks:
                drawn.append(tag("circle", tag("title", f"{series.name}: {dot.y:.5g} at {dot.x:,.6g}"),
                                 cx=f"{x:.1f}", cy=f"{y:.1f}", r="4", fill=colour))  # fmt: skip
        return text(*drawn)


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = share * (high - low) or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _legend(names: Sequence[str]) -> Html:
    spots = (tag("span", "● ", style=f"color: var(--c{number % COLOURS})") for number in range(len(names)))
    parts = [tag("span", spot, name, style="margin-right: 1.2em") for spot, name in zip(spots, names, strict=True)]
    return tag("p", *parts, class_="small")


def _svg(width: float, height: float, label: str, *content: Html) -> Html:
    return tag(
        "svg", *content, xmlns="http://www.w3.org/2000/svg", role="img", aria_label=label,
        viewBox=f"0 0 {width:g} {height:g}", width=f"{width:g}", height=f"{height:g}",
    )  # fmt: skip


def _path(d: str, colour: str, width: float) -> Html:
    return tag("path", d=d, fill="none", stroke=colour, stroke_width=f"{width:g}")


def _rect(x: float, y: float, width: float, height: float, colour: str, opacity: float) -> Html:
    return tag(
        "rect", x=f"{x:.1f}", y=f"{y:g}", width=f"{max(0.0, width):.1f}", height=f"{height:g}", rx="2", fill=colour,
        fill_opacity=f"{opacity:g}",
    )  # fmt: skip


def _label(x: float, y: float, said: str, anchor: str, class_: str = "") -> Html:
    return tag("text", said, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=class_)
