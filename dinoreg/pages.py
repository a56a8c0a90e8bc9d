"""HTML pages that need nothing but themselves: no scripts, nothing fetched; readable on screens, dark ones and paper.

Every function returns `Html`; whatever else is passed as content is text, and is escaped.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

WIDEST = 1600  # pixels of an embedded picture; more is not seen on a page
HEAVIEST = 400_000  # bytes of one; what has more becomes a JPEG

# The series colours keep their distance for colour-blind readers (after Paul Tol), in a darker and a lighter set.
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6470; --line: #d9dee4; --page: #ffffff; --panel: #f5f7f9;
  --accent: #2864b4; --good: #1a7f37; --bad: #b42318; --warn: #fff4d6; --warn-line: #e0b13c;
  --c0: #2864b4; --c1: #d1495b; --c2: #228833; --c3: #b8860b; --c4: #8e44ad; --c5: #128c9c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ed; --soft: #9aa5b1; --line: #343b44; --page: #14171b;
  --panel: #1d2127; --accent: #6fa8ee; --good: #5cc878; --bad: #ff8577; --warn: #332a12; --warn-line: #8a6d1f;
  --c0: #6fa8ee; --c1: #f08796; --c2: #66c27a; --c3: #e0b84a; --c4: #c08be0; --c5: #52c4d3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; } h1 + p { margin-top: 0; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .5rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p, ul, ol { margin: .5rem 0; max-width: 50rem; } ul, ol { padding-left: 1.25rem; } li { margin: .15rem 0; }
a { color: var(--accent); } code, pre { font: .86em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { overflow-wrap: anywhere; } pre { background: var(--panel); padding: .7rem .9rem; border-radius: 6px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.soft { color: var(--soft); } .small { font-size: .86rem; } .good { color: var(--good); } .bad { color: var(--bad); }
body.wide { max-width: 84rem; } div.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .7rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .8rem .32rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th:not(:first-child), td:not(:first-child) { padding-left: .4rem; }
thead th { font-size: .84rem; font-weight: 600; color: var(--soft); vertical-align: bottom; }
td.number, th.number { text-align: right; } td.number { white-space: nowrap; }
tr.main td.number, tr.main td:first-child { font-weight: 600; }
tr.group td { padding-top: .9rem; font-size: .84rem; color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: .8rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.note { background: var(--warn); border-left: 4px solid var(--warn-line); padding: .5rem .9rem; margin: .8rem 0;
  border-radius: 0 6px 6px 0; } .note p, .note ul { margin: .15rem 0; }
.side { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
figure { margin: .8rem 0; }
.side figure { max-width: 28rem; } figure img { max-width: 100%; height: auto; border-radius: 4px; background: #fff; }
.pictures { display: grid; gap: .5rem; margin: .9rem 0; } .pictures img { width: 100%; } .pictures figure { margin: 0; }
.swatch { display: inline-block; width: .85em; height: .85em; border-radius: 2px; margin-right: .35em;
  vertical-align: -.08em; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.legend span.item { margin-right: 1rem; white-space: nowrap; }
figcaption { color: var(--soft); font-size: .86rem; max-width: 50rem; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--soft); }
svg { max-width: 100%; height: auto; display: block; } td svg { margin-top: .22rem; max-width: none; }
svg text { fill: var(--ink); font-size: 12px; } svg text.soft { fill: var(--soft); }
td.heat { text-align: right; padding: .3rem .5rem; border: 2px solid var(--page); white-space: nowrap;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
footer { margin-top: 3rem; padding-top: .8rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: .86rem; }
@media print { :root { --ink: #000; --soft: #444; --line: #bbb; --page: #fff; --panel: #f5f5f5; --accent: #1d4f91;
  --good: #1a7f37; --bad: #b42318; --warn: #fff; --c0: #2864b4; --c1: #d1495b; --c2: #228833; --c3: #b8860b;
  --c4: #8e44ad; --c5: #128c9c; } body, body.wide { max-width: none; padding: 0; font-size: 10.5pt; }
  h2, h3 { break-after: avoid; } figure, tr, svg, .note { break-inside: avoid; } div.wide { overflow: visible; } }
"""


class Html(str):
    """Markup that is ready for a page."""

    __slots__ = ()


def text(*content: object) -> Html:
    """The parts one after the other; those that are no markup yet are escaped."""
    return Html("".join(each if isinstance(each, Html) else html.escape(str(each), quote=False) for each in content))


def tag(name: str, *content: object, **attributes: str) -> Html:
    """An element. An attribute's trailing _ is dropped and other ones become -, for Python's sake."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items() if value
    )
    return Html(f"<{name}{said}>{text(*content)}</{name}>")


def page(title: str, *content: object, wide: bool = False) -> str:
    """A whole document. wide: for large tables."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"{tag('body', *content, class_='wide' if wide else '')}\n</html>\n"
    )


def bullets(items: Iterable[object]) -> Html:
    """A list; nothing where there are no items."""
    said = [tag("li", item) for item in items]
    return tag("ul", *said) if said else Html()


def facts(pairs: Iterable[tuple[str, object]]) -> Html:
    """Names with what they stand for; those that stand for nothing are left out."""
    return tag("dl", *(text(tag("dt", name), tag("dd", value)) for name, value in pairs if value not in ("", None)))


def note(*items: object) -> Html:
    """What a reader must not miss; nothing where there is nothing."""
    content = tag("p", *items) if len(items) == 1 else bullets(items)
    return tag("div", content, class_="note") if items else Html()


def folded(summary: str, *content: object) -> Html:
    """What most readers need not see."""
    return tag("details", tag("summary", summary), *content)


def row(cells: Iterable[object], numbers: Sequence[int] = (), class_: str = "") -> Html:
    """A line of a table. numbers: the columns that are set to the right. A cell that is a <td> already stays it."""
    return tag("tr", *(_cell("td", cell, at in numbers) for at, cell in enumerate(cells)), class_=class_)


def table(head: Iterable[object], rows: Iterable[Iterable[object] | Html], numbers: Sequence[int] = ()) -> Html:
    """rows: cells, or what `row` made of them."""
    said = [each if isinstance(each, Html) else row(each, numbers) for each in rows]
    top = tag("tr", *(_cell("th", cell, at in numbers) for at, cell in enumerate(head)))
    return tag("div", tag("table", tag("thead", top), tag("tbody", *said)), class_="wide")


def _cell(kind: str, content: object, number: bool) -> Html:
    if isinstance(content, Html) and content.startswith("<td"):
        return content
    return tag(kind, content, class_="number" if number else "")


def image(path: Path, alt: str = "", photo: bool = False) -> Html:
    """An image file inside the page, made smaller where it is larger than a page shows. photo: may lose a little."""
    kind, content = _fitted(path, photo)
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Html(f'<img src="{source}" alt="{html.escape(alt or path.stem)}">')


def figure(content: Html, caption: object = "") -> Html:
    """Something to look at, and what it is."""
    return tag("figure", content, tag("figcaption", caption) if caption else "")


def _fitted(path: Path, photo: bool) -> tuple[str, bytes]:
    """The format and the bytes of an image file as they are embedded."""
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        kind = (image.format or "").lower()
        fits = image.width <= WIDEST and len(content) <= HEAVIEST
        if fits and (kind == "jpeg" or (kind == "png" and not photo)):
            return kind, content
        shown = image.convert("RGB")
    shown.thumbnail((WIDEST, 4 * WIDEST))
    out = io.BytesIO()
    shown.save(out, "JPEG", quality=88)
    return "jpeg", out.getvalue()
