"""Images that vanish, break, stall or are meant to harm."""

from __future__ import annotations

import os
import re
import shutil
import signal
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from benchmarks.faults.compare import brief, lines_of, one_line, same
from benchmarks.faults.lab import RECIPE, STEADY, STEPS, Lab, Outcome, Run, Scenario, impossible, judge
from benchmarks.faults.props import draw_images, mounting, write_shards, write_tar
from benchmarks.faults.server import Behaviour, shop

# A batch is a shard then, so that there are shards which nobody has opened yet.
BY_SHARD = ("data.shuffle_window=1", "data.max_bad_share=0.05")


def shards_change(lab: Lab, change: Callable[[Path], object], tries: int = 3) -> Outcome:
    """A shard that was not opened before changes during the run; later it is as it was."""
    folder = lab.fresh()
    intact, shards, run_dir = folder / "intact", folder / "shards", folder / "run"
    draw_images(folder / "images", 72)  # nine steps, for shards are opened up to two steps before they are read
    write_shards(folder / "images", intact, 9)
    shutil.copytree(intact, shards)
    run = lab.start(run_dir, *BY_SHARD, data=shards, inject=STEADY)
    run.until_logged(1)
    victim = _unopened(run, shards)
    change(victim)
    codes = run.wait()
    if codes == [0] and tries > 1:  # it had opened the shard by then, and reads what it opened to the end
        return shards_change(lab, change, tries - 1)
    words = run.last_words()
    shutil.copy(intact / victim.name, victim)
    again = lab.run(run_dir, *BY_SHARD, data=shards)
    lines = lines_of(run_dir)
    bad, told = int(lines[-1].get("data/bad", -1)), re.match(r"(\d+) of \d+ samples", words)
    return judge(
        f"exit code {codes[0]}: {brief(words, 220, SHARDS=shards)}; with the shard back: exit code "
        f"{again.codes()[0]}, all {len(lines)} steps",
        f"{bad} images, for which others stood in",
        {"exit code 2": codes == [2], "one line that names the shard": one_line(run) and victim.name in words,
         "nothing but text": words.isprintable(),
         "it goes on then": again.codes() == [0] and len(lines) == STEPS,
         "steps are made again with the shard back": told is not None and bad < int(told[1])},
    )  # fmt: skip


def _unopened(run: Run, shards: Path) -> Path:
    """A shard that the process has not open."""
    held = {os.readlink(link) for link in Path(f"/proc/{run.processes[0].pid}/fd").iterdir()}  # noqa: PTH115
    return next(path for path in sorted(shards.glob("*.tar"), reverse=True) if str(path) not in held)


def replace(shard: Path) -> None:
    """By another tar of the same size."""
    data = bytearray(shard.read_bytes())
    data[512:] = os.urandom(len(data) - 512)
    fresh = shard.with_suffix(".new")
    fresh.write_bytes(data)
    fresh.replace(shard)


