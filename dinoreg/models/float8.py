"""Matrix products in eight-bit floats, for networks so wide that these products are most of their time.

Each row of both matrices gets a scale that makes its largest value the largest of e4m3, 448 (4 bits of exponent, 3 of
mantissa: Micikevicius et al. 2022, arXiv 2209.05433, table 1), measured anew in every product. Sums stay in fp32: the
shorter ones that Hopper offers for more speed lose up to 2 % (DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinoreg.config import ConfigError
from dinoreg.models.frugal import Linear

MULTIPLE = 16  # what CUDA wants widths to be multiples of; of rows there may be any number
LARGEST = torch.finfo(torch.float8_e4m3fn).max
TINY = 1e-30  # least size of a row, so that rows of zeros stay what they are


def use_float8(network: nn.Module, precision: str, device: torch.device) -> None:
    """Let every `Linear` of it, which are those of the blocks alone, multiply so. Raises ConfigError where none can."""
    if precision != "bf16":
        raise ConfigError("needs train.precision=bf16, and here it is fp32", key="efficiency.fp8")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"not on this {name}: Ada, Hopper and later GPUs have float8", key="efficiency.fp8")
    for layer in network.modules():
        if isinstance(layer, Linear):
            layer.product = product


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of x (T, in), weight (out, in) and bias (out,) in bf16, multiplied in float8.

    So is the gradient of x. That of the weights stays in bf16: its sums run over tokens of very different sizes, and a
    scale for all of them would round the small ones away.
    """
    return _Product.apply(x, weight, bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            _multiply(grad, weight.T) if for_x else None,
            grad.T @ x if for_weight else None,
            grad.sum(0) if for_bias else None,
        )


def _multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (m, k) times the transpose of b (n, k)."""
    (a, scale_a), (b, scale_b) = _cast(a), _cast(b)
    return torch._scaled_mm(a, b.T, scale_a, scale_b.T, bias, out_dtype=torch.bfloat16)


def _cast(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, k) in e4m3, and what its rows are to be multiplied by (n, 1). An infinity makes its row NaN."""
    scale = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True, dtype=torch.float32).clamp_min(TINY) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn).contiguous(), scale
