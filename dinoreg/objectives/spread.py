"""KoLeo on class tokens, also when its groups are larger than the part of a batch that fits into memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinoreg.losses.koleo import koleo_loss
from dinoreg.parallel.mesh import Ranks

GLOBAL_CROPS = 2


def koleo_of_crops(cls: Tensor, group: int, ranks: Ranks) -> Tensor:
    """Mean over first and second global crops of KoLeo among the images. cls: (2 b, D), image by image.

    The two are kept apart: a crop's nearest neighbour would otherwise be the other crop of its image, which DINO pulls
    closer.
    """
    crops = cls.unflatten(0, (-1, GLOBAL_CROPS)).unbind(1)
    return torch.stack([koleo_loss(crop, group, ranks) for crop in crops]).mean()


@dataclass
class Spread:
    """KoLeo of all parts of this rank's share: its value, and its gradient by the class tokens of each part."""

    value: Tensor
    gradients: Sequence[Tensor]  # (2 b, D) in fp32

    @staticmethod
    def of(tokens: Sequence[Tensor], group: int, ranks: Ranks) -> Spread:
        """tokens: class tokens (2 b, D) of each part, computed without a graph."""
        with torch.enable_grad():
            leaves = [part.detach().float().requires_grad_() for part in tokens]
            value = koleo_of_crops(torch.cat(leaves), group, ranks)
            return Spread(value.detach(), torch.autograd.grad(value, leaves))

    def follow(self, cls: Tensor, index: int) -> Tensor:
        """KoLeo's value, with the gradient that part `index` has to add to the mean over parts.

        cls: the same tokens as those of this part before, now with a graph.
        """
        surrogate = (cls.float() * self.gradients[index]).sum() * len(self.gradients)
        return self.value + surrogate - surrogate.detach()
