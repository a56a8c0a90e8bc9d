"""What is kept of many batches: sums that do not grow, and a few numbers an image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinoreg.models.vit import VisionTransformer
from dinoreg.parallel.mesh import Ranks
from eval.inside.decoupling.cka import FOLDS, Moments
from eval.inside.decoupling.measure import Measured, mixtures, part_names
from eval.inside.decoupling.registers import RegisterSums
from eval.inside.decoupling.split import KINDS, Choices

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Table:
    """One row an image, in the order of the images; see `Measured`. lengths: (n, R), norms of the registers.

    known, final: of every so manyth image, for the ridge regressions. right is empty without labels.
    """

    places: Tensor
    labels: Tensor
    rows: Tensor
    heads: Tensor
    clutter: Tensor
    right: Tensor
    lengths: Tensor
    known: Tensor
    final: Tensor


class Tally:
    """Of the images of this rank, and after `reduce` of all.

    blocks: those whose covariances are kept; of the last they are kept by folds of the images. start: a few images, the
    same on all ranks, from which it is seen about where the means lie. ridge: one of so many images is kept for it.
    """

    def __init__(
        self, model: VisionTransformer, choices: Choices, blocks: Sequence[int], start: Measured, ridge: int
    ) -> None:
        registers, self.last, self._ridge = model.num_registers, model.depth - 1, ridge
        names, mixed = part_names(choices, registers), mixtures(choices, registers)
        about = {block: start.parts[block].float().mean(0) for block in blocks}
        self.moments = {
            block: [Moments(names, mixed, about[block]) for _ in range(FOLDS if block == self.last else 1)]
            for block in blocks
        }
        # Nothing is read from registers where there are none.
        self.kinds = [kind for kind in KINDS if registers or kind != "registers"]
        self._columns = [KINDS.index(kind) for kind in self.kinds]
        outputs = start.points[:, 2, self._columns].float().mean(0)
        self.after = Moments(self.kinds, {kind: [kind] for kind in self.kinds}, outputs)
        self.registers = RegisterSums(registers, model.embed_dim, outputs.device)
        self._seen: list[dict[str, Tensor]] = []

    def add(self, found: Measured) -> None:
        """A batch."""
        for block, moments in self.moments.items():
            for fold, each in enumerate(moments):
                mine = found.places % len(moments) == fold
                if mine.any():
                    each.add(found.parts[block][mine.to(found.parts[block].device)])
        self.after.add(found.points[:, 2, self._columns])
        self.registers.add(found.registers, found.read)
        kept = found.places % self._ridge == 0
        here = kept.to(found.known.device)
        self._seen.append(
            {
                "places": found.places,
                "labels": found.labels,
                "rows": found.rows,
                "heads": found.heads,
                "clutter": found.clutter,
                "right": torch.zeros(len(found.places), 0) if found.right is None else found.right,
                "lengths": found.registers.norm(dim=-1).cpu(),
                "kept": found.places[kept],
                "known": found.known[here].cpu(),
                "final": found.final[here].cpu(),
            }
        )

    def reduce(self, ranks: Ranks) -> Table:
        """The sums are those of all ranks afterwards; and the rows of all, in the order of the images."""
        for moments in [*self.moments.values(), [self.after]]:
            for each in moments:
                each.reduce(ranks)
        self.registers.reduce(ranks)
        shares = [share for share in ranks.gather_objects(_joined(self._seen)) if share]
        whole = {name: torch.cat([share[name] for share in shares]) for name in shares[0]}
        order, kept = whole.pop("places").argsort(), whole.pop("kept").argsort()
        places = torch.cat([share["places"] for share in shares])[order]
        sorted_ = {name: each[kept if name in ("known", "final") else order] for name, each in whole.items()}
        return Table(places=places, **sorted_)


def _joined(seen: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([each[name] for each in seen]) for name in seen[0]} if seen else {}


def choose_blocks(depth: int, wanted: Sequence[int], room: float, parts: int, dim: int) -> list[int]:
    """The blocks whose covariances fit into `room` bytes, evenly spaced, the last among them; or those that are wanted.

    Raises IndexError for one that is not there.
    """
    if wanted:
        return sorted({range(depth)[block] for block in wanted} | {depth - 1})
    most = int(room / Moments.bytes(parts, dim)) - FOLDS - 1  # those of the last block, and of the final output
    count = max(1, min(depth, 1 + most))
    return sorted({round(at) for at in np.linspace(depth - 1, 0, count).tolist()})


def by_layer(rows: Tensor, names: Iterable[str]) -> dict[str, dict[str, list[object]]]:
    """Of each figure of an image (n, L, K): the mean and five quantiles in each layer, None where it is undefined."""
    found = {}
    for at, name in enumerate(names):
        layers = [rows[:, layer, at][rows[:, layer, at].isfinite()].double() for layer in range(rows.shape[1])]
        found[name] = {
            "mean": [float(each.mean()) if len(each) else None for each in layers],
            "quantiles": [np.quantile(each.numpy(), QUANTILES).tolist() if len(each) else None for each in layers],
            "defined": [len(each) for each in layers],
        }
    return found  # type: ignore[return-value]
