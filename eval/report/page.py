"""The page of one checkpoint: all that was found out about it, in one file."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from dinoreg.config import ConfigError
from dinoreg.pages import Html, bullets, facts, folded, note, page, row, table, tag, text
from eval.inside.page import PAGE as INSIDE
from eval.inside.page import gather, write_inside
from eval.report import parts
from eval.report.pictures import pictures
from eval.report.read import Evaluation, by_checkpoint, find_evaluations, find_scores, name_of
from eval.report.wording import about, differences, notes, protocol, standard_of
from eval.results import write_atomically
from eval.suites import EXPERIMENTS

PAGE = "report.html"
BAD_SHOWN = 20
INTERVALS = (
    "The interval beside a figure is where it would lie in 95 of 100 cases if other test images of the same kind were "
    "drawn (Wilson's interval for accuracies, else a bootstrap over images). It says nothing of other training runs."
)


def main(words: Sequence[str]) -> int:
    """`dinoreg-eval report`."""
    parser = ArgumentParser(
        "dinoreg-eval report",
        description=f"Writes {PAGE} and {INSIDE} anew from results.json files; nothing is measured.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of one suite or several; or a run")
    parser.add_argument(
        "--compare", action="append", default=[], type=Path, metavar="FOLDER", help=f"shown beside it in {INSIDE}"
    )
    asked = parser.parse_args(words)
    groups = [_experiments(folder, needed=bool(asked.compare)) for folder in (asked.folder, *asked.compare)]
    if any(each.suite not in EXPERIMENTS for each in find_evaluations(asked.folder)):
        print(write_report(asked.folder))
    if groups[0]:
        print(write_inside(groups, place_of(asked.folder)))
    return 0


def _experiments(folder: Path, needed: bool) -> list[Evaluation]:
    """Those on the folder's newest checkpoint; says where there are others. Raises ConfigError."""
    group = gather(folder)
    if needed and not group:
        raise ConfigError(f"{folder} holds no experiments to lay side by side", "--compare")
    networks = {each.digest for each in find_evaluations(folder) if each.suite in EXPERIMENTS}
    if len(networks) > 1:
        print(f"{folder} holds experiments on {len(networks)} networks; {INSIDE} shows {name_of(group)}, the newest: "
              "name the folder of another one, also as --compare")  # fmt: skip
    return group


def write_report(folder: Path) -> Path:
    """Write the page of a folder's newest checkpoint beside the results. Raises ConfigError where there are none."""
    found = by_checkpoint(find_scores(folder))
    group, *others = found.values()
    content = checkpoint_page(group, others).encode()
    return write_atomically(place_of(folder) / PAGE, lambda file: file.write(content))


def place_of(folder: Path) -> Path:
    """Where the page of the results in a file, a folder or a run lies."""
    place = folder.parent if folder.is_file() else folder
    return place / "eval" if (place / "config.yaml").is_file() and (place / "eval").is_dir() else place


def checkpoint_page(group: Sequence[Evaluation], others: Sequence[Sequence[Evaluation]] = ()) -> str:
    """The document. group: the results of one checkpoint; others: of other ones beside it, which are only named."""
    name = name_of(group)
    one = f"How good is {name}?"
    return page(
        f"{name}: evaluation",
        tag("h1", one),
        tag("p", _what(group[0]), class_="soft"),
        _others(others),
        _careful(group),
        tag("h2", "In short"),
        _summary(group),
        tag("p", INTERVALS, class_="small soft"),
        *(_section(each, number) for number, each in enumerate(group)),
        tag("h2", "The backbone"),
        _backbone(group[0]),
        _footer(group),
    )


def _what(evaluation: Evaluation) -> str:
    return str(evaluation.content["found"])


def _others(others: Sequence[Sequence[Evaluation]]) -> Html:
    if not others:
        return Html()
    names = [name_of(group) for group in others]
    some = "; ".join(names[:6]) + (f"; and {len(names) - 6} more" if len(names) > 6 else "")
    return note(text(
        f"This page is about the newest checkpoint. There are results of {len(names)} more: {some}. ",
        tag("code", "dinoreg-eval compare"), " lays them side by side.",
    ))  # fmt: skip


