"""What numbers a network is computed in, where that is left to the device."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

Precision = Literal["auto", "bf16", "fp32"]


def resolve_precision(precision: Precision, device: torch.device) -> Literal["bf16", "fp32"]:
    """auto: bf16 on GPUs and processors that have instructions for it; on the latter it is 2 to 4 times as fast."""
    if precision != "auto":
        return precision
    able = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _processor_has_bf16()
    return "bf16" if able else "fp32"


def _processor_has_bf16() -> bool:
    """As Linux lists it; elsewhere no."""
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx512_bf16" in words or "amx_bf16" in words
