"""Rotary position embeddings of patches in two dimensions (RoFormer, arXiv 2104.09864; axial, as in DINOv3).

A patch lies at the centre of its cell in a square from -1 to 1 on both axes, whatever the image's size. Of a head's
channels one half is turned by angles that grow with the row, the other with the column, each pair of channels at a
frequency of its own. The class token and registers lie nowhere and are not turned.
"""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor


def rotations(
    grid: tuple[int, int], before: int, head_dim: int, base: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Cosines and sines of one image's tokens: (before + h * w, 2, head_dim), the first `before` of them unturned."""
    axes = [(2 * torch.arange(n, device=device, dtype=dtype) + 1) / n - 1 for n in grid]
    places = torch.cartesian_prod(*axes)  # (h * w, 2), row by row
    quarter = head_dim // 4
    periods = base ** (torch.arange(quarter, device=device, dtype=dtype) / quarter)
    angles = (2 * pi * places[:, :, None] / periods).flatten(1)  # (h * w, head_dim / 2)
    angles = torch.cat([angles.new_zeros(before, head_dim // 2), angles]).repeat(1, 2)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """x (T, heads, head_dim), each token turned by its row of `turns` (T, 2, head_dim).

    Channel i is paired with channel i + head_dim / 2.
    """
    cos, sin = turns[:, None].unbind(2)
    one, other = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-other, one], dim=-1) * sin).to(x.dtype)
