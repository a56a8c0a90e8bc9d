"""The page of the experiments: what is seen inside one network, or several side by side."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from dinoreg.config import ConfigError
from dinoreg.pages import Html, bullets, facts, figure, folded, image, note, page, table, tag, text
from eval.inside.finding import Album, Finding, Picture, Seen
from eval.report.read import Evaluation, find_evaluations, name_of
from eval.results import write_atomically
from eval.suites import EXPERIMENTS, Suite

PAGE = "inside.html"
PAPER = "“Vision Transformers Need Registers” (Darcet et al., ICLR 2024)"
DECOUPLING = (
    "“Register and CLS tokens yield a decoupling of local and global features in large ViTs” (Lappe and Giese, 2025)"
)
# Beginning of a finding's number, heading, and what the part is about.
GROUPS = [
    ("1", "Artifacts and registers", f"The experiments of {PAPER}."),
    ("2", "Finding objects", "LOST (Siméoni et al., BMVC 2021): an object is found by how its patches agree, without "
     "training and without labels. Artifacts break it, which is why the registers paper measures it."),
    ("L", "What the class token is made of", f"The experiments of {DECOUPLING}."),
    ("D", "Taken further", "Analyses that follow from the two papers and are in neither."),
    ("5", "Registers added afterwards", "Test-time registers (Jiang et al., NeurIPS 2025)."),
]  # fmt: skip
WORDS = [
    ("patch", "A square of pixels. The network turns an image into a grid of them."),
    ("token", "The list of numbers that stands for one patch, and changes from layer to layer."),
    ("CLS", "The class token: one more, which belongs to no place and is read as the description of the whole image."),
    ("register", "A learnt token without a place, whose output nobody reads: room for notes that the network would "
     "otherwise write over patches."),
    ("norm", "The length of a token. Patches that are used as scratch paper stand out by theirs."),
    ("outlier", "A patch token whose norm is beyond the cutoff, which is said wherever it is used."),
    ("attention", "How much each token takes from each other one. The weights of one token sum to 1."),
    ("head", "Attention is computed several times side by side; each time is a head."),
    ("residual stream", "What is handed from layer to layer; each layer adds to it."),
]  # fmt: skip


def gather(folder: Path, digest: str | None = None) -> list[Evaluation]:
    """The newest result of each experiment in a folder, on the checkpoint of that hash, or on the newest one."""
    found = [each for each in find_evaluations(folder) if each.suite in EXPERIMENTS]
    if not found:
        return []
    wanted = digest or max(found, key=lambda each: (each.step or -1, each.finished)).digest
    newest = {each.suite: each for each in sorted(found, key=lambda each: each.finished) if each.digest == wanted}
    return [newest[name] for name in EXPERIMENTS if name in newest]


def write_inside(groups: Sequence[Sequence[Evaluation]], folder: Path) -> Path:
    """Draw the figures and write the page into a folder. groups: the experiments on each checkpoint, none empty."""
    album = Album(folder)
    names = short_names(groups)
    found: list[Finding] = []
    for name, suite in EXPERIMENTS.items():
        seen = [
            Seen(short, each)
            for short, group in zip(names, groups, strict=True)
            for each in group
            if each.suite == name
        ]
        if seen:
            found += _told(suite, seen, album)
    content = inside_page(groups, names, sorted(found, key=_place), folder).encode()
    return write_atomically(folder / PAGE, lambda file: file.write(content))


def _told(suite: Suite, seen: Sequence[Seen], album: Album) -> list[Finding]:
    """Raises ConfigError where results lack what the figures are drawn from."""
    try:
        return suite.teller()(seen, album)
    except KeyError as error:
        places = ", ".join(str(each.evaluation.path) for each in seen)
        raise ConfigError(
            f"{places}: written by another version, which did not measure {error}: run dinoreg-eval {suite.name} again"
        ) from error


def short_names(groups: Sequence[Sequence[Evaluation]]) -> list[str]:
    """What each checkpoint is called in legends: its registers alone where they differ in nothing else."""
    registers = [group[0].registers for group in groups]
    others = {tuple(_size(group).values()) for group in groups}
    if len(groups) > 1 and len(set(registers)) == len(groups) and len(others) == 1 and None not in registers:
        return [_registers(number) for number in registers]
    # In figures $ begins a formula, and what begins with _ is left out of legends.
    names = [name_of(group).replace("$", "").lstrip("_") or "network" for group in groups]
    return [f"{name} ({at})" if names.count(name) > 1 else name for at, name in enumerate(names, 1)]


def inside_page(
    groups: Sequence[Sequence[Evaluation]], names: Sequence[str], found: Sequence[Finding], folder: Path
) -> str:
    """The document. found: in the order of the page."""
    title = "What is seen inside " + " and ".join(name_of(group) for group in groups)
    parts = [
        (heading, about, [each for each in found if _group(each) == at])
        for at, (_, heading, about) in enumerate(GROUPS)
    ]
    return page(
        title,
        tag("h1", title),
        tag("p", "A vision transformer cuts an image into patches and works on one token for each. Large ones "
            "take over patches in which there is little to see, as scratch paper, and that spoils maps that are "
            "drawn from them; registers are tokens that are there to be written on instead. Whether that "
            "happens here is shown below.",
            class_="soft"),
        _careful(groups),
        _checkpoints(groups, names),
        folded("The words on this page", facts(WORDS)),
        tag("h2", "In short"),
        _contents(found, names),
        *(_part(heading, about, members, names, folder) for heading, about, members in parts if members),
        tag("h2", "How it was measured"),
        *(_protocol(each, name) for name, group in zip(names, groups, strict=True) for each in group),
        _footer(groups),
        wide=True,
    )  # fmt: skip


def _size(group: Sequence[Evaluation]) -> dict[str, object]:
    built = group[0].content.get("architecture", {})
    return {key: built.get(key) for key in ("depth", "embed_dim", "patch_size")}


def _registers(number: int | None) -> str:
    return "no registers" if not number else f"{number} register{'s' * (number > 1)}"


def _group(finding: Finding) -> int:
    for at, (beginning, _, _) in enumerate(GROUPS):
        if finding.number.startswith(beginning):
            return at
    raise ConfigError(f"the experiment {finding.number} belongs to no part of the page")


def _place(finding: Finding) -> tuple[int, tuple[int, ...], str]:
    """1.2 before 1.10."""
    numbers = tuple(int(part) for part in finding.number.lstrip("LD").split(".") if part.isdigit())
    return _group(finding), numbers, finding.number


def _careful(groups: Sequence[Sequence[Evaluation]]) -> Html:
    """What a reader must know first."""
    said = []
    shown = {(each.suite, each.data["hash"]) for group in groups for each in group}
    if len(shown) > len({suite for suite, _ in shown}):
        said.append("The networks were not shown the same images: differences between them may be those of the images.")
    presets = {each.protocol.get("preset", "published") for group in groups for each in group}
    if presets - {"published"}:
        said.append("Measured with the quick preset: fewer images, so that figures are rougher.")
    said += sorted(
        {
            f"{len(each.bad):,} images could not be read and were left out."
            for group in groups
            for each in group
            if each.bad
        }
    )
    return note(*said)


def _checkpoints(groups: Sequence[Sequence[Evaluation]], names: Sequence[str]) -> Html:
    rows = []
    for name, group in zip(names, groups, strict=True):
        size = "{depth} layers of width {embed_dim}, patches of {patch_size} pixels".format(**_size(group))
        rows.append([tag("strong", name), name_of(group), size, str(group[0].registers), group[0].content["found"]])
    return table(("called here", "checkpoint", "size", "registers", "what the file is"), rows)


def _contents(found: Sequence[Finding], names: Sequence[str]) -> Html:
    """What was seen, in a line each."""
    rows = []
    for each in found:
        link = tag("a", each.number, href=f"#{_anchor(each)}")
        rows.append([link, each.title, _by_network(each.seen, names), tag("span", each.basis, class_="soft small")])
    return table(("", "experiment", "what is seen", "stands on"), rows)


def _by_network(said: str, names: Sequence[str]) -> Html:
    """Sentences of which each begins with a network's name, a line for each network."""
    starts = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    parts = re.split(rf"(?:(?<=\. )|^)({starts}): ", said)
    lines = [text(tag("strong", name), ": ", what.strip()) for name, what in zip(parts[1::2], parts[2::2], strict=True)]
    return Html("<br>".join([*([text(parts[0])] if parts[0] else []), *lines]))


