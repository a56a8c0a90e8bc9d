"""What is learnt on frozen maps: a linear layer for each patch, after batch normalisation or with the class token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoreg.parallel.mesh import Ranks
from eval.dense.frame import Maps

MOMENTUM = 0.1  # of the running statistics, as torch's
EPSILON = 1e-5
SHIFT = 0.1  # what a bin's weight is at least, before they are normalised
INITIAL_STD = 0.01


class SyncNorm(nn.Module):
    """Batch normalisation (D,) with the statistics of all ranks' tokens.

    torch's own wants GPUs, and passes gradients to its input, which frozen features do not need.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, dim: int, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))

    def forward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Tokens (..., D), all normalised with the same statistics."""
        mean, var = self._measure(parts) if self.training else (self.mean, self.var)
        scale = self.weight * (var + EPSILON).rsqrt()
        return [(part - mean) * scale + self.bias for part in parts]

    @torch.no_grad()
    def _measure(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        count = self.ranks.sum_(self.mean.new_tensor(sum(part.shape[:-1].numel() for part in parts)))
        mean = self.ranks.sum_(sum((part.flatten(0, -2).sum(0) for part in parts), torch.zeros_like(self.mean))) / count
        spread = sum(((part - mean).flatten(0, -2).square().sum(0) for part in parts), torch.zeros_like(self.mean))
        var = self.ranks.sum_(spread) / count
        self.mean.lerp_(mean, MOMENTUM)
        self.var.lerp_(var * count / (count - 1).clamp(min=1), MOMENTUM)
        return mean, var


class MaskHead(nn.Module):
    """Scores of classes from the patch tokens of the last `layers` blocks of the maps."""

    def __init__(self, dim: int, layers: int, classes: int, ranks: Ranks, seed: int) -> None:
        super().__init__()
        self.layers = layers
        self.norm = SyncNorm(layers * dim, ranks)
        self.linear = nn.Linear(layers * dim, classes)
        nn.init.normal_(self.linear.weight, std=INITIAL_STD, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.linear.bias)

    def forward(self, maps: Sequence[Maps]) -> list[Tensor]:
        """Logits (B, K, h, w) on the grid of the patches."""
        tokens = [some.tokens[:, -self.layers :, 1:].permute(0, 2, 1, 3).flatten(2) for some in maps]
        pairs = zip(self.norm(tokens), maps, strict=True)
        return [_on_grid(self.linear(normed), some) for normed, some in pairs]


class DepthHead(nn.Module):
    """Depths as the mean of uniform bins, from patch tokens and class tokens of the last `layers` blocks of the maps.

    Published heads enlarge the features `upsample` times before the linear layer. Enlarging is linear and its weights
    add up to 1, so here it comes after that layer, which gives the same for a fraction of the work.
    """

    bins: Tensor

    def __init__(
        self, dim: int, layers: int, bins: int, low: float, high: float, upsample: int, seed: int
    ) -> None:  # fmt: skip
        super().__init__()
        self.layers, self.upsample = layers, upsample
        self.linear = nn.Linear(2 * layers * dim, bins)
        generator = torch.Generator().manual_seed(seed)
        bound = (2 * layers * dim) ** -0.5  # torch's own for such a layer, but the same on every rank
        for parameter in self.linear.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        self.register_buffer("bins", torch.linspace(low, high, bins), persistent=False)

    def forward(self, maps: Sequence[Maps]) -> list[Tensor]:
        """Depths (B, 1, up * h, up * w) in metres."""
        return [self._one(some) for some in maps]

    def _one(self, maps: Maps) -> Tensor:
        tokens = maps.tokens[:, -self.layers :]
        seen = torch.cat([tokens[:, :, 1:], tokens[:, :, :1].expand_as(tokens[:, :, 1:])], dim=3)
        logits = _on_grid(self.linear(seen.permute(0, 2, 1, 3).flatten(2)), maps)
        size = [side * self.upsample for side in maps.frame.grid]
        weights = F.interpolate(logits, size=size, mode="bilinear").relu() + SHIFT
        return torch.einsum("bkhw,k->bhw", weights / weights.sum(1, keepdim=True), self.bins)[:, None]


def _on_grid(values: Tensor, maps: Maps) -> Tensor:
    """(B, N, K) -> (B, K, h, w)."""
    return values.transpose(1, 2).unflatten(2, maps.frame.grid)
