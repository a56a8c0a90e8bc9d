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
from eval.report.read import Evaluation, find_scores
from eval.results import write_atomically

MARKS = {"better": "▲", "worse": "▼", "within": "≈"}
FIRST, EACH = 26, 18  # characters of a line that the first two columns take, and each of the others
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


def gather(places: Sequence[Path]) -> list[list[Evaluation]]:
    """The results of each place; those that lie in several are the first one's. Raises ConfigError."""
    seen: set[Path] = set()
    found = []
    for place in places:
        new = [each for each in find_scores(place) if each.path.resolve() not in seen]
        seen.update(each.path.resolve() for each in new)
        found.append(new)
    return found


def show(grid: Grid) -> None:
    """Tables for a terminal, as many columns in each as are to be read, and what must be said of them."""
    console = Console()
    at_once = max(2, (console.width - FIRST) // EACH)
    for start in range(0, len(grid.columns), at_once):
        console.print(_table(grid, grid.columns[start : start + at_once], headings(grid)[start : start + at_once]))
    lines = [
        f"95 % intervals; differences from {grid.rows[0].name}: {MARKS['better']} better, {MARKS['worse']} worse, "
        f"{MARKS['within']} may be chance"
    ]
    lines += [*grid.remarks(), *unpublished(grid)]
    if len(grid.all) > len(grid.rows):
        lines.append(f"{len(grid.all) - len(grid.rows)} more steps of these runs are plotted with --output FILE.html")
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _table(grid: Grid, columns: Sequence[Column], heads: Sequence[Sequence[str]]) -> Table:
    table = Table(show_lines=True)
    table.add_column("model", overflow="fold")
    table.add_column("reg.", justify="right")
    for heading in heads:
        table.add_column("\n".join(heading), justify="right", overflow="fold", max_width=EACH - 3)
    for row in grid.rows:
        table.add_row(row.name, shown(row.registers), *(_cell(grid, row, column) for column in columns))
    for known in grid.published():
        if any(known in column.rows for column in columns):
            values = [str(known.scores[column.published]) if known in column.rows else "" for column in columns]
            table.add_row(f"{known.model}\n[dim]{known.source.short}[/dim]", shown(known.registers), *values)
    return table


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
