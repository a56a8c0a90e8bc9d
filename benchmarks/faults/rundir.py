"""The run directory: whose it is, and whether one may write there."""

from __future__ import annotations

import re
import signal
import socket
from pathlib import Path

from benchmarks.faults.compare import brief, contents, one_line, same
from benchmarks.faults.lab import STEADY, Lab, Outcome, Scenario, judge
from benchmarks.faults.props import draw_images, mounting, write_shards

# What a refusal leaves: the lock that it took to look, its words, and the list of the images that it looked at.
LEFT = ("lock", "logs/", "data_index/")


def read_only(lab: Lab) -> Outcome:
    """A run that was stopped, gone on with where nothing can be written."""
    run_dir = lab.crashed(9)
    before = contents(run_dir)
    try:
        # By permissions it would be writable for root.
        prefix = mounting(f"mount --bind {run_dir} {run_dir} && mount -o remount,bind,ro {run_dir}")
    except OSError:
        prefix = []
        _permit(run_dir, folders=0o555, files=0o444)
    run = lab.run(run_dir, prefix=prefix)
    _permit(run_dir, folders=0o755, files=0o644)
    words, unchanged = run.last_words(), contents(run_dir) == before
    return judge(
        f"exit code {run.codes()[0]}: {brief(words, RUN=run_dir)}",
        "nothing" if unchanged else "files changed",
        {"exit code 2": run.codes() == [2], "one line": one_line(run), "nothing changed": unchanged,
         "it names the place": str(run_dir) in words},
    )  # fmt: skip


def _permit(folder: Path, folders: int, files: int) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(folders if path.is_dir() else files)


def other_config(lab: Lab) -> Outcome:
    """Gone on with under other options; then under options that may change."""
    run_dir = lab.crashed(9)
    before = contents(run_dir, LEFT)
    run = lab.run(run_dir, "optim.lr=0.002", "model.depth=3", "data.workers=1")
    words, unchanged = run.last_words(), contents(run_dir, LEFT) == before
    free = lab.run(run_dir, "data.workers=1", "data.prefetch=3", "checkpoint.every=7", "train.max_skipped=4")
    phrase, equal = same(run_dir, lab.reference())
    return judge(
        f"exit code {run.codes()[0]}: {brief(words, 250, RUN=run_dir)}; with only data.workers and the "
        f"like changed: exit code {free.codes()[0]}, {phrase}",
        "nothing" if unchanged else "files changed",
        {"exit code 2": run.codes() == [2], "one line": one_line(run),
         "each key is named": all(re.search(key, words) for key in ("optim.lr.*0.002", "0.001", "model.depth.*3")),
         "free keys are not named": "data.workers" not in words, "nothing changed on the disk": unchanged,
         "free keys may change": free.codes() == [0] and equal},
    )  # fmt: skip


def two_runs(lab: Lab) -> Outcome:
    """A second run started on the directory of a running one."""
    run_dir = lab.fresh() / "run"
    first = lab.start(run_dir, inject=STEADY)
    first.until_logged(1)
    first.send(signal.SIGSTOP)  # so that it is there for as long as the second asks
    second = lab.run(run_dir)
    words = second.last_words()
    alive = first.processes[0].poll() is None
    first.send(signal.SIGCONT)
    codes = first.wait()
    phrase, equal = same(run_dir, lab.reference())
    return judge(
        f"the second: exit code {second.codes()[0]} after {second.seconds:.0f} s, {brief(words, 200, RUN=run_dir)}; "
        f"the first {'went on' if alive else 'had ended'}: exit code {codes[0]}, {phrase}",
        "nothing",
        {"exit code 2": second.codes() == [2], "one line": one_line(second), "the first was still running": alive,
         "it says who": str(first.processes[0].pid) in words and socket.gethostname() in words,
         "it says since when": bool(re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d", words)),
         "the first is the same run": equal and codes == [0]},
    )  # fmt: skip


def other_images(lab: Lab, kind: str) -> Outcome:
    """Gone on with on as many images, which are others."""
    run_dir = lab.crashed(9, data=kind)
    before = contents(run_dir, LEFT)
    folder = lab.fresh()
    draw_images(folder / "images", seed=7)
    (folder / "images" / "00.jpg").rename(folder / "images" / "0x.jpg")
    if kind == "shards":
        write_shards(folder / "images", folder / "shards")
    run = lab.run(run_dir, data=folder / ("images" if kind == "folder" else "shards"))
    unchanged = contents(run_dir, LEFT) == before
    return judge(
        f"exit code {run.codes()[0]}: {brief(run.last_words(), 250, RUN=run_dir)}",
        "nothing" if unchanged else "files changed",
        {"exit code 2": run.codes() == [2], "one line": one_line(run), "nothing changed on the disk": unchanged},
    )


def moved_images(lab: Lab) -> Outcome:
    """Gone on with on the same images at another place."""
    run_dir, elsewhere = lab.crashed(9), lab.fresh() / "moved"
    elsewhere.symlink_to(lab.sources["folder"])
    run = lab.run(run_dir, data=elsewhere)
    phrase, equal = same(run_dir, lab.reference())
    return judge(f"exit code {run.codes()[0]}; {phrase}", "nothing", {"the same run": equal and run.codes() == [0]})


SCENARIOS = [
    Scenario("read-only", "run directory is read-only", read_only),
    Scenario("other-config", "run directory belongs to a run with other options", other_config),
    Scenario("two-runs", "two runs started on one directory", two_runs),
    Scenario("other-images", "gone on with on other images: folder", lambda lab: other_images(lab, "folder")),
    Scenario("other-shards", "gone on with on other images: shards", lambda lab: other_images(lab, "shards")),
    Scenario("moved-images", "gone on with on the same images elsewhere", moved_images),
]
