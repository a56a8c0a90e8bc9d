"""One training image a class, and what each part of CLS still tells about the class (section 3.3, figure 3b).

The paper does not say which classifier it took. Ours is the nearest training image by cosine, which with one image a
class is the nearest class mean too, and has nothing to tune.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eval.metrics import bootstrap, share_interval
from eval.results import Score

TOPS = (1, 5)


def draw_shots(labels: Tensor, draws: int, num_classes: int, seed: int = 0) -> NDArray[np.int64]:
    """Places (draws, K) of a training image of each class in each draw; again the same where a class has too few.

    -1 where a class has none.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled = labels.numpy()[order]
    members = [order[shuffled == number] for number in range(num_classes)]
    return np.array([[own[draw % len(own)] if len(own) else -1 for own in members] for draw in range(draws)])


def build_prototypes(found: Mapping[int, Tensor], shots: NDArray[np.int64], like: Tensor) -> Tensor:
    """(draws, K, 3, D) of length 1, from (3, D) by place: CLS of whole outputs at each of POINTS.

    Where an image could not be read, the class's image of another draw stands in. like: (3, D), for type and device.
    """
    table = like.new_zeros(*shots.shape, *like.shape)
    for draw, number in np.ndindex(*shots.shape):
        others = [int(shots[(draw + more) % len(shots), number]) for more in range(len(shots))]
        readable = next((place for place in others if place in found), None)
        if readable is not None:
            table[draw, number] = found[readable].to(like)
    return F.normalize(table, dim=-1)


def guess(points: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
    """Whether the class is among the nearest: (B, draws, 3, 4, 2), by POINTS, KINDS and TOPS, fp32.

    points: (B, 3, 4, D); prototypes: (draws, K, 3, D), of whole outputs; labels: (B,). Among classes that are equally
    near, the guess is by lot, and what is told is its chance to be right: outputs that are all 0 know nothing.
    A class without a prototype, whose row is 0, comes after all others.
    """
    near = torch.einsum("bpkd,ncpd->bnpkc", F.normalize(points, dim=-1), prototypes)
    near = near.masked_fill(~prototypes.any(-1).mT[:, :, None], -torch.inf)
    wanted = labels[:, None, None, None, None].expand(*near.shape[:-1], 1)
    own = near.gather(-1, wanted)
    nearer, equal = (near > own).sum(-1), (near == own).sum(-1)
    return torch.stack([((top - nearer) / equal).clamp(0, 1) for top in TOPS], dim=-1).float()


def class_score(values: Tensor, labels: Tensor) -> Score:
    """The mean (n,) in percent. The interval is that of other classes, whose images share their training image.

    Where all classes are found alike a bootstrap over them has no width: it is at least Wilson's over images.
    """
    classes = torch.zeros(int(labels.max()) + 1, 2, dtype=torch.float64)
    classes.index_add_(0, labels, torch.stack([values.double(), torch.ones(len(values), dtype=torch.float64)], dim=1))
    there = classes[classes[:, 1] > 0]
    low, high = bootstrap(there, lambda sums: 100 * sums[:, 0] / sums[:, 1])
    least, most = share_interval(round(float(values.sum())), len(values))
    return Score(100 * float(values.double().mean()), min(low, least), max(high, most), per_image=100 * values.float())
