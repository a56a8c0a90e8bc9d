"""A rank that dies, freezes, hangs or fails ends the others soon, and one line says which: with real processes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from slurm_lab import SlurmLab, missing
from test_ranks import environment

from dinoreg.config import ConfigError
from dinoreg.parallel.judge import ALIVE, LEFT, LOST, WITH_OTHERS, Beat, Judge, behind
from dinoreg.parallel.mesh import Ranks, setup_ranks
from dinoreg.parallel.watch import EXIT_PEER, Watch, WatchConfig, lost_peers

SILENCE = 3.0  # seconds; a beat is half a second
ON_STEP = 5  # the step at which something happens


class Together(Exception):
    """Raised by all ranks."""


def work(trouble: str, stall: float = 60.0, steps: int = 2000) -> None:
    """A run as the trainer has them; `trouble` "2:hang" is what befalls rank 2."""
    torch.set_num_threads(1)
    ranks = setup_ranks()
    rank, _, what = trouble.partition(":")
    with Watch(ranks, WatchConfig(SILENCE, stall), (Together,)) as watch:
        for step in range(1, steps):
            watch.mark(step, "waiting for data")
            if step == ON_STEP and rank in (str(ranks.rank), "all"):
                befall(what, ranks)
            if step == ON_STEP and what == "end":
                break
            watch.mark(step, WITH_OTHERS)
            ranks.agree(0)
            watch.mark(step, "training")
            ranks.sum_(torch.ones(3))
            time.sleep(0.01)
    ranks.close()


def befall(what: str, ranks: Ranks) -> None:
    if what in ("SIGKILL", "SIGSTOP"):
        time.sleep(SILENCE / 3)  # two beats that say what it is at
        os.kill(os.getpid(), signal.Signals[what])
    elif what == "hang":
        time.sleep(600)
    elif what == "fail":
        raise MemoryError("no room for 3 tensors\nand more lines")
    elif what == "stop together":
        raise Together("as agreed")
    elif what == "end":
        time.sleep(2 * ranks.rank)


def enter(rank: int, world: int, port: int, agent: bool, log: str, *args: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if agent:  # what torchrun sets where its own process keeps the store
        os.environ.update(TORCHELASTIC_RUN_ID="x", TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    logger = logging.getLogger("dinoreg")
    logger.addHandler(logging.FileHandler(f"{log}.log"))
    logger.setLevel(logging.DEBUG)
    work(*args)


class Launch:
    """`world` processes that `work`, from a server process that has imported torch already."""

    def __init__(self, folder: Path, world: int, *args: Any, agent: bool = False) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["dinoreg.data.loader", "dinoreg.parallel.watch"])
        self.store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False) if agent else None
        port = self.store.port if self.store else free_port()
        self.logs = [folder / f"{rank}.err" for rank in range(world)]
        self.began = time.monotonic()
        self.processes = [
            context.Process(target=enter, args=(rank, world, port, agent, str(self.logs[rank]), *args), daemon=True)
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def codes(self, seconds: float = 40, but: int | None = None) -> list[int | None]:
        """Exit codes of all, of all `but` one."""
        for rank, process in enumerate(self.processes):
            if rank != but:
                process.join(max(0.1, self.began + seconds - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def said(self, rank: int) -> list[str]:
        """Lines that the project wrote; torch's own C++ layers have theirs about broken connections."""
        return [line for line in self.logs[rank].read_text().splitlines() if line.startswith(("rank ", "every rank"))]

    def text(self, rank: int) -> str:
        return self.logs[rank].read_text()

    def name(self, rank: int) -> str:
        return f"rank {rank} (pid {self.processes[rank].pid} on {socket.gethostname()})"


@contextmanager
def launched(folder: Path, world: int, *args: Any, agent: bool = False) -> Iterator[Launch]:
    launch = Launch(folder, world, *args, agent=agent)
    try:
        yield launch
    finally:
        for process in launch.processes:
            process.kill()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def all_end_with(launch: Launch, ranks: Sequence[int], line: str) -> None:
    """Each of the ranks has said this one line, to the terminal and to its log, and nothing like a traceback."""
    for rank in ranks:
        assert launch.said(rank) == [line] or re.fullmatch(line, "\n".join(launch.said(rank))), launch.text(rank)
        assert "Traceback" not in launch.text(rank)
        assert Path(f"{launch.logs[rank]}.log").read_text().splitlines() == launch.said(rank)


AGAIN = r"The last checkpoint is whole; start again with the same command\."
LAST_SEEN = rf"last seen waiting for data \(step {ON_STEP}\)\. {AGAIN}"


def test_a_killed_rank_is_named_by_all_others(tmp_path: Path) -> None:
    with launched(tmp_path, 3, "1:SIGKILL") as launch:
        assert launch.codes() == [EXIT_PEER, -9, EXIT_PEER]
        line = rf"{re.escape(launch.name(1))} is gone: the connection broke, and no sign of life for \d s; "
        all_end_with(launch, [0, 2], line + LAST_SEEN)


