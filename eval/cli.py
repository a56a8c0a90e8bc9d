"""The `dinoreg-eval` command: a thin front. Each suite is a subcommand; `all` runs those that data are given for."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING

from dinoreg.cli import run_command
from dinoreg.threads import set_patience
from eval.suites import EXPERIMENTS, SCORES, SUITES, Suite

if TYPE_CHECKING:
    from eval.running import Job

OVERVIEW = """\
usage: dinoreg-eval SUITE --weights FILE_OR_RUN_DIR --data FOLDER [--preset quick] [key=value ...]

A backbone of dinoreg, DINOv2, timm, Hugging Face, ...: what it is, is found by looking.

How good is it?
{scores}
  all                  all of these that data are given for, in one go
  compare              lay checkpoints side by side, with published figures

What is seen inside?
{experiments}
  inside               all of these on one page, one network or several side by side

  report               write the pages of a folder of results again

  dinoreg-eval SUITE --help explains each, with examples.
"""


PARTS = ("train=", "test=", "val=", "images=")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one suite, or all, and exit with 0, or 2 for a mistake, told in one line."""
    set_patience()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    commands: dict[str, Callable[[Sequence[str]], int]] = {name: partial(one, suite) for name, suite in SUITES.items()}
    commands |= {"all": every, "inside": inside, "report": report, "compare": compare}
    overview = OVERVIEW.format(scores=_titles(SCORES), experiments=_titles(EXPERIMENTS))
    words = list(sys.argv[1:] if arguments is None else arguments)
    plain = {name: partial(_in_one_line, command) for name, command in commands.items()}
    run_command("dinoreg-eval", plain, overview, words)


def one(suite: Suite, words: Sequence[str]) -> int:
    """`dinoreg-eval SUITE`."""
    parser = _parser(
        suite.name,
        f"{suite.title[0].upper()}{suite.title[1:]}. Writes results.json, with everything that was chosen.",
        f"""\
        examples:
          {_examples(suite)}

        Every option with its default and its meaning: {suite.config} in {suite.module.replace(".", "/")}.py.""",
    )
    if suite.data:
        where = "where the images are; or train=DIR, test=DIR"
        parser.add_argument("--data", action="append", required=True, metavar="FOLDER", help=where)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of the protocol")
    asked = parser.parse_intermixed_args(words)

    from eval.running import Job, run_jobs

    # `--data train=DIR test=DIR` is how most would write it. images=200 is a number of images.
    parts = [word for word in asked.overrides if word.startswith(PARTS) and not word.partition("=")[2].isdigit()]
    rest = [word for word in asked.overrides if word not in parts]
    return run_jobs(asked, [Job(suite, vars(asked).get("data", []) + parts, rest)])


def _examples(suite: Suite) -> str:
    command = f"dinoreg-eval {suite.name} --weights"
    lines = [f"{command} runs/mine", f"{command} dinov2_vits14_reg4_pretrain.pth --output results/{suite.name}"]
    if suite.data:
        lines = [
            f"{command} runs/mine --data /data/{suite.data}",
            f"{command} dinov2_vits14_reg4_pretrain.pth --data DIR --output results/{suite.name}",
            f"{command} FILE --data train=DIR test=DIR --preset quick",
            f"torchrun --nproc-per-node 8 -m eval {suite.name} --weights FILE --data DIR",
        ]
    return f"\n{10 * ' '}".join(lines)


def every(words: Sequence[str]) -> int:
    """`dinoreg-eval all`."""
    return _several(
        "all",
        SCORES,
        "Every suite that data are given for, in one process: the weights are opened once, features computed once.",
        """\
        examples:
          dinoreg-eval all --weights runs/mine --data-imagenet /data/imagenet1k --preset quick
          dinoreg-eval all --weights FILE --data-imagenet DIR knn.k=[10,20] knn.main_k=10""",
        words,
    )


