"""What a figure was measured on, and how much memory was held: without these it means nothing."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from dinoreg.parallel.mesh import Ranks

MIB, GIB = 2**20, 2**30


def describe_machine(ranks: Ranks) -> dict[str, Any]:
    """Hardware, versions and commit."""
    cuda = ranks.device.type == "cuda"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{_processor()}, {torch.get_num_threads()} threads",
        "processes": ranks.world,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def _processor() -> str:
    """Its name, and which of the instructions it has that matter most here."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    except OSError:
        return platform.processor() or "CPU"
    facts = {key.strip(): value.strip() for key, value in lines.items()}
    flags = facts.get("flags", "").split()
    known = {"amx_bf16": "AMX bf16", "avx512_bf16": "AVX-512 bf16", "avx512f": "AVX-512", "avx2": "AVX2"}
    best = next((name for flag, name in known.items() if flag in flags), "")
    return ", ".join(filter(None, (facts.get("model name", "CPU"), best)))


def peak_memory(device: torch.device) -> float:
    """Bytes at the highest moment so far: by the allocator on a GPU, elsewhere all that this process held."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resident("VmHWM")


def resident(name: str) -> float:
    """Bytes of this process as Linux counts them: VmRSS now, VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024.0 * int(line.split()[1])
