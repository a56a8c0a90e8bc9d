"""One row of numbers an image, brought together from all ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.parallel.mesh import Ranks


def in_order(ranks: Ranks, shares: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """(places (b,), rows (b, ...)) of each batch of this rank -> the rows (n, ...) of all images in the images' order.

    The same on every rank, whatever their number. Images that could not be read have no row.
    """
    mine = [(places.cpu(), rows.cpu()) for places, rows in shares]
    found = [pair for share in ranks.gather_objects(mine) for pair in share]
    if not found:
        raise ConfigError("no image could be read", "--data")
    places, rows = (torch.cat([pair[at] for pair in found]) for at in (0, 1))
    return rows[places.argsort()]