def _anchor(finding: Finding) -> str:
    return "finding-" + finding.number.replace(".", "-")


def _part(heading: str, about: str, members: Sequence[Finding], names: Sequence[str], folder: Path) -> Html:
    sections = (_section(each, names, folder) for each in members)
    return text(tag("h2", heading), tag("p", about, class_="soft"), *sections)


def _section(finding: Finding, names: Sequence[str], folder: Path) -> Html:
    return text(
        tag("h3", f"{finding.number}  {finding.title}", id=_anchor(finding)),
        tag("p", finding.question),
        *(_picture(each, folder) for each in finding.pictures),
        table(finding.head, finding.rows, numbers=range(1, len(finding.head))) if finding.rows else "",
        facts([
            ("seen here", _by_network(finding.seen, names)),
            ("the paper", finding.paper),
            ("stands on", finding.basis),
        ]),
        folded("how it was measured", bullets(finding.how)) if finding.how else "",
    )  # fmt: skip


def _picture(picture: Picture, folder: Path) -> Html:
    caption = text(picture.caption, " ", tag("a", "as vectors", href=picture.pdf))
    return figure(image(folder / picture.png, picture.caption), caption)


def _protocol(evaluation: Evaluation, name: str) -> Html:
    """Every option of an experiment, and what must be said of its data."""
    data = evaluation.data
    said = [
        f"{evaluation.images:,} images of {data['name']} (hash {data['hash']})"
        if data["test"]
        else "no image was looked at",
        *evaluation.notes,
        *(f"{key} = {'none' if value is None else value}" for key, value in evaluation.protocol.items()),
    ]
    return folded(f"{evaluation.suite}, {name}", bullets(said))


def _footer(groups: Sequence[Sequence[Evaluation]]) -> Html:
    content = max((each for group in groups for each in group), key=lambda each: each.finished).content
    made = f"Measured {content.get('finished', '')} by dinoreg, commit {content.get('commit') or 'unknown'}."
    places = " ".join(dict.fromkeys(os.fspath(group[0].path.parent) for group in groups))
    return tag("footer", made, " The numbers lie in results.json and arrays.npz in ", tag("code", places), ".")