def inside(words: Sequence[str]) -> int:
    """`dinoreg-eval inside`."""
    return _several(
        "inside",
        EXPERIMENTS,
        "Every experiment that data are given for, and one page that tells what is seen: artifacts, attention, "
        "objects, what the class token is made of.",
        """\
        examples:
          dinoreg-eval inside --weights runs/plain --compare runs/registers --data-images /data/imagenet1k
          dinoreg-eval inside --weights FILE --data-images DIR --data-boxes /data/VOC2007 --preset quick
          dinoreg-eval inside --weights FILE --data-images DIR artifacts.cutoff=150

        Images with classes, as for the other suites, allow all experiments; any folder of images allows most.""",
        words,
    )


def _several(name: str, suites: dict[str, Suite], description: str, epilog: str, words: Sequence[str]) -> int:
    """Suites together, each on the kind of data it wants."""
    parser = _parser(name, description, epilog)
    kinds = [kind for kind in dict.fromkeys(suite.data for suite in suites.values()) if kind]
    for kind in kinds:
        names = ", ".join(suite.name for suite in suites.values() if suite.data == kind)
        parser.add_argument(f"--data-{kind}", action="append", default=[], metavar="FOLDER", help=f"for {names}")
    parser.add_argument("overrides", nargs="*", metavar="SUITE.key=value", help="options of a suite's protocol")
    asked = parser.parse_intermixed_args(words)

    from eval.running import run_jobs

    return run_jobs(asked, _jobs(asked, suites, kinds))


def _titles(suites: dict[str, Suite]) -> str:
    return "\n".join(f"  {suite.name:<20} {suite.title}" for suite in suites.values())


def report(words: Sequence[str]) -> int:
    """`dinoreg-eval report`."""
    from eval.report.page import main as write

    return write(words)


def compare(words: Sequence[str]) -> int:
    """`dinoreg-eval compare`."""
    from eval.compare import main as lay_out

    return lay_out(words)


def _jobs(asked: Namespace, suites: dict[str, Suite], kinds: Sequence[str]) -> list[Job]:
    """A job for every suite that data are given for, with the overrides that begin with its name."""
    from dinoreg.config import ConfigError
    from eval.running import Job

    data: dict[str, list[str]] = {kind: getattr(asked, f"data_{kind}") for kind in kinds}
    if not any(data.values()):
        raise ConfigError(f"no data: give some of {', '.join(f'--data-{kind}' for kind in kinds)}")
    chosen = [suite for suite in suites.values() if not suite.data or data[suite.data]]
    own: dict[str, list[str]] = {suite.name: [] for suite in chosen}
    for word in asked.overrides:
        name, _, rest = word.partition(".")
        if name not in own:
            raise ConfigError(f"'{word}' begins with the name of no suite that runs: {', '.join(own)}")
        own[name].append(rest)
    return [Job(suite, data.get(suite.data, []), own[suite.name]) for suite in chosen]


def _in_one_line(command: Callable[[Sequence[str]], int], words: Sequence[str]) -> int:
    """What is wrong with weights or data is told like a mistake in an option."""
    from dinoreg.config import ConfigError
    from dinoreg.data.images import DataError
    from dinoreg.models.formats import WeightsError

    try:
        return command(words)
    except (WeightsError, DataError) as error:
        raise ConfigError(str(error)) from error


def _parser(command: str, description: str, epilog: str) -> ArgumentParser:
    parser = ArgumentParser(
        f"dinoreg-eval {command}",
        description=description,
        epilog=dedent(epilog),
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--weights", required=True, metavar="FILE", help="a backbone's file or folder, or a run directory: its newest"
    )
    parser.add_argument(
        "--compare", action="append", default=[], metavar="FILE", help="other weights, measured and shown beside them"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="for results.json (default: in the run, or results/)"
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="for features (default: ~/.cache/dinoreg/features)")
    parser.add_argument("--preset", choices=("published", "quick"), default="published", help="default: %(default)s")
    return parser
