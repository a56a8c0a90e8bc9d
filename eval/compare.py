"""`dinoreg-eval compare`: checkpoints side by side, as in the registers paper's Table 2."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from textwrap import dedent

from rich.console import Console
from rich.table import Table

from dinoreg.config import ConfigError
from eval.report.comparison import comparison_page, headings, shown, signed, unpublished
from eval.report.grid import Checkpoint, Column, Grid
from eval.report.read import Evaluation, find_evaluations
from eval.results import write_atomically

MARKS = {"better": "▲", "worse": "▼", "within": "≈"}
COLOURS = {"better": "green", "worse": "red", "within": "dim"}


def main(words: Sequence[str]) -> int:
    """Print the table; with --output write the page."""
    asked = _parser().parse_args(words)
    if asked.output and asked.output.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{asked.output} is no name of a page: end it with .html", "--output")
    grid = Grid.of(gather(asked.places))
    show(grid)
    if asked.output:
        content = comparison_page(grid).encode()
        print(write_atomically(asked.output, lambda file: file.write(content)))
    return 0


def gather(places: Sequence[Path]) -> list[Evaluation]:
    """All results in the places, each once, in the order of the places. Raises ConfigError."""
    found = {each.path.resolve(): each for place in places for each in find_evaluations(place)}
    return list(found.values())


def show(grid: Grid) -> None:
    """The table for a terminal, and what must be said of it."""
    console = Console()
    table = Table(title="95 % intervals; differences from the first row", title_justify="left", show_lines=True)
    table.add_column("model")
    table.add_column("registers", justify="right")
    for heading in headings(grid):
        table.add_column("\n".join(heading), justify="right")
    for row in grid.rows:
        table.add_row(row.name, shown(row.registers), *(_cell(grid, row, column) for column in grid.columns))
    for known in grid.published():
        values = [
            str(known.scores[column.published]) if known in column.rows else "" for column in grid.columns
        ]  # fmt: skip
        table.add_row(f"{known.model}\n[dim]{known.source.short}[/dim]", shown(known.registers), *values)
    console.print(table)
    lines = [f"{MARKS['better']} better, {MARKS['worse']} worse than the first row; {MARKS['within']} may be chance"]
    lines += [*grid.remarks(), *unpublished(grid)]
    if len(grid.all) > len(grid.rows):
        lines.append(f"{len(grid.all) - len(grid.rows)} more steps of these runs are plotted with --output FILE.html")
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _cell(grid: Grid, row: Checkpoint, column: Column) -> str:
    score = grid.score(row, column)
    if score is None:
        return "–"
    value, between = score.texts()
    best = value if score.value != grid.best(column) else f"[bold]{value}[/bold]"
    found = grid.against_first(row, column)
    if found is None:
        return f"{best}\n{between}"
    colour = COLOURS[found.verdict]
    return f"{best}\n{between}\n[{colour}]{signed(found.value, score)} {MARKS[found.verdict]}[/{colour}]"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "dinoreg-eval compare",
        description="Checkpoints side by side, with published figures where data and protocol are theirs.",
        epilog=dedent("""\
            examples:
              dinoreg-eval compare runs/plain runs/registers
              dinoreg-eval compare results/dinov2_vits14 results/dinov2_vits14_reg4 --output table.html

            The first one is what the others are compared with. Where both were measured on the same images, the
            interval of the difference is by a bootstrap over pairs of outcomes."""),
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "places", nargs="+", type=Path, metavar="PLACE", help="results.json, a folder of some, or a run"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="a page with the table, plots and sources")
    return parser
