"""The same program finds its peers alone, under torchrun and under a real srun, without a flag."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_lab import SlurmLab, missing

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAM = """
import os
import torch
from dinoreg.parallel.mesh import setup_ranks
ranks = setup_ranks()
total = ranks.sum_(torch.tensor([ranks.rank + 1.0]))
top = ranks.max_(torch.tensor([float(ranks.rank)]))
x = torch.full((2, 1), float(ranks.rank), requires_grad=True)
(ranks.gather(x) * torch.arange(2.0 * ranks.world)[:, None]).sum().backward()
word = ranks.broadcast_object(f"from {ranks.rank}")
line = f"RANK {ranks.rank}/{ranks.world} local {ranks.local_rank}/{ranks.local_world}: "
line += f"{total.item()} {top.item()} {x.grad.flatten().tolist()} {word}\\n"
os.write(1, line.encode())  # at once: two processes share this pipe
ranks.close()
"""
# The gathered gradient sums over ranks: each of the two ranks contributes the weights 0, 1, 2, 3.
OF_TWO = {0: "3.0 1.0 [0.0, 2.0] from 0", 1: "3.0 1.0 [4.0, 6.0] from 0"}


def environment(**extra: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TORCHELASTIC"))}
    return kept | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **extra}


def run(command: list[str], env: dict[str, str]) -> list[str]:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return sorted(line for line in done.stdout.splitlines() if line.startswith("RANK"))


def test_alone() -> None:
    lines = run([sys.executable, "-c", PROGRAM], environment())
    assert lines == ["RANK 0/1 local 0/1: 1.0 0.0 [0.0, 1.0] from 0"]


def test_torchrun(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    lines = run([*torchrun, str(tmp_path / "program.py")], environment())
    assert lines == [f"RANK {r}/2 local {r}/2: {OF_TWO[r]}" for r in (0, 1)]


@pytest.mark.skipif(bool(missing()), reason=f"a real Slurm is not installed: {', '.join(missing())} missing")
def test_srun_on_two_nodes(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    with SlurmLab() as lab:
        command = ["srun", "-N2", "-n2", sys.executable, str(tmp_path / "program.py")]
        lines = run(command, environment(**{k: lab.env[k] for k in ("SLURM_CONF", "PATH")}))
    assert lines == [f"RANK {r}/2 local 0/1: {OF_TWO[r]}" for r in (0, 1)]
