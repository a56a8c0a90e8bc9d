"""The parts of a transformer block, working on packed (T, D) tokens. Parameter names are those of DINOv2's files."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoreg.models.attention import attend
from dinoreg.models.frugal import Linear, add_rows, linear_of
from dinoreg.models.packing import KeptRows, Packing
from dinoreg.models.rotary import rotate


def init_linear(layer: nn.Linear) -> None:
    """Weights normal with std 0.02 cut at +-2 (in effect uncut), bias zero: the initialisation of DINO and DINOv2."""
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class Attention(nn.Module):
    """Multi-head self-attention within each sequence."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def query_key_value(
        self, x: Tensor, packing: Packing, norm: nn.Module | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, D), through `norm` if given -> three (T, heads, head_dim), two turned where positions are rotary."""
        qkv = self.qkv(x) if norm is None else linear_of(norm, x, self.qkv)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        if packing.turns is not None:
            q, k = rotate(q, packing.turns), rotate(k, packing.turns)
        return q, k, v

    def forward(
        self, x: Tensor, packing: Packing, backend: str, norm: nn.Module | None = None, gain: Tensor | None = None
    ) -> Tensor:
        """x (T, D), through `norm` first -> (T, D), each channel times `gain` (D,), where these are given."""
        q, k, v = self.query_key_value(x, packing, norm)
        return linear_of(None, attend(q, k, v, packing, backend).flatten(1), self.proj, gain)

    def init_weights(self) -> None:
        init_linear(self.qkv)
        init_linear(self.proj)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), CLIP's approximation of GELU (Hendrycks & Gimpel, arXiv 1606.08415)."""
    return x * torch.sigmoid(1.702 * x)


class Mlp(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int, quick: bool = False) -> None:
        super().__init__()
        self.activation = quick_gelu if quick else F.gelu
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor, norm: nn.Module | None = None, gain: Tensor | None = None) -> Tensor:
        """x (T, D), through `norm` first -> (T, D), each channel times `gain` (D,), where these are given."""
        return linear_of(self.activation, linear_of(norm, x, self.fc1), self.fc2, gain)

    def init_weights(self) -> None:
        init_linear(self.fc1)
        init_linear(self.fc2)


class SwiGLU(nn.Module):
    """w3(silu(x w1) * x w2), w1 and w2 in one matrix (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = Linear(dim, 2 * hidden)
        self.w3 = Linear(hidden, dim)

    @staticmethod
    def hidden_size(mlp_hidden: int) -> int:
        """Two thirds of the MLP's width, rounded up to a multiple of 8: three matrices cost what the MLP's two do."""
        return (mlp_hidden * 2 // 3 + 7) // 8 * 8

    @staticmethod
    def activation(hidden: Tensor) -> Tensor:
        """silu of one half of the channels times the other half."""
        gate, value = hidden.chunk(2, dim=-1)
        return F.silu(gate) * value

    def forward(self, x: Tensor, norm: nn.Module | None = None, gain: Tensor | None = None) -> Tensor:
        """As of `Mlp`."""
        return linear_of(self.activation, linear_of(norm, x, self.w12), self.w3, gain)

    def init_weights(self) -> None:
        init_linear(self.w12)
        init_linear(self.w3)


class LayerScale(nn.Module):
    """A learnt gain for each channel of a residual branch (CaiT, section 2)."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma

    def init_weights(self) -> None:
        nn.init.constant_(self.gamma, self.initial)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, dim: int, num_heads: int, ffn: Mlp | SwiGLU, layerscale: float, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.ls1: nn.Module = LayerScale(dim, layerscale) if layerscale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = ffn
        self.ls2: nn.Module = LayerScale(dim, layerscale) if layerscale else nn.Identity()

    def forward(
        self,
        x: Tensor,
        packing: Packing,
        backend: str,
        kept: KeptRows | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """x (T, D) -> (T, D). With `kept`, only those rows go through the branches; the others pass unchanged.

        rows: (m,), those that somebody wants, after the last block: then the result is (m, D), and the feed-forward
        sees no others.
        """
        if kept is None:
            x = x + self.attention_branch(x, packing, backend)
            x = x if rows is None else x.index_select(0, rows)
            return x + self.ffn_branch(x)
        branch = self.attention_branch(x.index_select(0, kept.attention), kept.packing, backend)
        x = add_rows(x, kept.attention, branch, kept.gain)
        if rows is not None:  # how many of them are kept only the device knows: all go through, the others weigh 0
            gain = kept.gain.new_zeros(len(x), 1).index_copy(0, kept.ffn, kept.gain).index_select(0, rows)
            x = x.index_select(0, rows)
            return x + gain * self.ffn_branch(x)
        branch = self.ffn_branch(x.index_select(0, kept.ffn))
        return add_rows(x, kept.ffn, branch, kept.gain)

    def attention_branch(self, x: Tensor, packing: Packing, backend: str) -> Tensor:
        if x.requires_grad:
            return self.attn(x, packing, backend, self.norm1, _gain(self.ls1))
        return self.ls1(self.attn(self.norm1(x), packing, backend))

    def ffn_branch(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            return self.mlp(x, self.norm2, _gain(self.ls2))
        return self.ls2(self.mlp(self.norm2(x)))

    def init_weights(self) -> None:
        self.norm1.reset_parameters()
        self.norm2.reset_parameters()
        for part in (self.attn, self.mlp, self.ls1, self.ls2):
            if not isinstance(part, nn.Identity):
                part.init_weights()  # type: ignore[operator]


def _gain(layerscale: nn.Module) -> Tensor | None:
    return layerscale.gamma if isinstance(layerscale, LayerScale) else None
