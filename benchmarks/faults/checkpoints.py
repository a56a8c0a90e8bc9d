"""Checkpoints that were damaged, tampered with, or had no room."""

from __future__ import annotations

import json
import os
import pickle
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.faults.compare import brief, one_line, same, saved_steps, went_on_from
from benchmarks.faults.lab import Lab, Outcome, Scenario, impossible, judge
from benchmarks.faults.props import resize_disk, small_disk

NEWEST, BEFORE = 12, 9  # of the checkpoints of a run that was killed after step 12


def damaged(lab: Lab, damage: Callable[[Path], object]) -> Outcome:
    """The newest checkpoint is not what was written."""
    run_dir = lab.crashed(NEWEST)
    damage(run_dir / "checkpoints" / f"step_{NEWEST:08d}")
    run = lab.run(run_dir)
    told = [line for line in run.said().splitlines() if "damaged" in line]
    phrase, equal = same(run_dir, lab.reference())
    words = brief(told[0] if told else "nothing is said", 220, RUN=run_dir)
    return judge(
        f"{words}; went on from step {went_on_from(run)}; {phrase}",
        f"{NEWEST - went_on_from(run)} steps done again",
        {"it is told": bool(told), "the one before was used": went_on_from(run) == BEFORE, "the same run": equal,
         "exit code 0": run.codes() == [0]},
    )  # fmt: skip


def _tensors(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


def flip_a_byte(checkpoint: Path) -> None:
    path = _tensors(checkpoint)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(checkpoint: Path) -> None:
    path = _tensors(checkpoint)
    os.truncate(path, path.stat().st_size // 2)


def remove_a_file(checkpoint: Path) -> None:
    _tensors(checkpoint).unlink()


def garbage_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_bytes(os.urandom(500))


class _Mark:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def malicious(lab: Lab) -> Outcome:
    """Metadata that runs a command when it is unpickled, in a checkpoint whose checksums agree."""
    run_dir, mark = lab.crashed(NEWEST), lab.fresh() / "executed"
    checkpoint = run_dir / "checkpoints" / f"step_{NEWEST:08d}"
    data = pickle.dumps(_Mark(mark))
    (checkpoint / ".metadata").write_bytes(data)
    manifest = checkpoint / "manifest.json"
    if manifest.exists():
        files = json.loads(manifest.read_text())
        files["files"][".metadata"] = {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
        manifest.write_text(json.dumps(files))
    run = lab.run(run_dir)
    told = next((line for line in run.said().splitlines() if "refused" in line), "nothing is said")
    phrase, equal = same(run_dir, lab.reference())
    return judge(
        f"{'executed' if mark.exists() else 'not executed'}: {brief(told, 200, RUN=run_dir)}; {phrase}",
        f"{NEWEST - went_on_from(run)} steps done again",
        {"nothing was executed": not mark.exists(), "it is told": "refused" in told, "the same run": equal,
         "exit code 0": run.codes() == [0]},
    )  # fmt: skip


def disk_full(lab: Lab, below: str, room: float) -> Outcome:
    """The file system of the checkpoints, or of the whole run, has room for some of them only; later it has more."""
    run_dir = lab.fresh() / "run"
    needed = sum(path.stat().st_size for path in (lab.reference() / "checkpoints" / "step_00000003").iterdir())
    disk = run_dir / below
    try:
        with small_disk(disk, f"{int(room * needed) // 1024}k"):
            run = lab.run(run_dir)
            code, saved = run.codes()[0], saved_steps(run_dir)
            told = next((line for line in run.said().splitlines() if "No space" in line), "nothing is said")
            resize_disk(disk, "100m")
            again = lab.run(run_dir)
            phrase, equal = same(run_dir, lab.reference())
    except OSError as error:
        return impossible(str(error))
    return judge(
        f"{brief(told, 200, RUN=run_dir)}; exit code {code} at the end, steps {saved} are whole; with room again it "
        f"goes on from {went_on_from(again)}; {phrase}",
        f"{max(run.logged()) - went_on_from(again)} steps done again",
        {"it is told": "No space" in told, "earlier ones are whole": bool(saved) and went_on_from(again) == saved[-1],
         "it ended clearly": code == 0 or (code == 2 and one_line(run)), "the same run": equal,
         "exit code 0 then": again.codes() == [0]},
    )  # fmt: skip


SCENARIOS = [
    Scenario("checkpoint-byte", "newest checkpoint: one bit flipped", lambda lab: damaged(lab, flip_a_byte)),
    Scenario("checkpoint-cut", "newest checkpoint: a file cut in the middle", lambda lab: damaged(lab, truncate)),
    Scenario("checkpoint-missing", "newest checkpoint: a file missing", lambda lab: damaged(lab, remove_a_file)),
    Scenario("checkpoint-manifest", "newest checkpoint: manifest garbage", lambda lab: damaged(lab, garbage_manifest)),
    Scenario("checkpoint-pickle", "newest checkpoint: a pickle that runs a command", malicious),
    Scenario("disk-full", "disk full while a checkpoint is written", partial(disk_full, below="checkpoints", room=3.5)),
    Scenario("disk-full-run", "disk of the whole run directory full", partial(disk_full, below="", room=3.0)),
]
