"""The `dinoreg-launch` command: a thin front, one function a subcommand."""

from __future__ import annotations

import os
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
  sweep     submit a grid of runs as one array; with --table: what came of it, and a plot
  eval      evaluate checkpoints of a run, or of a sweep, as an array; with --follow as they appear
  publish   bring what dinoreg-eval left in a run into its curve at wandb
  status    how runs are: step, images/s, ETA, checkpoint, score, requeues, and why one failed
  logs      what a run prints
  cancel    end a run's job
  resume    submit a run again, as it was

  dinoreg-launch COMMAND --help explains each, with examples.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one subcommand and exit with its status: 0, or 2 for a mistake, told in one line."""
    try:
        try:
            run_command("dinoreg-launch", COMMANDS, OVERVIEW, list(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        sys.exit(1)


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
    from launch.say import say_submitted
    from launch.submit import script, submit

    config = load_launched(asked.config, asked.overrides)
    if asked.dry_run:
        print(script(config.launch, Path(config.run_dir)))
        return 0
    run_dir = Path(config.run_dir)
    say_submitted({run_dir: submit(config, asked.cluster)}, run_dir)
    return 0


def sweep(words: Sequence[str]) -> int:
    """`dinoreg-launch sweep`."""
    parser = _parser(
        "sweep",
        "Submit a grid of runs as one array: an option with several values, separated by commas, is an axis of it. "
        "Each run has a directory of its own in run_dir. The same command again submits what is neither finished nor "
        "in the queue; with more values, the new ones.",
        """\
        examples:
          dinoreg-launch sweep vits14_in1k model.num_registers=0,1,2,4,8,16 run_dir=runs/registers launch.array=4
          dinoreg-launch sweep RECIPE optim.lr=1e-3,2e-3 seed=0,1,2 run_dir=runs/lr --dry-run    its runs, and no job
          dinoreg-launch sweep RECIPE 'optim.betas=[0.9,0.95],[0.9,0.999]'   a list is an axis when there are several
          dinoreg-launch sweep --table runs/registers                        at any time: table.csv, table.md, plot.png

        launch.array=N keeps it to N jobs at once; with --cluster local it is one unless that is said.""",
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="a recipe's name, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options, with several values for an axis")
    _add_cluster(parser, ("slurm", "local"))
    parser.add_argument("--dry-run", action="store_true", help="print the runs and the sbatch script, and exit")
    parser.add_argument("--most", type=int, default=100, help="more runs are a mistake (default: %(default)s)")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="show what came of a sweep, and draw it")
    asked = parser.parse_intermixed_args(words)
    if asked.table is not None:
        from launch.table import write_table

        print(write_table(asked.table))
        return 0

    from dinoreg.config import ConfigError
    from launch import say
    from launch.sweep import plan, submit

    if asked.config is None:
        raise ConfigError("give a CONFIG, or --table FOLDER")
    grid = plan(asked.config, asked.overrides, asked.most)
    if asked.dry_run:
        say.dry_sweep(grid)
        return 0
    say.say_sweep(grid, *submit(grid, asked.cluster))
    return 0


def evaluate(words: Sequence[str]) -> int:
    """`dinoreg-launch eval`."""
    parser = _parser(
        "eval",
        "Evaluate the teachers of a run with a suite of dinoreg-eval, each in a job of its own. What is evaluated "
        "already, or in the queue, is left as it is. Results go to RUN/eval/SUITE, RUN/evaluations.jsonl, and to the "
        "run at wandb, at the steps of the teachers.",
        """\
        examples:
          dinoreg-launch eval knn --run runs/mine --data /data/imagenet1k              the newest teacher
          dinoreg-launch eval knn --run runs/mine --data /data/imagenet1k --follow         each as it appears
          dinoreg-launch eval knn --run runs/registers --data DIR --steps 50000,100000        runs of a sweep
          dinoreg-launch eval knn --run runs/mine --data DIR k=[10,20] main_k=10 --name knn-10     other options
          dinoreg-launch eval knn --run runs/mine --data DIR launch.time=1h launch.memory=60GB launch.array=4

        Jobs are given what the run was (partition, account, time, ...), but one node, and one task on one GPU;
        launch.key=value says otherwise. Other options: dinoreg-eval SUITE --help.""",
    )
    parser.add_argument("suite", metavar="SUITE", help="of dinoreg-eval")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of the suite, and launch.key=value")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="a run directory, or a sweep's")
    parser.add_argument("--data", action="append", default=[], metavar="DIR", help="images; as dinoreg-eval takes it")
    parser.add_argument("--cache", metavar="DIR", help="for features (default: ~/.cache/dinoreg/features)")
    parser.add_argument("--preset", choices=("published", "quick"), default="published", help="default: %(default)s")
    parser.add_argument("--name", metavar="NAME", help="of the folder and the metrics (default: the suite's)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="all teachers, not the newest alone")
    which.add_argument("--steps", metavar="N,N,...", help="the teachers of these steps")
    which.add_argument("--follow", action="store_true", help="all, and each new one, until the run has ended")
    parser.add_argument(
        "--every", type=float, default=30, metavar="SECONDS", help="with --follow (default: %(default)s)"
    )
    _add_cluster(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would be evaluated and the sbatch script")
    asked = parser.parse_intermixed_args(words)

    from launch import say
    from launch.evaluate import make_suite, plan
    from launch.follow import follow

    others = [word for word in asked.overrides if word.startswith("launch.")]
    own = [word for word in asked.overrides if word not in others]
    suite = make_suite(asked.suite, asked.name, asked.data, asked.preset, own, asked.cache)
    made = plan(asked.run, suite, others, asked.cluster)
    if asked.follow and not asked.dry_run:
        try:
            return 0 if follow(made, asked.every, lambda text: print(text, flush=True)) else 1
        except KeyboardInterrupt:
            print("no longer following; jobs in the queue stay there, and the same command goes on")
            return 130
    return say.evaluate(made, asked.all or asked.follow, asked.steps, asked.dry_run)


def publish(words: Sequence[str]) -> int:
    """`dinoreg-launch publish`."""
    parser = _parser(
        "publish",
        "Bring what dinoreg-eval found by itself into RUN/evaluations.jsonl, and into the run at wandb at the steps of "
        "the teachers. While a training has the run, that sends them with its next reading.",
        """\
        example:
          dinoreg-launch publish runs/mine""",
    )
    parser.add_argument("run_dirs", metavar="RUN", nargs="+", type=Path, help="run directories")
    asked = parser.parse_args(words)

    from dinoreg.config import ConfigError
    from launch.evaluating import publish as bring

    for run_dir in asked.run_dirs:
        if not (run_dir / "config.yaml").is_file():
            raise ConfigError(f"{run_dir} is no run: it has no config.yaml", key="RUN")
        print(f"{run_dir}: {bring(run_dir)} new evaluations")
    return 0


def resume(words: Sequence[str]) -> int:
    """`dinoreg-launch resume`."""
    parser = _parser(
        "resume",
        "Submit a run again: the same recipe, the same program, from its last checkpoint. Of a sweep: all of its runs "
        "that are neither finished nor in the queue.",
        """\
        examples:
          dinoreg-launch resume runs/mine
          dinoreg-launch resume runs/mine launch.time=24h launch.nodes=4
          dinoreg-launch resume runs/mine --new-code              with the program as it is now""",
    )
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="a run directory, or a sweep's")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that are to be others now")
    _add_cluster(parser)
    parser.add_argument("--new-code", action="store_true", help="take a new snapshot of the program")
    asked = parser.parse_intermixed_args(words)

    from launch.resume import resume as again
    from launch.say import say_submitted

    say_submitted(again(asked.run_dir, asked.overrides, asked.cluster, asked.new_code), asked.run_dir)
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
        "What the latest job of a run printed, over all its starts. Of a sweep: all of its runs, each line with its "
        "run.",
        """\
        examples:
          dinoreg-launch logs runs/mine -f
          dinoreg-launch logs runs/mine --rank 3""",
    )
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="a run directory, or a sweep's")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the job ends")
    parser.add_argument("--rank", type=int, default=0, help="of which task (default: %(default)s)")
    asked = parser.parse_args(words)

    from launch.logs import read_log, read_logs
    from launch.sweep import is_sweep, runs_of

    if is_sweep(asked.run_dir):
        pieces = read_logs(runs_of(asked.run_dir), asked.rank, asked.follow)
    else:
        pieces = read_log(asked.run_dir, asked.rank, asked.follow)
    for text in pieces:
        print(text, end="", flush=True)
    return 0


def cancel(words: Sequence[str]) -> int:
    """`dinoreg-launch cancel`."""
    parser = _parser(
        "cancel",
        "End the job of a run. It saves what it has done if that takes no longer than Slurm's KillWait (mostly 30 s).",
        """\
        example:
          dinoreg-launch cancel runs/mine
          dinoreg-launch cancel runs/mine/eval/knn                 all of these evaluations""",
    )
    parser.add_argument(
        "run_dirs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="run directories, or folders of them: a sweep, RUN/eval/knn",
    )

    from launch.jobs import active_jobs
    from launch.jobs import cancel as end
    from launch.record import NAME
    from launch.say import advice

    for folder in parser.parse_args(words).run_dirs:
        within = [path.parent for path in sorted(folder.glob(f"*/{NAME}"))]
        several = bool(within) and not (folder / NAME).is_file()
        runs = list(active_jobs(within)) if several else [folder]
        for run_dir in runs:
            print(f"job {end(run_dir).id}: cancelled; {advice(run_dir)}")
        if not runs:
            print(f"{folder}: none of its runs waits or runs")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "sweep": sweep,
    "eval": evaluate,
    "publish": publish,
    "status": status,
    "logs": logs,
    "cancel": cancel,
    "resume": resume,
}


def _add_cluster(parser: ArgumentParser, choices: Sequence[str] = ("slurm", "local", "debug")) -> None:
    parser.add_argument("--cluster", choices=choices, default="slurm", help="where to run (default: %(default)s)")


def _parser(command: str, description: str, epilog: str) -> ArgumentParser:
    return ArgumentParser(
        f"dinoreg-launch {command}",
        description=description,
        epilog=dedent(epilog),
        formatter_class=RawDescriptionHelpFormatter,
    )