def test_the_rank_that_keeps_the_store_is_named_when_killed(tmp_path: Path) -> None:
    with launched(tmp_path, 3, "0:SIGKILL") as launch:
        assert launch.codes() == [-9, EXIT_PEER, EXIT_PEER]
        line = (
            rf"{re.escape(launch.name(0))}, or the launcher that keeps the store of the ranks, is gone: .*; {LAST_SEEN}"
        )
        all_end_with(launch, [1, 2], line)


def test_the_first_rank_is_named_when_a_launcher_keeps_the_store(tmp_path: Path) -> None:
    with launched(tmp_path, 3, "0:SIGKILL", agent=True) as launch:
        assert launch.codes() == [-9, EXIT_PEER, EXIT_PEER]
        line = rf"{re.escape(launch.name(0))} is gone: the connection broke, and no sign of life for \d s; {LAST_SEEN}"
        all_end_with(launch, [1, 2], line)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_is_named_after_its_silence(tmp_path: Path, frozen: int) -> None:
    with launched(tmp_path, 2, f"{frozen}:SIGSTOP") as launch:
        assert launch.codes(but=frozen)[1 - frozen] == EXIT_PEER
        how = r" is dead or frozen: no sign of life for [34] s; "
        how = how if frozen else r", or the launcher that keeps the store of the ranks, is gone: no answer for 3 s; "
        all_end_with(launch, [1 - frozen], re.escape(launch.name(frozen)) + how + LAST_SEEN)


def test_a_short_pause_of_one_and_a_long_one_of_all_are_forgiven(tmp_path: Path) -> None:
    with launched(tmp_path, 2, ":", 60.0, 250) as launch:  # 2.5 s of naps
        for paused, seconds in (launch.processes[1:], SILENCE / 3), (launch.processes, SILENCE + 1):
            time.sleep(0.7)
            for number in (signal.SIGSTOP, signal.SIGCONT):
                for process in paused:
                    os.kill(process.pid or 0, number)
                time.sleep(seconds)
        assert launch.codes() == [0, 0]
        assert [launch.text(rank) for rank in range(2)] == ["", ""]


def test_who_hangs_is_named_and_not_those_who_wait_for_it(tmp_path: Path) -> None:
    with launched(tmp_path, 3, "2:hang", SILENCE) as launch:
        assert launch.codes() == [EXIT_PEER] * 3
        line = re.escape(f"{launch.name(2)} is hanging, waiting for data (step {ON_STEP})")
        line += rf" for \d s, and no rank makes progress; the others: {WITH_OTHERS} \(step {ON_STEP}\)\. {AGAIN}"
        all_end_with(launch, [0, 1, 2], line)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_on_one_rank_is_told_to_the_others(tmp_path: Path, failing: int) -> None:
    with launched(tmp_path, 3, f"{failing}:fail") as launch:
        assert launch.codes() == [1 if rank == failing else EXIT_PEER for rank in range(3)]
        others = [rank for rank in range(3) if rank != failing]
        all_end_with(launch, others, f"{launch.name(failing)} failed: MemoryError: no room for 3 tensors")
        assert "MemoryError: no room" in launch.text(failing)  # its own traceback
        assert launch.said(failing) == []


def test_an_error_that_one_rank_takes_for_everybodys_is_told_too(tmp_path: Path) -> None:
    with launched(tmp_path, 2, "1:stop together") as launch:
        assert launch.codes() == [EXIT_PEER, 1]
        all_end_with(launch, [0], f"{launch.name(1)} failed: Together: as agreed")


@pytest.mark.parametrize("agent", [False, True])
def test_ranks_that_end_one_after_the_other_do_not_miss_each_other(tmp_path: Path, agent: bool) -> None:
    with launched(tmp_path, 2, "all:end", agent=agent) as launch:
        assert launch.codes() == [0, 0]
        assert [launch.text(rank) for rank in range(2)] == ["", ""]


def test_an_error_that_all_ranks_raise_ends_nobody_for_another(tmp_path: Path) -> None:
    with launched(tmp_path, 2, "all:stop together") as launch:
        assert launch.codes() == [1, 1]
        assert all(launch.said(rank) == [] and "Together: as agreed" in launch.text(rank) for rank in (0, 1))


PROGRAM = """
from test_watch import work
work("1:SIGKILL")
"""


