"""How long threads of a matrix product wait for each other awake. Imports nothing, for it comes before torch."""

from __future__ import annotations

import os

# Turns of a waiting loop, some 0.5 ms. Awake, a thread goes on at once; asleep, it gives its core away. Asleep at once
# costs a fifth of the speed on cores that nobody else wants, awake for ever four fifths where others want them
# (benchmarks/LOG.md).
PATIENCE = "10000"


def set_patience() -> None:
    """Ask OpenMP for it, unless the user has. OpenMP reads this once, when torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", PATIENCE)
