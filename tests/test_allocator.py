"""Memory that is freed stays with the process."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, numpy
from dinoreg.allocator import keep_freed_memory
size, *most = map(int, sys.argv[2:])
if sys.argv[1] == "keep" and not keep_freed_memory(*most):
    raise SystemExit(3)
held = [numpy.ones(size, numpy.float32) for _ in range(3)]  # a step's peak, larger than what follows
del held
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    numpy.ones(size, numpy.float32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*words: str | int) -> int | None:
    """Pages that five arrays, one after another, ask the system for; None where the C library has no say in it."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, words)], capture_output=True, text=True)
    return None if done.returncode == 3 else int(done.stdout)


def test_pages_are_not_asked_for_again() -> None:
    large, medium, most = 2**24, 2**20, 2**26  # entries; the limit in bytes
    pages = 4 * large // resource.getpagesize()
    kept = faults("keep", large)
    if kept is None:
        pytest.skip("a C library without mallopt")
    fewest = 5 * pages // 512  # with huge pages
    assert kept < fewest // 2 < (faults("default", large) or 0)
    assert (faults("keep", large, most) or 0) > fewest // 2, "larger than what is kept"
    assert (faults("keep", medium, most) or 0) < fewest // 16