def _careful(group: Sequence[Evaluation]) -> Html:
    """What a reader of the figures must know before reading them."""
    said: list[str] = []
    quick = [each.suite for each in group if each.protocol.get("preset", "published") != "published"]
    if quick:
        said.append(
            f"Measured with a shorter protocol than the published one ({', '.join(quick)}): good for comparing "
            "checkpoints with each other, not with papers."
        )
    if foreign := sorted({f"“{each.data['name']}”" for each in group if standard_of(each) is None}):
        said.append(f"The data, {', '.join(foreign)}, are not what papers report on.")
    for each in group:
        if each.bad:
            said.append(f"{each.suite}: {len(each.bad):,} images could not be read and were left out.")
    return note(*said)


def _summary(group: Sequence[Evaluation]) -> Html:
    rows = []
    for number, each in enumerate(group):
        for name, score in each.headlines.items():
            value, between = score.texts()
            link = tag("a", each.suite, href=f"#suite-{number}")
            on = f"{each.images:,} of {each.data['name']}"
            cells = (link, name, tag("strong", value), between, on, parts.interval(score))
            rows.append(row(cells, numbers=(2, 3)))
    axis = parts.axis_of(score for each in group for score in each.headlines.values())
    return table(("suite", "score", "value", "95 % interval", "test images", axis), rows, numbers=(2, 3))


def _section(evaluation: Evaluation, number: int) -> Html:
    """All about one suite."""
    title = f"{evaluation.suite}: {evaluation.title}" if evaluation.title != evaluation.suite else evaluation.suite
    differs = differences(evaluation)
    return text(
        tag("h2", title, id=f"suite-{number}"),
        tag("p", about(evaluation.suite)),
        parts.scores_table(evaluation),
        tag("h3", "How it was measured"),
        bullets([*protocol(evaluation), *notes(evaluation)]),
        text(tag("h3", "What differs from the published protocol"), bullets(differs))
        if differs
        else tag("p", "Nothing differs from the published protocol."),
        parts.tried(evaluation),
        parts.classes(evaluation),
        pictures(evaluation),
        _data(evaluation),
        folded("every option of the protocol", tag("pre", json.dumps(evaluation.protocol, indent=2))),
    )


def _data(evaluation: Evaluation) -> Html:
    data = evaluation.data
    numbers = f"{data.get('train', 0):,} to train on, {data.get('test', 0):,} to test on"
    if data.get("classes"):
        numbers += f", {data['classes']:,} classes"
        numbers += f"; guessing finds {100 / data['classes']:.2g} %" if "test_of_class" in data else ""
    return text(
        tag("h3", "The data"),
        facts(
            [
                ("images", f"{data['name']}: {numbers}"),
                ("from", tag("code", data.get("path", ""))),
                ("hash", tag("code", data.get("hash", ""))),
                ("took", _time(evaluation.seconds)),
            ]
        ),
        _bad(evaluation),
    )


def _bad(evaluation: Evaluation) -> Html:
    if not evaluation.bad:
        return Html()
    items = [text(tag("code", name), f": {reason}") for name, reason in list(evaluation.bad.items())[:BAD_SHOWN]]
    more = len(evaluation.bad) - len(items)
    return folded(
        f"{len(evaluation.bad)} images that could not be read",
        bullets([*items, f"and {more} more, in results.json"] if more else items),
    )


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def _backbone(evaluation: Evaluation) -> Html:
    registers = evaluation.registers
    return facts(
        [
            ("weights", tag("code", evaluation.content.get("weights", ""))),
            ("what it is", _what(evaluation)),
            ("registers", _registers(registers)),
            ("step", "" if evaluation.step is None else f"{evaluation.step:,} of the training that wrote it"),
            ("hash", tag("code", evaluation.digest)),
        ]
    )


def _registers(count: int | None) -> str:
    if count is None:
        return ""
    if not count:
        return "none"
    return (
        f"{count}: learnt tokens beside the patches, where the network can keep what belongs to no place in the image"
    )


def _footer(group: Sequence[Evaluation]) -> Html:
    content = max(group, key=lambda each: each.finished).content
    versions = ", ".join(f"{name} {version}" for name, version in content.get("versions", {}).items())
    made = (
        f"Measured {content.get('finished', '')} by dinoreg, commit {content.get('commit') or 'unknown'}, {versions}."
    )
    again = "dinoreg-eval report FOLDER"
    return tag("footer", made, " ", tag("code", again), " writes this page again from results.json.")
