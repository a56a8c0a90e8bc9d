"""The `dinoreg-launch` command: a thin front, one function a subcommand."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import dedent

from dinoreg.cli import run_command

OVERVIEW = """\
usage: dinoreg-launch COMMAND ...

Give runs of dinoreg to Slurm, or to this machine, and look after them.

  train     submit a run; it goes on by itself after preemption, time limits and lost nodes
  status    how runs are: step, images/s, ETA, checkpoint, score, requeues, and why one failed
  logs      what a run prints
  cancel    end a run's job
  resume    submit a run again, as it was

  dinoreg-launch COMMAND --help explains each, with examples.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one subcommand and exit with its status: 0, or 2 for a mistake, told in one line."""
    run_command("dinoreg-launch", COMMANDS, OVERVIEW, list(sys.argv[1:] if arguments is None else arguments))


def train(words: Sequence[str]) -> int:
    """`dinoreg-launch train`."""
    parser = _parser(
        "train",
        "Submit a run. Its recipe and overrides are those of `dinoreg train`, and a section `launch:` says what to ask "
        "Slurm for.",
        """\
        examples:
          dinoreg-launch train own_images_8gpu data.sources=/data/mine run_dir=runs/mine \\
              launch.nodes=2 launch.gpus_a_node=8 launch.partition=gpu launch.time=12h
          dinoreg-launch train RECIPE --dry-run                  the sbatch script, and no job
          dinoreg-launch train RECIPE --cluster local            tasks of this machine, in the background
          dinoreg-launch train RECIPE --cluster debug            one process, here, for breakpoints

        Every option with its meaning: the dataclass in launch/config.py.""",
    )
    parser.add_argument("config", metavar="CONFIG", help="a recipe's name, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options, stronger than the recipe's")
    _add_cluster(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch script and exit")
    asked = parser.parse_intermixed_args(words)

    from launch.recipe import load_launched
    from launch.submit import script, submit

    config = load_launched(asked.config, asked.overrides)
    if asked.dry_run:
        print(script(config.launch, Path(config.run_dir)))
        return 0
    _say_submitted(submit(config, asked.cluster), config.run_dir)
    return 0


def resume(words: Sequence[str]) -> int:
    """`dinoreg-launch resume`."""
    parser = _parser(
        "resume",
        "Submit a run again: the same recipe, the same program, from its last checkpoint.",
        """\
        examples:
          dinoreg-launch resume runs/mine
          dinoreg-launch resume runs/mine launch.time=24h launch.nodes=4
          dinoreg-launch resume runs/mine --new-code              with the program as it is now""",
    )
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="a run directory")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that are to be others now")
    _add_cluster(parser)
    parser.add_argument("--new-code", action="store_true", help="take a new snapshot of the program")
    asked = parser.parse_intermixed_args(words)

    from launch.resume import resume as again

    _say_submitted(again(asked.run_dir, asked.overrides, asked.cluster, asked.new_code), asked.run_dir)
    return 0


def status(words: Sequence[str]) -> int:
    """`dinoreg-launch status`."""
    parser = _parser(
        "status",
        "A table of runs. The last checkpoint is under SAVED; below a run that waits or ended stands why.",
        """\
        examples:
          dinoreg-launch status                     all runs in runs/
          dinoreg-launch status runs/mine /scratch/me/sweep""",
    )
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="RUN_DIR", help="runs, or folders that hold some (default: runs)"
    )
    asked = parser.parse_args(words)

    from launch.status import find_runs, rows, table

    print(table(rows(find_runs(asked.folders or [Path("runs")]))))
    return 0


def logs(words: Sequence[str]) -> int:
    """`dinoreg-launch logs`."""
    parser = _parser(
        "logs",
        "What the latest job of a run printed, over all its starts.",
        """\
        examples:
          dinoreg-launch logs runs/mine -f
          dinoreg-launch logs runs/mine --rank 3""",
    )
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="a run directory")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the job ends")
    parser.add_argument("--rank", type=int, default=0, help="of which task (default: %(default)s)")
    asked = parser.parse_args(words)

    from launch.logs import read_log

    for text in read_log(asked.run_dir, asked.rank, asked.follow):
        print(text, end="", flush=True)
    return 0


def cancel(words: Sequence[str]) -> int:
    """`dinoreg-launch cancel`."""
    parser = _parser(
        "cancel",
        "End the job of a run. It saves what it has done if that takes no longer than Slurm's KillWait (mostly 30 s).",
        """\
        example:
          dinoreg-launch cancel runs/mine""",
    )
    parser.add_argument("run_dirs", metavar="RUN", nargs="+", type=Path, help="run directories")

    from launch.jobs import cancel as end

    for run_dir in parser.parse_args(words).run_dirs:
        print(f"job {end(run_dir).id}: cancelled; go on with: dinoreg-launch resume {run_dir}")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "status": status,
    "logs": logs,
    "cancel": cancel,
    "resume": resume,
}


def _say_submitted(job: str, run_dir: Path | str) -> None:
    here = Path.cwd()
    run_dir = Path(run_dir).relative_to(here) if Path(run_dir).is_relative_to(here) else run_dir
    print(f"job {job}: {run_dir}\nsee it: dinoreg-launch status {run_dir}, dinoreg-launch logs -f {run_dir}")


def _add_cluster(parser: ArgumentParser) -> None:
    choices = ("slurm", "local", "debug")
    parser.add_argument("--cluster", choices=choices, default="slurm", help="where to run (default: %(default)s)")


def _parser(command: str, description: str, epilog: str) -> ArgumentParser:
    return ArgumentParser(
        f"dinoreg-launch {command}",
        description=description,
        epilog=dedent(epilog),
        formatter_class=RawDescriptionHelpFormatter,
    )
