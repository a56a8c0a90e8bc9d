"""DINO's centering: the alternative to Sinkhorn-Knopp that needs no iterations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dinoreg.chunks import row_chunks
from dinoreg.losses.sinkhorn import Tile, read_tile
from dinoreg.parallel.mesh import Ranks


def centering_offset(center: Tensor, temperature: float) -> Tensor:
    """The offset (K,) for which softmax(logits / temperature + offset) is DINO's softmax((logits - center) / T)."""
    return -center / temperature


@torch.no_grad()
def update_center_(center: Tensor, tiles: Sequence[Tile], momentum: float, ranks: Ranks) -> None:
    """Move `center` (K,) towards the mean logits of all tiles and ranks (DINO, eq. 4), in place.

    To be called after the step's targets were made: a sample then never helps to centre itself, and targets do not wait
    for a reduction. That is DINO's order; DINOv2 has the same lag. Every token counts the same here, whereas DINOv2
    averages the means of the ranks for iBOT, which gives a masked patch on a rank with few of them more weight and
    makes the center depend on how many ranks there are.
    """
    sums = torch.zeros(len(center) + 1, dtype=torch.float64, device=center.device)  # logits, and the number of them
    for tile in tiles:
        logits = read_tile(tile)
        for start, stop in row_chunks(logits):  # a CPU sums in fp32 only what it has converted whole
            sums[:-1] += logits[start:stop].sum(0, dtype=center.dtype)
        sums[-1] += len(logits)
    ranks.sum_(sums)
    mean = sums[:-1] / sums[-1].clamp_min(1)
    # Without a token anywhere (iBOT with nothing masked) the center stays where it is.
    pull = (1 - momentum) * (sums[-1] > 0)
    center.add_((pull * (mean - center)).to(center.dtype))
