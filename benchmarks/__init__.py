"""Speed and memory, measured."""

import os

# As the `dinoreg` command does, and as early: OpenMP reads it when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
