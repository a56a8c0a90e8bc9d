"""KoLeo: pushes each feature away from its nearest neighbour."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.parallel.mesh import Ranks

# Distance below which two unit vectors count as one: more than fp32's rounding of a difference (1e-7), less than
# any distance that a network which tells images apart produces. DINOv2 adds 1e-8 to the distance.
EPS = 1e-6


def koleo_loss(features: Tensor, group: int, ranks: Ranks) -> Tensor:
    """-mean_i log |x_i - x_nn(i)| of L2-normalised features (Sablayrolles et al. 2019, eq. 2; DINOv2, section 4).

    Neighbours are sought among the images of the same group, wherever they lie: the mean over ranks is the loss of the
    global batch for any number of ranks. The logarithm's argument is sqrt(distance^2 + EPS^2), which leaves value and
    gradient finite (the gradient is zero) where two images or all of them have one and the same feature.

    Args:
        features: (n, D), this rank's consecutive share of the images, any float dtype; computed in fp32.
        group: consecutive images of the global batch that form a group; 0 is all of them.

    Returns:
        Mean over this rank's images, 0 where groups have a single image. When groups cross ranks, features are
        gathered, and the gradient includes what the other ranks' images ask of this rank's.

    Raises:
        ValueError: when groups do not fill the global batch.
    """
    own = F.normalize(features.float(), dim=-1, eps=EPS)
    spread = groups_straddle(len(own), group, ranks.world)
    everyone = ranks.gather(own) if spread else own
    if len(everyone) < 2 or group == 1:
        return own.sum() * 0
    nearest = _nearest(own.detach(), everyone.detach(), ranks.rank * len(own) if spread else 0, group)
    squared = (own - everyone.index_select(0, nearest)).square().sum(-1)
    return -0.5 * (squared + EPS**2).log().mean()


def groups_straddle(share: int, group: int, pieces: int) -> bool:
    """Whether groups of `group` images cross the borders of `pieces` pieces (ranks, parts) of `share` images each."""
    if group and share * pieces % group:
        raise ValueError(f"groups of {group} images do not fill a batch of {share * pieces}")
    return pieces > 1 and (not group or share % group != 0)


def _nearest(own: Tensor, everyone: Tensor, first: int, group: int) -> Tensor:
    """For each of `own`, which are rows first, first + 1, ... of `everyone`, the row of its nearest other one."""
    similarity = own @ everyone.T
    rows = torch.arange(len(everyone), device=own.device)
    mine = rows[first : first + len(own)]
    excluded = mine[:, None] == rows
    if group:
        excluded |= (mine // group)[:, None] != rows // group
    return similarity.masked_fill_(excluded, -torch.inf).argmax(dim=-1)