@pytest.mark.skipif(bool(missing()), reason=f"a real Slurm is not installed: {', '.join(missing())} missing")
def test_a_killed_task_of_srun_is_named(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    with SlurmLab() as lab:
        env = environment(**{k: lab.env[k] for k in ("SLURM_CONF", "PATH")})
        env["PYTHONPATH"] += f":{Path(__file__).parent}"
        command = ["srun", "-N2", "-n2", "--label", sys.executable, str(tmp_path / "program.py")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90)
    lines = [line for line in done.stderr.splitlines() if "rank 1 (pid" in line]
    assert len(lines) == 1 and re.match(r"0: rank 1 \(pid \d+ on .*\) is gone: ", lines[0]), done.stderr
    assert f"task 0: Exited with exit code {EXIT_PEER}" in done.stderr


def test_alone_there_is_nothing_to_watch() -> None:
    with Watch(Ranks.alone(), WatchConfig()) as watch:
        watch.mark(1, "training")


def beat(number: int, step: int = 7, doing: str = "training", idle: float = 1.0, why: str = "") -> Beat:
    return Beat(number, "node3", 4711, step, doing, idle, why)


def judge(world: int) -> Judge:
    return Judge(range(world), beat=5.0, silence=60.0, stall=1500.0)


def test_a_thousand_beats_are_judged_by_the_readers_clock() -> None:
    verdicts = judge(1000)
    for now in range(0, 120, 5):
        dead = range(996, 1000) if now >= 40 else ()
        values = [beat(0 if rank in dead else now).text(ALIVE).encode() for rank in range(1000)]
        values = [verdicts.values[rank] if rank in dead else value for rank, value in enumerate(values)]
        verdict = verdicts(values, now)
        assert bool(verdict) == (now > 35 + 60), now
    named = ", ".join(f"rank {rank} (pid 4711 on node3)" for rank in range(996, 1000))
    assert verdict.startswith(f"{named} are dead or frozen: no sign of life for 80 s; last seen training (step 7). ")


def test_a_lost_connection_makes_the_judge_impatient() -> None:
    verdicts = judge(3)
    said = [beat(1).text(state).encode() for state in (ALIVE, ALIVE, ALIVE)]
    assert verdicts(said, 0.0) == ""
    said = [beat(2).text(state).encode() for state in (ALIVE, LOST)] + said[2:]
    assert verdicts(said, 10.0) == ""
    said = [beat(3).text(state).encode() for state in (ALIVE, LOST)] + said[2:]
    assert verdicts(said, 15.0).startswith("rank 2 (pid 4711 on node3) is gone: ")


def test_who_has_left_is_not_missed() -> None:
    verdicts = judge(2)
    assert verdicts([beat(1).text(ALIVE).encode(), beat(1).text(LEFT).encode()], 0.0) == ""
    assert verdicts([beat(2).text(ALIVE).encode(), beat(1).text(LEFT).encode()], 100.0) == ""
    assert verdicts.alone()


def test_a_rank_that_never_began_is_named() -> None:
    assert judge(2)([beat(9).text(ALIVE).encode(), b""], 61.0).startswith("rank 1 is dead or frozen: ")


def test_nobody_is_behind_while_somebody_gets_on() -> None:
    verdicts = judge(2)
    values = [beat(1, idle=2000.0), beat(1, idle=1400.0)]
    assert verdicts([value.text(ALIVE).encode() for value in values], 0.0) == ""
    values = [beat(1, idle=2000.0), beat(1, idle=1600.0)]
    verdict = verdicts([value.text(ALIVE).encode() for value in values], 1.0)
    assert verdict.startswith("every rank is hanging, training (step 7) for 2000 s, and no rank makes progress. ")


@pytest.mark.parametrize(
    ("others", "culprit"),
    [
        (("training", 8), ("training", 7)),  # an earlier step
        ((WITH_OTHERS, 7), ("waiting for data", 7)),  # waiting is no fault
        (("training", 7), ("saving", 7)),  # something else than the rest
    ],
)
def test_behind_is_whom_the_others_wait_for(others: tuple[str, int], culprit: tuple[str, int]) -> None:
    beats = {rank: Beat(1, "h", 1, step, doing, 9.0) for rank, (doing, step) in enumerate([others, culprit, others])}
    assert behind(beats) == [1]


def test_of_two_that_differ_the_one_is_behind_that_stopped_first() -> None:
    assert behind({0: beat(1, doing="training", idle=8.0), 1: beat(1, doing="waiting for data", idle=9.0)}) == [1]


def test_an_error_of_the_transport_is_told_from_one_of_the_data() -> None:
    gloo = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer")
    assert lost_peers(gloo) and lost_peers(dist.DistBackendError("NCCL error"))
    wrapped = ValueError("no checkpoint")
    wrapped.__cause__ = gloo
    assert lost_peers(wrapped)
    assert not lost_peers(RuntimeError("shape mismatch")) and not lost_peers(ConnectionResetError("Connection reset"))


@pytest.mark.parametrize("cfg", [WatchConfig(silence=0.1), WatchConfig(silence=60.0, stall=30.0)])
def test_times_too_short_are_a_mistake(cfg: WatchConfig) -> None:
    with pytest.raises(ConfigError, match="must be at least"):
        cfg.check()