def cut_at_start(lab: Lab) -> Outcome:
    """A shard ends in the middle of an image before the run begins."""
    shards = lab.fresh() / "shards"
    shutil.copytree(lab.sources["shards"], shards)
    victim = shards / "shard-1.tar"
    os.truncate(victim, victim.stat().st_size // 2)
    return _refused(lab, shards, victim.name)


def hostile_names(lab: Lab) -> Outcome:
    """Members that would be unpacked elsewhere."""
    shards = lab.fresh() / "shards"
    shutil.copytree(lab.sources["shards"], shards)
    image = sorted(lab.sources["folder"].iterdir())[0].read_bytes()
    write_tar(shards / "shard-0.tar", {"a.jpg": image, "../../../etc/b.jpg": image, "/etc/c.jpg": image})
    return _refused(lab, shards, "../../../etc/b.jpg")


def _refused(lab: Lab, source: Path, name: str) -> Outcome:
    run = lab.run(lab.fresh() / "run", data=source)
    words = run.last_words()
    return judge(
        f"exit code {run.codes()[0]} in {run.seconds:.0f} s: {brief(words, 220, SHARDS=source)}",
        "nothing",
        {"exit code 2": run.codes() == [2], "one line": one_line(run), f"it names {name}": name in words},
    )


def bomb(lab: Lab) -> Outcome:
    """A PNG of a few bytes that says it has 10^10 pixels, among good images."""
    folder = lab.fresh() / "images"
    shutil.copytree(lab.sources["folder"], folder)
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    run = lab.run(lab.fresh() / "run", data=folder)
    lines = lines_of(run.run_dir)
    counted = int(lines[-1].get("data/bad/too-large", 0)) if lines else 0
    others = int(lines[-1].get("data/bad", 0)) - counted if lines else 0
    # 14 steps of 8 images are 4 passes of 25 images and a part of the fifth.
    return judge(
        f"exit code {run.codes()[0]}, {len(lines)} steps; {counted} times too large and replaced by another image",
        "that image",
        {"exit code 0": run.codes() == [0], "all steps": len(lines) == STEPS, "once an epoch": counted in (4, 5),
         "no other is bad": others == 0},
    )  # fmt: skip


def over_http(lab: Lab, behaviour: Behaviour) -> Outcome:
    """Shards from a web server, compared with the same from one that behaves."""
    found, requests, broken, run = _stream(lab, behaviour)
    expected, wanted, _, _ = lab.once("http", lambda: _stream(lab, "well"))
    phrase, equal = same(found, expected)
    return judge(
        f"{broken} of {requests} answers broken (a good server needs {wanted}): exit code {run.codes()[0]} in "
        f"{run.seconds:.0f} s; {phrase}",
        "nothing",
        {"exit code 0": run.codes() == [0], "faults were met": broken > 0, "the same run": equal},
    )


def _stream(lab: Lab, behaviour: Behaviour) -> tuple[Path, int, int, Run]:
    with shop(lab.sources["shards"], behaviour) as server:
        run = lab.run(lab.fresh() / "run", data=f"{server.url}/shard-{{0..2}}.tar", inject="impatient:1")
        return run.run_dir, server.asked.total(), server.broken, run


def http_is_down(lab: Lab) -> Outcome:
    """Nobody answers."""
    run = lab.run(lab.fresh() / "run", data="http://127.0.0.1:9/shard-{0..2}.tar", inject="impatient:1")
    words = run.last_words()
    return judge(
        f"exit code {run.codes()[0]} in {run.seconds:.0f} s: {brief(words)}",
        "nothing",
        {"exit code 2": run.codes() == [2], "one line": one_line(run), "it names the address": "127.0.0.1:9" in words},
    )


def tiny_shared_memory(lab: Lab) -> Outcome:
    """/dev/shm of 64 KiB, as containers are known to give."""
    try:
        mount = mounting("mount -t tmpfs -o size=64k tmpfs /dev/shm")
    except OSError as error:
        return impossible(str(error))
    chosen = lab.run(lab.fresh() / "run", "data.workers=-1", prefix=mount)
    told = next((line for line in chosen.said().splitlines() if "/dev/shm" in line), "nothing is said")
    asked = lab.run(lab.fresh() / "run", "data.workers=2", prefix=mount)
    phrase, equal = same(chosen.run_dir, lab.reference())
    return judge(
        f"workers chosen: {brief(told)}; {phrase}; 2 asked for: exit code {asked.codes()[0]}, "
        f"{brief(asked.last_words())}",
        "nothing",
        {"exit code 0": chosen.codes() == [0], "the same run": equal, "asked: exit code 2": asked.codes() == [2],
         "asked: one line": one_line(asked)},
    )  # fmt: skip


def killed_worker(lab: Lab) -> Outcome:
    """A data worker is killed, as the kernel does when memory runs out."""
    run = lab.start(lab.fresh() / "run", "data.workers=2", inject=STEADY)
    run.until_logged(2)
    workers = data_workers(run)
    for pid in workers[:1]:
        os.kill(pid, signal.SIGKILL)
    codes = run.wait()
    phrase, equal = same(run.run_dir, lab.reference())
    told = next((line for line in run.said().splitlines() if "worker" in line), "nothing is said")
    return judge(
        f"1 of {len(workers)} workers killed: {brief(told)}; exit code {codes[0]}, {phrase}",
        "nothing",
        {"there were 2": len(workers) == 2, "exit code 0": codes == [0], "the same run": equal,
         "it is told": "worker" in told},
    )  # fmt: skip


def data_workers(run: Run) -> list[int]:
    """Processes of the group that a fork server has started."""
    parents, servers = {}, set()
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            pid = int(folder.name)
            if os.getpgid(pid) != run.processes[0].pid:
                continue
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            servers |= {pid} if b"forkserver" in (folder / "cmdline").read_bytes() else set()
    return sorted(pid for pid, parent in parents.items() if pid in servers and parent in servers)


def yaml_that_executes(lab: Lab) -> Outcome:
    """A recipe that asks for a function to be called."""
    folder = lab.fresh()
    mark, recipe = folder / "executed", folder / "recipe.yaml"
    recipe.write_text(f"base: {RECIPE}\nseed: !!python/object/apply:os.mkdir [{mark}]\n")
    run = lab.run(folder / "run", recipe=recipe)
    return judge(
        f"{'executed' if mark.exists() else 'not executed'}, exit code {run.codes()[0]}: "
        f"{brief(run.last_words(), 200, RECIPES=folder)}",
        "nothing",
        {"nothing was executed": not mark.exists(), "exit code 2": run.codes() == [2], "one line": one_line(run)},
    )


SCENARIOS = [
    Scenario("shard-vanishes", "a shard is removed during the run", lambda lab: shards_change(lab, Path.unlink)),
    Scenario("shard-shrinks", "a shard is cut to a third during the run",
             lambda lab: shards_change(lab, lambda path: os.truncate(path, path.stat().st_size // 3))),
    Scenario("shard-replaced", "a shard is replaced during the run", lambda lab: shards_change(lab, replace)),
    Scenario("tar-cut", "a tar ends in the middle when the run starts", cut_at_start),
    Scenario("http-errors", "http: the first answer for each shard is 500", lambda lab: over_http(lab, "errors")),
    Scenario("http-half", "http: the first body of each shard is cut in half", lambda lab: over_http(lab, "half")),
    Scenario("http-half-no-range", "http: the same, from a server without ranges",
             lambda lab: over_http(lab, "half-without-ranges")),
    Scenario("http-stall", "http: the first answer for each shard stalls half way",
             lambda lab: over_http(lab, "stall")),
    Scenario("http-down", "http: nobody answers", http_is_down),
    Scenario("small-shm", "/dev/shm has 64 KiB", tiny_shared_memory),
    Scenario("worker-killed", "a data worker is killed -9", killed_worker),
    Scenario("hostile-tar", "tar members with parent and absolute paths", hostile_names),
    Scenario("bomb", "a decompression bomb among the images", bomb),
    Scenario("hostile-recipe", "a recipe with !!python/object/apply", yaml_that_executes),
]  # fmt: skip
