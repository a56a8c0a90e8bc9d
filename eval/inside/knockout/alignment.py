"""Do patches say what CLS says? (D6)"""

from __future__ import annotations

import torch
from torch import Tensor

from eval.backbone import Backbone
from eval.inside.frozen import Frozen


def alignment(backbone: Backbone, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine (B, N) of each patch with CLS, patches (B, N, D) and CLS (B, D), all after the final norm, fp32."""
    tokens = backbone.layers(images, [-1])[0]
    patches, cls = tokens.patches.float(), tokens.cls.float()
    return torch.cosine_similarity(patches, cls[:, None], dim=-1), patches, cls


def named(frozen: Frozen, patches: Tensor) -> Tensor:
    """The class that a classifier of class tokens gives to each patch: (B, N, D) -> (B, N)."""
    return frozen.predict(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
