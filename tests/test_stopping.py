"""Signals and the time limit become one request, heeded between two steps; a second signal ends the process at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinoreg.config import ConfigError
from dinoreg.train.stopping import SIGNALS, StopRequests, parse_time

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("3h50m", 13800), ("1.5h", 5400), ("2d12h", 216000), ("1 h 1 s", 3601)]
)
def test_times_are_read(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "90", "h", "3h50", "3 hours", "-5m", "5mm5"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a time"):
        parse_time(text)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_becomes_a_reason_and_handlers_come_back(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in SIGNALS}
    with StopRequests() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 10
        while stop.reason is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.reason == number.name
        os.kill(os.getpid(), number)  # at once again: passed on by a launcher, not asked for twice
        time.sleep(0.1)
    assert {each: signal.getsignal(each) for each in SIGNALS} == before


def test_the_time_limit_is_a_reason() -> None:
    with StopRequests(0.05) as stop:
        assert stop.reason is None
        time.sleep(0.1)
        assert stop.reason == "train.time_limit"


STUCK = """
import hashlib
from dinoreg.train import stopping
stopping.AGAIN = 0.3
with stopping.StopRequests():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # as a collective: one call into C, without the interpreter lock
"""


def test_a_second_signal_ends_even_a_process_that_is_stuck() -> None:
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, "-c", STUCK], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.6)
    assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    assert process.wait(10) == 128 + signal.SIGUSR1
    assert process.stderr is not None and b"SIGTERM: stopping after this step" in process.stderr.read()
