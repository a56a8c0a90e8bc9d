"""Predicted masks and depth maps beside the truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinoreg.pages import Html, figure, image, tag, text
from eval.dense.pictures import RAMP, colour
from eval.report.read import Evaluation

SHOWN = 8  # images
LEGEND = 24  # classes
NAME, PHOTO = "name", "image"


def pictures(evaluation: Evaluation) -> Html:
    """A line of pictures for each image that the suite drew; nothing for a suite that draws none."""
    entries = evaluation.details.get("pictures") or []
    rows = [_row(evaluation.path.parent, entry) for entry in entries[:SHOWN]]
    if not rows:
        return Html()
    heading = tag("h3", "Predictions beside the truth")
    said = f"{len(rows)} of the {evaluation.images:,} test images, not chosen by how well they went."
    return text(heading, tag("p", said, class_="small soft"), _classes(evaluation), *rows)


def _row(folder: Path, entry: dict[str, Any]) -> Html:
    """The photo, the truth, the prediction(s)."""
    parts = {name: folder / file for name, file in entry.items() if name != NAME and isinstance(file, str)}
    shown = [_picture(path, name, entry) for name, path in parts.items()]
    columns = f"grid-template-columns: repeat({max(3, len(shown))}, 1fr)"
    return text(tag("div", *shown, class_="pictures", style=columns), _scale(entry))


def _picture(path: Path, part: str, entry: dict[str, Any]) -> Html:
    """One of them; a word instead where the file is lost or damaged."""
    try:
        # Labels lose their meaning with their exact colours, depths do not.
        drawn = image(path, f"{entry.get(NAME, '')}: {part}", photo=part == PHOTO or "low_m" in entry)
    except FileNotFoundError:
        return tag("p", f"{path.name} is no longer there", class_="soft small")
    except OSError:
        return tag("p", f"{path.name} cannot be read", class_="soft small")
    return figure(drawn, _caption(part, entry))


def _caption(part: str, entry: dict[str, Any]) -> str:
    if part == PHOTO:
        return str(entry.get(NAME, ""))
    known = {"prediction": "predicted", "prediction_lin1": "predicted from 1 block"}
    return known.get(part, part.replace("prediction_lin", "predicted from ") + " blocks" * ("_lin" in part))


def _scale(entry: dict[str, Any]) -> Html:
    """From which depth to which the colours go."""
    if "low_m" not in entry:
        return Html()
    colours = ", ".join(f"rgb({red:.0f} {green:.0f} {blue:.0f})" for red, green, blue in RAMP)
    style = f"width: 9rem; background: linear-gradient(to right, {colours})"
    bar = tag("span", class_="swatch", style=style)
    return tag("p", f"{entry['low_m']:.1f} m ", bar, f" {entry['high_m']:.1f} m; black: not known", class_="small soft")


def _classes(evaluation: Evaluation) -> Html:
    """The colours of the commonest classes."""
    names: Sequence[str] = evaluation.data.get("class_names") or []
    rows = evaluation.details.get("by_class") or []
    if not rows or not isinstance(rows[0], dict) or len(rows) != len(names):
        return Html()
    common = sorted(range(len(names)), key=lambda number: -(rows[number].get("pixels") or 0))[:LEGEND]
    items = []
    for number in sorted(common):
        red, green, blue = colour(number)
        swatch = tag("span", class_="swatch", style=f"background: rgb({red} {green} {blue})")
        items.append(tag("span", swatch, names[number], class_="item"))
    return tag("p", *(text(item, " ") for item in items), "black: not counted", class_="legend small")
