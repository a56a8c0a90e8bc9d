"""The page that lays checkpoints side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dinoreg.charts import Dot, Series, lines
from dinoreg.pages import Html, bullets, facts, figure, folded, note, page, row, table, tag, text
from eval.published import PUBLISHED, Published, Source
from eval.report.grid import Checkpoint, Column, Grid
from eval.report.paired import Difference
from eval.report.wording import about, about_score
from eval.results import Score

VERDICTS = {"better": ("good", "▲ better"), "worse": ("bad", "▼ worse"), "within": ("soft", "≈ may be chance")}
SHORT = {"imagenet-linear": "linear", "knn": "k-NN", "logreg": "logistic regression", "ade20k-linear": "segmentation",
         "ade20k-ms": "segmentation, +ms", "nyud-linear": "depth"}  # fmt: skip


def comparison_page(grid: Grid) -> str:
    """The document."""
    title = f"{len(grid.rows)} checkpoint{'s' * (len(grid.rows) > 1)} side by side"
    return page(
        title,
        tag("h1", title),
        tag("p", "How good are their frozen features? Every column is one score, on the same images and in the same "
            "protocol for all rows.", class_="soft"),
        note(*grid.remarks()),
        _table(grid),
        _reading(grid),
        _published_notes(grid),
        _steps(grid),
        _registers(grid),
        tag("h2", "What the columns are"),
        facts(_suites(grid)),
        tag("h2", "What the rows are"),
        *(_checkpoint(each) for each in grid.rows),
        _all_scores(grid),
        _orientation(grid),
        wide=True,
    )  # fmt: skip


def headings(grid: Grid) -> list[list[str]]:
    """Lines over each column: what, on what, which score, on how many images."""
    found = []
    for column in grid.columns:
        data, variants = column.sample.data, grid.variants(column)
        letter = f" ({'abcdefghijklmnop'[variants.index(column) % 16]})" * (len(variants) > 1)
        found.append([_short(column) + letter, str(data["name"]), column.score, f"{data.get('test', 0):,} images"])
    return found


def _short(column: Column) -> str:
    return SHORT.get(column.suite, column.suite)


def _suites(grid: Grid) -> list[tuple[str, str]]:
    """What each suite does, and its score."""
    found = {}
    for column in grid.columns:
        name, score = _short(column), about_score(column.score.partition("_lin")[0])
        found[name] = f"{about(column.suite)} Score: {score}."
    return list(found.items())


def shown(registers: int | None) -> str:
    """Their number."""
    return "?" if registers is None else str(registers)


def signed(value: float, score: Score) -> str:
    """A difference, with as many digits as the score has."""
    return f"{value:+.{1 if score.unit == '%' else 3}f}".replace("-", "−")


def _table(grid: Grid) -> Html:
    numbers = range(1, 2 + len(grid.columns))
    head = ["model", "registers", *(_lines(map(_breakable, heading)) for heading in headings(grid))]
    rows = [
        row([each.name, shown(each.registers), *(_cell(grid, each, column) for column in grid.columns)], numbers)
        for each in grid.rows
    ]
    for source, known in _by_source(grid).items():
        said = tag("td", f"published: {source.full}", colspan=str(2 + len(grid.columns)))
        rows.append(row([said], class_="group"))
        rows += [_known(grid, each, numbers) for each in known]
    return table(head, rows, numbers)


def _breakable(name: str) -> Html:
    """Long names of data sets would make columns wide."""
    return Html(text(name).replace("_", "_<wbr>"))


def _lines(parts: Iterable[object]) -> Html:
    return Html("<br>".join(text(part) for part in parts))


def _known(grid: Grid, known: Published, numbers: Sequence[int]) -> Html:
    values = [str(known.scores[column.published]) if known in column.rows else "–" for column in grid.columns]
    return row([known.model, known.registers, *values], numbers)


def _by_source(grid: Grid) -> dict[Source, list[Published]]:
    """The published rows that have a value in a column that may show it."""
    found: dict[Source, list[Published]] = {}
    for known in grid.published():
        found.setdefault(known.source, []).append(known)
    return found


def _cell(grid: Grid, checkpoint: Checkpoint, column: Column) -> Html:
    score = grid.score(checkpoint, column)
    if score is None:
        return text("–")
    value, between = score.texts()
    said = [tag("strong", value) if score.value == grid.best(column) else text(value)]
    said.append(tag("span", between, class_="soft small"))
    if found := grid.against_first(checkpoint, column):
        said.append(_difference(found, score))
    return _lines(said)


def _difference(found: Difference, score: Score) -> Html:
    class_, said = VERDICTS[found.verdict]
    between = f"{signed(found.low, score)} to {signed(found.high, score)}{'' if found.paired else ', unpaired'}"
    return text(
        tag("span", f"{signed(found.value, score)} {said}", class_=f"{class_} small"),
        Html("<br>"),
        tag("span", between, class_="soft small"),
    )


def _reading(grid: Grid) -> Html:
    said = [
        "Below each value stands the interval in which it lies with 95 %, were other test images drawn; bold is the "
        "best value of a column."
    ]
    if len(grid.rows) > 1:
        said.append(
            f"Then the difference from the first row, {grid.rows[0].name}, and that difference's own interval, by a "
            "bootstrap over pairs of outcomes on the same images (“unpaired” where they were not kept, which makes it "
            "wider). ≈ means that 0 lies within: other images might well turn the order around."
        )
        said.append("Neither says how much another training run of the same recipe would differ.")
    return text(*(tag("p", each, class_="small soft") for each in said))


def _published_notes(grid: Grid) -> Html:
    """Where published figures are not shown, and why; what is to be known of those that are."""
    said = unpublished(grid)
    said += [f"{source.short}: {source.remark}" for source in _by_source(grid) if source.remark]
    if any(column.rows and column.chosen_elsewhere for column in grid.columns):
        said.append("Published linear figures are of the setting that is best on the test images; ours was chosen on "
                    "held-out training images.")  # fmt: skip
    return tag("div", bullets(said), class_="small") if said else Html()


def unpublished(grid: Grid) -> list[str]:
    """Why columns are without published figures."""
    return [
        f"No published figures beside {heading[0]} ({column.score}): {' and '.join(column.obstacles)}."
        for heading, column in zip(headings(grid), grid.columns, strict=True)
        if column.obstacles
    ]


def _steps(grid: Grid) -> Html:
    """A plot for each column that has several steps of a run."""
    plots = []
    for heading, column in zip(headings(grid), grid.columns, strict=True):
        runs: dict[str, list[Dot]] = {}
        for each in grid.all:
            score = grid.score(each, column)
            if score and each.run is not None and each.step is not None:
                runs.setdefault(each.run.name, []).append(Dot(each.step, score.value, score.low, score.high))
        if any(len(dots) > 1 for dots in runs.values()):
            series = [Series(name, dots) for name, dots in runs.items()]
            plots.append(_plot(series, heading, grid, column, "step"))
    return text(tag("h2", "Score against step"), tag("div", *plots, class_="side")) if plots else Html()


def _registers(grid: Grid) -> Html:
    """A plot for each column in which networks of one shape differ in their number of registers."""
    plots = []
    for heading, column in zip(headings(grid), grid.columns, strict=True):
        shapes: dict[object, list[Dot]] = {}
        for each in grid.rows:
            score = grid.score(each, column)
            if score and each.registers is not None:
                shapes.setdefault(each.shape, []).append(Dot(each.registers, score.value, score.low, score.high))
        several = {shape: dots for shape, dots in shapes.items() if len({dot.x for dot in dots}) > 1}
        if several:
            series = [Series(_shape(shape), dots) for shape, dots in several.items()]
            plots.append(_plot(series, heading, grid, column, "registers", whole=True))
    said = "Networks of the same shape; how they were trained may differ, too."
    if not plots:
        return Html()
    return text(tag("h2", "Score against registers"), tag("p", said, class_="small soft"),
                tag("div", *plots, class_="side"))  # fmt: skip


def _shape(shape: object) -> str:
    about = dict(shape)  # type: ignore[call-overload]
    return f"{about.get('depth')} blocks of {about.get('embed_dim')}, patches of {about.get('patch_size')}"


def _plot(
    series: Sequence[Series], heading: Sequence[str], grid: Grid, column: Column, across: str, whole: bool = False
) -> Html:
    score = next(score for each in grid.all if (score := grid.score(each, column)))
    up = f"{column.score}, {score.unit}" if score.unit else column.score
    drawn = lines(series, across=across, up=up, width=410, height=260, whole=whole)
    return figure(drawn, ", ".join(heading) + ("; less is better" if score.better == "lower" else ""))


def _checkpoint(each: Checkpoint) -> Html:
    content = each.first.content
    said = {f"{one.suite}: {words}" for one in each.evaluations for words in one.notes}
    return text(
        tag("h3", each.name),
        facts(
            [
                ("weights", tag("code", content.get("weights", ""))),
                ("what it is", content["found"]),
                ("step", "" if each.step is None else f"{each.step:,}"),
                ("hash", tag("code", each.first.digest)),
                ("measured by", f"commit {content.get('commit') or 'unknown'}, {content.get('finished', '')}"),
            ]
        ),
        folded("notes on its figures", bullets(sorted(said))) if said else "",
    )


def _all_scores(grid: Grid) -> Html:
    """Also those that have no column, and every step."""
    rows = [
        (each.name, one.suite, name, *score.texts(), f"{one.images:,} of {one.data['name']}")
        for each in grid.all
        for one in each.evaluations
        for name, score in one.scores.items()
    ]
    head = ("model", "suite", "score", "value", "95 % interval", "test images")
    return folded("all scores of all steps", table(head, rows, numbers=(3, 4)))


def _orientation(grid: Grid) -> Html:
    """All published figures, apart, for those who want to know what others reach on the standard data."""
    keys = list(dict.fromkeys(key for known in PUBLISHED for key in known.scores))
    rows = [
        (known.model, known.registers, *(str(known.scores[key]) if key in known.scores else "" for key in keys),
         known.source.short)
        for known in PUBLISHED
    ]  # fmt: skip
    head = ["model", "registers", *(Html(text(key).replace("/", "<br>")) for key in keys), "source"]
    said = "On ImageNet-1k, ADE20k and NYU Depth v2; not to be compared with figures on other data."
    sources = bullets(f"{source.short}: {source.full}. {source.remark}" for source in
                      dict.fromkeys(known.source for known in PUBLISHED))  # fmt: skip
    numbers = range(1, 2 + len(keys))
    return folded("published figures, for orientation", tag("p", said), table(head, rows, numbers), sources)
