"""Asked to stop, and left alone by another rank."""

from __future__ import annotations

import re
import signal
import time
from functools import partial
from pathlib import Path

from benchmarks.faults.compare import brief, lines_of, one_line, same, saved_steps, went_on_from
from benchmarks.faults.lab import PEER_LOST, STEADY, STEPS, STOPPED, Lab, Outcome, Run, Scenario, judge

SILENCE = 6  # seconds without a sign of life
WITHIN = 30.0  # seconds for the others to end, on a busy machine


def in_turn(lab: Lab) -> Outcome:
    """Each signal once, to one of two ranks alone; the same command in between."""
    run_dir = lab.fresh() / "run"
    codes, saved = [], []
    for rank, number in enumerate((signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)):
        run = lab.start(run_dir, ranks=2, inject=STEADY)
        run.until_logged(2)
        run.send(number, rank % 2)
        codes.append(run.wait())
        saved.append(_last_is_saved(run_dir))
    last = lab.run(run_dir, ranks=2)
    phrase, equal = same(run_dir, lab.reference(ranks=2))
    return judge(
        f"each stopped both ranks with {codes[0]}, {codes[1]}, {codes[2]}, {codes[3]}; {phrase}",
        "nothing" if all(saved) else "steps",
        {"exit code 75": codes == [[STOPPED] * 2] * 4, "exit code 0 at the end": last.codes() == [0, 0],
         "the last step was saved": all(saved), "the same run": equal},
    )  # fmt: skip


def to_the_group(lab: Lab, number: signal.Signals) -> Outcome:
    """To the main process and its data workers alike, as Slurm and a terminal send it."""
    run_dir = lab.fresh() / "run"
    run = lab.start(run_dir, "data.workers=2", inject=STEADY)
    run.until_logged(2)
    run.send_to_groups(number)
    codes = run.wait()
    return _resumed(lab, run, codes, _last_is_saved(run_dir), "data.workers=2")


def to_torchrun(lab: Lab) -> Outcome:
    """The launcher gets it and passes it on."""
    run_dir = lab.fresh() / "run"
    run = lab.start(run_dir, ranks=2, torchrun=True)
    run.until_logged(2)
    run.send(signal.SIGTERM)
    (code,) = run.wait()
    saved, step = _last_is_saved(run_dir), max(run.logged())
    again = lab.run(run_dir, ranks=2, torchrun=True)
    phrase, equal = same(run_dir, lab.reference(ranks=2))
    return judge(
        f"torchrun exits {code}; step {step} {'is' if saved else 'is not'} saved; {phrase}",
        f"{step - went_on_from(again)} steps",
        {"it stopped": code != 0, "the last step was saved": saved, "the same run": equal,
         "exit code 0 at the end": again.codes() == [0]},
    )  # fmt: skip


def time_limit(lab: Lab) -> Outcome:
    """train.time_limit."""
    run = lab.run(lab.fresh() / "run", "train.time_limit=1s", inject=STEADY)
    codes = run.codes()
    return _resumed(lab, run, codes, _last_is_saved(run.run_dir))


def _resumed(lab: Lab, run: Run, codes: list[int], saved: bool, *overrides: str) -> Outcome:
    """Stopped as asked, then the same command to the end."""
    step, words = max(run.logged()), run.last_words()
    again = lab.run(run.run_dir, *overrides)
    phrase, equal = same(run.run_dir, lab.reference())
    return judge(
        f"exit code {codes[0]}: {brief(words)}; {phrase}",
        f"{step - went_on_from(again)} steps",
        {"exit code 75": codes == [STOPPED], "it stopped in between": step < STEPS, "the last step was saved": saved,
         "one line": one_line(run), "exit code 0 at the end": again.codes() == [0], "the same run": equal},
    )  # fmt: skip


def twice(lab: Lab) -> Outcome:
    """A second signal, while the step after the first takes for ever."""
    run_dir = lab.fresh() / "run"
    run = lab.start(run_dir, inject="hang:5")
    run.until(lambda: "step 5 hangs" in run.said(), "step that hangs")  # not before: between two steps it is heeded
    run.send(signal.SIGTERM)
    time.sleep(3)
    waited = run.processes[0].poll() is None
    run.send(signal.SIGTERM)
    began = time.monotonic()
    codes = run.wait(20)
    seconds = time.monotonic() - began
    again = lab.run(run_dir)
    phrase, equal = same(run_dir, lab.reference())
    return judge(
        f"after the first it waits for its step, after the second exit code {codes[0]} in {seconds:.1f} s; {phrase}",
        f"{4 - went_on_from(again)} step done again",
        {"it waited for the step": waited, "exit code 143": codes == [143], "at once": seconds < 5,
         "the same run": equal},
    )  # fmt: skip


def lost(lab: Lab, number: signal.Signals, victim: int) -> Outcome:
    """One of two ranks dies or freezes."""
    run_dir, other = lab.fresh() / "run", 1 - victim
    run = lab.start(run_dir, f"watch.silence={SILENCE}", ranks=2, inject=STEADY)
    run.until(partial(saved_steps, run_dir), "checkpoint")
    run.send(number, victim)
    began = time.monotonic()
    run.processes[other].wait(WITHIN)
    seconds, code = time.monotonic() - began, run.codes()[other]
    words = [line for line in run.said(other).splitlines() if re.search(rf"\brank {victim}\b", line)]
    run.kill()
    again = lab.run(run_dir, ranks=2)
    phrase, equal = same(run_dir, lab.reference(ranks=2))
    return judge(
        f"rank {other} ends in {seconds:.1f} s with {code}: {brief(words[0], 220) if words else 'no word'}; {phrase}",
        f"{max(run.logged()) - went_on_from(again)} steps done again",
        {"exit code 76": code == PEER_LOST, f"it names rank {victim}": bool(words), "the same run": equal,
         "it went on": went_on_from(again) > 0, "exit code 0 at the end": again.codes() == [0, 0],
         "no traceback": "Traceback" not in run.said(other)},
    )  # fmt: skip


def _last_is_saved(run_dir: Path) -> bool:
    lines, saved = lines_of(run_dir), saved_steps(run_dir)
    return bool(lines and saved) and int(lines[-1]["step"]) == saved[-1]


SCENARIOS = [
    Scenario("signals-in-turn", "SIGTERM, SIGUSR1, SIGUSR2, SIGINT, each to one of 2 ranks", in_turn),
    Scenario("signal-group-term", "SIGTERM to the process group, data workers too",
             lambda lab: to_the_group(lab, signal.SIGTERM)),
    Scenario("signal-group-int", "SIGINT (Ctrl-C) to the process group, data workers too",
             lambda lab: to_the_group(lab, signal.SIGINT)),
    Scenario("signal-torchrun", "SIGTERM to torchrun with 2 ranks", to_torchrun),
    Scenario("time-limit", "train.time_limit is over", time_limit),
    Scenario("signal-twice", "a second SIGTERM while a step hangs", twice),
    Scenario("rank-killed", "SIGKILL to one of 2 ranks", lambda lab: lost(lab, signal.SIGKILL, 1)),
    Scenario("main-rank-killed", "SIGKILL to the main one of 2 ranks", lambda lab: lost(lab, signal.SIGKILL, 0)),
    Scenario("rank-stopped", "SIGSTOP to one of 2 ranks", lambda lab: lost(lab, signal.SIGSTOP, 1)),
]  # fmt: skip
