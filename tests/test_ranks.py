"""The same program finds its peers alone, under torchrun and under a real srun, without a flag."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
from slurm_lab import SlurmLab, missing

from dinoreg.cli import main
from dinoreg.parallel.mesh import _from_environment

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


def test_hosts_of_ipv6() -> None:
    port = free_port("::1")
    ranks = [
        {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": port}
        for r in (0, 1)
    ]
    with ThreadPoolExecutor(2) as pool:
        lines = list(pool.map(lambda extra: run([sys.executable, "-c", PROGRAM], environment(**extra)), ranks))
    assert lines == [[f"RANK {r}/2 local {r}/2: {OF_TWO[r]}"] for r in (0, 1)]


def free_port(address: str) -> str:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as s:
        try:
            s.bind((address, 0))
        except OSError:
            pytest.skip(f"this machine has no {address}")
        return str(s.getsockname()[1])


def test_a_port_that_is_taken_is_one_line_and_to_be_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {
            "RANK": 0,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }.items():
            monkeypatch.setenv(name, str(value))
        words = [
            "train",
            str(REPOSITORY / "tests" / "tiny.yaml"),
            f"data.sources={tmp_path}",
            f"run_dir={tmp_path / 'run'}",
        ]
        with pytest.raises(SystemExit) as end:
            main(words)
    assert end.value.code == 75
    assert f"dinoreg: port {port} of " in capsys.readouterr().err


def test_jobs_of_a_slurm_meet_at_ports_of_their_own() -> None:
    """Neighbouring jobs, steps of one job, and another start of a job whose port was taken."""

    def port(job: int, step: int = 0, restart: int = 0) -> str:
        names = {"JOB_ID": job, "STEP_ID": step, "RESTART_COUNT": restart, "PROCID": 0, "NTASKS": 2, "LOCALID": 0}
        variables = {f"SLURM_{name}": str(value) for name, value in names.items()}
        slurm = variables | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "MASTER_ADDR": "node1"}
        with mock.patch.dict(os.environ, slurm, clear=True):
            assert _from_environment() == (0, 2, 0, 1)
            return os.environ["MASTER_PORT"]

    ports = [port(job) for job in range(4_000_000, 4_001_000)] + [port(4_000_000, step=1), port(4_000_000, restart=1)]
    assert len(set(ports)) == len(ports) and all(20000 <= int(each) < 32000 for each in ports)


@pytest.mark.skipif(bool(missing()), reason=f"a real Slurm is not installed: {', '.join(missing())} missing")
def test_srun_on_two_nodes(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    with SlurmLab() as lab:
        command = ["srun", "-N2", "-n2", sys.executable, str(tmp_path / "program.py")]
        lines = run(command, environment(**{k: lab.env[k] for k in ("SLURM_CONF", "PATH")}))
    assert lines == [f"RANK {r}/2 local 0/1: {OF_TWO[r]}" for r in (0, 1)]
