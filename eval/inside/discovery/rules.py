"""What to do against an offset that all patches share, and which makes every pair agree.

An offset m adds about |m|² to every dot product. A bias of the right size undoes that, and the registers paper sets
one by hand; the two rules here need no labels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

PUBLISHED, MINUS_MEAN, CENTRED = "as published", "minus the mean", "centred"


def centre(features: Tensor) -> Tensor:
    """Patches (B, N, D) less their mean in each image."""
    return features - features.mean(1, keepdim=True)


def minus_mean(products: Tensor) -> Tensor:
    """The bias (B, 1): minus the mean of the Gram matrix (B, N, N) off its diagonal; 0 for a single patch."""
    count = products.shape[-1]
    itself = products.diagonal(dim1=1, dim2=2).sum(-1)
    return -((products.sum((1, 2)) - itself) / max(1, count * (count - 1)))[:, None]


def unit(features: Tensor) -> Tensor:
    """Patches (B, N, D) of length 1."""
    return F.normalize(features, dim=-1)
