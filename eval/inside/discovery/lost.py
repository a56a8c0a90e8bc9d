"""LOST (Siméoni et al., BMVC 2021, section 3) on the Gram matrices of patches, with many biases at once.

The object is thought to cover less of the image than the background: its patches agree with few others. The patch
that agrees with the fewest is the seed; those among the k least connected that agree with it are its company; what
agrees with seed and company together is the object, and the box is drawn around the part that touches the seed. Two
patches agree where their dot product plus the bias is positive. As in the authors' code, no patch counts as agreeing
with itself in the degrees. Where degrees are equal the patch that comes first, row by row, has the lower one; in
their code that is left to how the device sorts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoreg.config import ConfigError

COMPANY = 100  # least connected patches among which the seed looks for company, whatever the number of patches


@dataclass(frozen=True)
class Maps:
    """What LOST makes of B images, with S biases each, on grids of N patches.

    degrees: int64 (B, S, N), how many others each agrees with; seeds: int64 (B, S); similarity: (B, S, N), dot
    product of each with the seed, plus the bias; expansion: (B, S, N), summed over seed and company; the object is
    where it is positive.
    """

    degrees: Tensor
    seeds: Tensor
    similarity: Tensor
    expansion: Tensor

    @property
    def masks(self) -> Tensor:
        """bool (B, S, N)."""
        return self.expansion > 0


def gram(features: Tensor) -> Tensor:
    """Dot products (B, N, N) of patches (B, N, D)."""
    return features @ features.mT


def expand(products: Tensor, biases: Tensor, company: int = COMPANY) -> Maps:
    """LOST without the box. products: Gram matrices (B, N, N); biases: (B, S), added to every entry."""
    count = products.shape[-1]
    degrees = torch.stack([_degrees(products, bias) for bias in biases.unbind(1)], dim=1)
    # One number that holds the degree and, for equal ones, the place.
    order = degrees * count + torch.arange(count, device=products.device)
    seeds = order.argmin(-1)
    last = order.kthvalue(min(company, count), dim=-1, keepdim=True).values
    similarity = products.gather(1, seeds[..., None].expand(-1, -1, count)) + biases[..., None]
    members = ((order <= last) & (similarity > 0)).to(products.dtype)
    expansion = members @ products + biases[..., None] * members.sum(-1, keepdim=True)
    return Maps(degrees, seeds, similarity, expansion)


def _degrees(products: Tensor, bias: Tensor) -> Tensor:
    """int64 (B, N) for one bias an image (B,)."""
    # a + b > 0 is a > -b also in rounded arithmetic, and the sum need not be made; int32 halves the time.
    agree = (products > -bias[:, None, None]).sum(-1, dtype=torch.int32)
    itself = products.diagonal(dim1=1, dim2=2) > -bias[:, None]
    return agree.long() - itself.long()


def boxes_around(masks: Tensor, seeds: Tensor, grid: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Boxes (..., 4) around the 4-connected parts that hold the seeds, and whether a seed was outside of its mask.

    masks: bool (..., N); seeds: int64 (...). Boxes are left, top, right, bottom in patches, the last two just outside.
    A seed outside, which a bias makes possible and for which the authors' code has no answer, has its own patch as
    box.
    """
    lead, count = masks.shape[:-1], masks.shape[-1]
    flat = masks.reshape(-1, count).cpu().numpy()
    where = seeds.reshape(-1, 1).cpu().numpy()
    outside = ~np.take_along_axis(flat, where, 1)[:, 0]
    parts = _label()(flat.reshape(-1, *grid), _CROSS)[0].reshape(-1, count)
    own = parts == np.take_along_axis(parts, where, 1)
    own[outside] = np.arange(count) == where[outside]
    own = own.reshape(-1, *grid)
    left, right = _span(own.any(1))
    top, bottom = _span(own.any(2))
    return np.stack([left, top, right, bottom], axis=1).reshape(*lead, 4), outside.reshape(lead)


# Neighbours above, below, left and right; none in the masks before and after.
_CROSS = np.array([np.zeros((3, 3)), [[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.zeros((3, 3))], dtype=bool)


def _span(line: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first true place of each line (n, length), and the one after the last."""
    return line.argmax(1), line.shape[1] - line[:, ::-1].argmax(1)


def _label():  # type: ignore[no-untyped-def]  # scipy has no types
    try:
        from scipy.ndimage import label  # type: ignore[import-untyped]
    except ImportError:
        raise ConfigError("finding connected patches needs the package scipy: pip install 'dinoreg[eval]'") from None
    return label
