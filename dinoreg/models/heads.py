"""Projection heads onto prototypes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinoreg.chunks import row_chunks, wide
from dinoreg.config import ConfigError
from dinoreg.models.layers import init_linear

TINY = 1e-12  # least length that a direction is divided by, as in F.normalize


@dataclass
class HeadConfig:
    """An MLP, L2-normalised, against unit-norm prototypes (DINO, section 3.2)."""

    prototypes: int = 65536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    layers: int = 3
    train_scale: bool = True  # DINOv2 leaves each prototype's length (weight_g) trainable; DINO froze it at 1

    def check(self) -> None:
        for key in ("prototypes", "hidden_dim", "bottleneck_dim", "layers"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{getattr(self, key)} is too small: at least 1 is needed", key=key)


class Prototypes(nn.Module):
    """Cosine of each feature with each prototype, times the prototype's length.

    The parameters keep the names that torch's old weight_norm gave them, as in DINOv2's checkpoints: prototype k is
    weight_g[k] * weight_v[k] / |weight_v[k]|.
    """

    def __init__(self, dim: int, count: int, train_scale: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=train_scale)
        self.weight_v = nn.Parameter(torch.empty(count, dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (n, bottleneck), not normalised -> logits (n, K).

        Lengths are taken in fp32 (in half precision the squares of small features vanish); the product runs in the
        parameters' dtype, because it is the one matrix product of this size in a step.
        """
        unit = F.normalize(x.float(), dim=-1)
        return F.linear(unit.to(self.weight_v.dtype), _WeightNorm.apply(self.weight_v, self.weight_g))

    def init_weights(self) -> None:
        """Directions uniform in a cube as nn.Linear's, lengths 1."""
        nn.init.ones_(self.weight_g)
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))


class _WeightNorm(torch.autograd.Function):
    """g v / |v| of each row, in v's dtype, computed in at least fp32 (Salimans & Kingma 2016, eq. 2 and 3).

    Written as torch's operations, this takes several fp32 copies of the largest matrix of a small network, forward and
    backward; here it is made piece by piece.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor) -> Tensor:
        """v (K, D), g (K, 1)."""
        out = torch.empty_like(v)
        inverse = torch.empty_like(g, dtype=wide(v.dtype))
        for start, stop in row_chunks(v):
            rows = v[start:stop].to(inverse.dtype)
            inverse[start:stop] = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(TINY).reciprocal()
            out[start:stop] = rows * (inverse[start:stop] * g[start:stop])
        ctx.save_for_backward(v, g, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        v, g, inverse = ctx.saved_tensors
        for_v, for_g = torch.empty_like(v), torch.empty_like(g)
        for start, stop in row_chunks(v):
            inv = inverse[start:stop]
            direction, rows = v[start:stop] * inv, grad[start:stop].to(inv.dtype)
            along = torch.linalg.vecdot(rows, direction)[:, None]  # what changes the length alone
            for_g[start:stop] = along
            for_v[start:stop] = torch.addcmul(rows, direction, along, value=-1).mul_(inv * g[start:stop])
        return for_v, for_g


class PrototypeHead(nn.Module):
    """From a backbone's token to logits over prototypes.

    `mlp` (in_dim -> bottleneck) and `last_layer` (bottleneck -> K) may also be called one after the other, so that the
    few wide logits can be made piece by piece.
    """

    def __init__(self, in_dim: int, cfg: HeadConfig) -> None:
        super().__init__()
        widths = [in_dim, *[cfg.hidden_dim] * (cfg.layers - 1), cfg.bottleneck_dim]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = Prototypes(cfg.bottleneck_dim, cfg.prototypes, cfg.train_scale)

    def forward(self, x: Tensor) -> Tensor:
        """x (n, in_dim) -> logits (n, K)."""
        return self.last_layer(self.mlp(x))

    def init_weights(self) -> None:
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                init_linear(layer)
        self.last_layer.init_weights()
