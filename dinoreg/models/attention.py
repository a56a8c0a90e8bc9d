"""Attention within each sequence of a packed tensor, by whichever kernel the machine has.

Four backends compute the same function. "xformers": memory-efficient attention under a block-diagonal mask, one kernel
for all resolutions. "varlen": torch's own variable-length flash attention, likewise one kernel, half precision only.
"sdpa": scaled_dot_product_attention once for each resolution; runs everywhere. "matmul": two products and a softmax,
once for each resolution, with all weights in memory; for CPUs in bf16, whose units for it sdpa's kernel leaves idle:
forward and backward take a third of the time (benchmarks/LOG.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.models.packing import Packing
from dinoreg.models.xformers_backend import xformers_attention

log = logging.getLogger(__name__)

PREFERENCE = ("xformers", "varlen", "sdpa")
KNOWN = (*PREFERENCE, "matmul")


def attend(q: Tensor, k: Tensor, v: Tensor, packing: Packing, backend: str) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, each token seeing the tokens of its own sequence.

    q, k, v: (T, heads, head_dim), laid out as `packing` says; backend: a name that `resolve_backend` returned.
    Returns (T, heads, head_dim).
    """
    return _BACKENDS[backend](q, k, v, packing)


@lru_cache(maxsize=64)  # a decision is taken, and said, once a kind of tensor
def resolve_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> str:
    """The backend to use for `name` ("auto" or one of KNOWN) on tensors of this kind.

    Raises ValueError, saying why, when a backend is asked for by name and cannot run.
    """
    if name != "auto":
        if name not in KNOWN:
            raise ValueError(f"attention={name} is not known: choose auto, {', '.join(KNOWN)}")
        if why := unusable(name, device, dtype, head_dim):
            raise ValueError(f"attention={name} cannot be used: {why}; attention=auto chooses what can")
        return name
    refusals = []
    for candidate in ("matmul",) if device.type == "cpu" and dtype == torch.bfloat16 else PREFERENCE:
        if not (why := unusable(candidate, device, dtype, head_dim)):
            break
        refusals.append(f"{candidate}: {why}")
    because = f" ({'; '.join(refusals)})" if refusals else ""
    log.info("attention on %s in %s: %s%s", device.type, str(dtype).removeprefix("torch."), candidate, because)
    return candidate


def unusable(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why a backend cannot run on such tensors, in a few words; empty when it can."""
    if name in ("sdpa", "matmul"):
        return ""
    if device.type != "cuda":
        return f"it has no operator for {device.type.upper()} tensors"
    if name == "varlen" and dtype not in (torch.bfloat16, torch.float16):
        return f"its kernels take bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return _try_out(name, device, dtype, head_dim)


def _try_out(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Run two short sequences forward and backward: no list of versions and chips is as reliable."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            q, k, v = torch.zeros(24, 3, 2, head_dim, device=device, dtype=dtype).requires_grad_().unbind(1)
            attend(q, k, v, Packing.of([(1, 8), (2, 8)], device), name).sum().backward()
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        return f"{package} is not installed (pip install 'dinoreg[cuda]')" if package else _first_line(error)
    except (RuntimeError, NotImplementedError, AttributeError, ValueError, AssertionError) as error:
        return _first_line(error)
    return ""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    out = []
    for parts in zip(packing.split(q), packing.split(k), packing.split(v), strict=True):
        query, key, value = (part.transpose(1, 2) for part in parts)  # (b, heads, n, head_dim)
        out.append(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


def _matmul(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    out = []
    for parts in zip(packing.split(q), packing.split(k), packing.split(v), strict=True):
        query, key, value = (part.transpose(1, 2) for part in parts)  # (b, heads, n, head_dim)
        weights = ((query * q.shape[-1] ** -0.5) @ key.transpose(-2, -1)).softmax(dim=-1)
        out.append((weights @ value).transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


def _varlen(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # torch >= 2.10

    ends, longest = packing.boundaries, packing.longest
    return varlen_attn(q, k, v, ends, ends, longest, longest)  # type: ignore[return-value]


_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Packing], Tensor]] = {
    "xformers": xformers_attention,
    "varlen": _varlen,
    "sdpa": _sdpa,
    "matmul": _matmul,
}
