"""What is measured of one batch, in one pass through the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoreg.models.vit import VisionTransformer
from eval.inside.decoupling.clutter import clutter
from eval.inside.decoupling.oneshot import guess
from eval.inside.decoupling.split import GROUPS, Choices, Split, branch_outputs, outputs, split_cls
from eval.inside.look import Batch
from eval.inside.walk import walk

# What is kept of each image and block, fp32. Shares of attention; L2 norms; cosines to the branch and to the last CLS.
ROW = (
    *(f"share_{group}" for group in GROUPS),
    *(f"norm_{group}" for group in GROUPS),
    "norm_entering",
    "norm_skip",
    *(f"cosine_{group}" for group in GROUPS),
    "cosine_last",
)
OF_REGISTERS = [ROW.index(f"{kind}_registers") for kind in ("share", "norm", "cosine")]


@dataclass(frozen=True)
class Measured:
    """Of B images and L blocks. places: int64 (B,), on the host, as all that is per image and small.

    rows: (B, L, K), K as in ROW, NaN where undefined. parts: by block, (B, P, D) in the order of `parts_of`.
    points: see `outputs`. registers: (B, R, D) as they enter the last block; read: the same after its norm.
    known: (B, 3 + R, D), what the final CLS is rebuilt from: attention-weighted and plain mean of the patches, CLS and
    the registers, as the last block reads them; final: (B, D), CLS after the final norm.
    heads: (B, heads, 3), shares in the last block. right: see `guess`; None without prototypes. clutter: (B, 2).
    attention: (B, N) of CLS over patches in the last block, mean over heads.
    """

    places: Tensor
    labels: Tensor
    rows: Tensor
    parts: Mapping[int, Tensor]
    points: Tensor
    registers: Tensor
    read: Tensor
    known: Tensor
    final: Tensor
    heads: Tensor
    right: Tensor | None
    clutter: Tensor
    attention: Tensor


def measure(
    model: VisionTransformer,
    batch: Batch,
    choices: Choices,
    blocks: Sequence[int],
    prototypes: Tensor | None = None,
) -> Measured:
    """One pass. blocks: those whose parts are wanted. prototypes: see `guess`."""
    registers = model.num_registers
    rows, leaving, parts = [], [], {}
    for step in walk(model, batch.images):
        split = split_cls(step, registers)
        rows.append(_row(split, choices, registers))
        leaving.append(step.leaving[:, 0].float())
        if step.index in blocks:
            parts[step.index] = parts_of(split, choices, registers)
    last = F.cosine_similarity(torch.stack(leaving, dim=1), leaving[-1][:, None], dim=-1)
    points = outputs(split, step.block, model.norm, choices)
    read = step.block.norm1(step.entering).float()
    weights, final = split.weights[..., 1 + registers :].mean(1), model.norm(step.leaving[:, 0]).float()
    # Only the network may be in bf16: what is told of it would be rounded, pixels and likeness to classes too.
    with torch.autocast(points.device.type, enabled=False):
        return Measured(
            batch.places,
            batch.labels,
            torch.cat([torch.stack(rows, dim=1), last[..., None]], dim=-1).float().cpu(),
            parts,
            points,
            step.entering[:, 1 : 1 + registers].float(),
            read[:, 1 : 1 + registers],
            _known(read, weights, registers),
            final,
            split.shares.float().cpu(),
            None if prototypes is None else guess(points, prototypes, batch.labels.to(points.device)).cpu(),
            clutter(batch.pixels).cpu(),
            weights.float(),
        )


def part_names(choices: Choices, registers: int) -> list[str]:
    """What `parts_of` gives: each group's part, CLS as it enters, and the renormalised parts where these are wanted."""
    groups = [group for group in GROUPS if registers or group != "registers"]
    return [*groups, "entering", *(f"{group}_alone" for group in groups if choices.renormalise)]


def parts_of(split: Split, choices: Choices, registers: int) -> Tensor:
    """(B, P, D), in the order of `part_names`; the bias is in none."""
    there = [at for at, group in enumerate(GROUPS) if registers or group != "registers"]
    kept = [split.parts[:, there], split.entering[:, None]]
    return torch.cat([*kept, split.alone[:, there]] if choices.renormalise else kept, dim=1)


def mixtures(choices: Choices, registers: int) -> dict[str, list[str]]:
    """Representations of CLS as sums of parts.

    branch: all that attention adds; a group's name: that group alone; attended: the stream after attention; skip: what
    is in it without patches and registers (equation 6); GROUP+residual: the stream, had only that group been read.
    """
    groups = [group for group in GROUPS if registers or group != "registers"]
    kept = {group: f"{group}_alone" if choices.renormalise else group for group in groups}
    found = {"branch": [group for group in groups if choices.own or group != "cls"]}
    found |= {group: [kept[group]] for group in groups}
    found |= {"attended": [*groups, "entering"], "skip": ["cls", "entering"]}
    return found | {f"{group}+residual": [kept[group], "entering"] for group in groups}


def _row(split: Split, choices: Choices, registers: int) -> Tensor:
    """(B, K - 1), all of ROW but its last."""
    shares, entering = split.shares.mean(1), split.entering
    skip = split.parts[:, GROUPS.index("cls")] + entering
    made = branch_outputs(split, choices)
    norms = [split.parts.norm(dim=-1), entering.norm(dim=-1, keepdim=True), skip.norm(dim=-1, keepdim=True)]
    row = torch.cat([shares, *norms, cosine(made[:, 1:], made[:, :1])], dim=-1)
    if not registers:
        row[:, OF_REGISTERS] = torch.nan
    return row


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Of vectors (..., D); NaN where one is 0."""
    products = (one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1))
    return products.clamp(-1, 1)


def _known(read: Tensor, weights: Tensor, registers: int) -> Tensor:
    patches, weights = read[:, 1 + registers :], weights.float()
    # Where nothing is read from patches, their weighted mean is 0 and tells nothing.
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    weighted = torch.einsum("bn,bnd->bd", weights, patches)
    return torch.cat([torch.stack([weighted, patches.mean(1), read[:, 0]], dim=1), read[:, 1 : 1 + registers]], dim=1)
