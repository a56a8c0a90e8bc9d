"""The objective's pieces against their plain forms, forward and backward, side by side in one process.

    python -m benchmarks.losses [--images 8] [--prototypes 65536] [--precision bf16] [--out FILE.json]

Plain means as the papers write it and the public trainers do it: Sinkhorn-Knopp rewrites the matrix of assignments in
each iteration; each of the 2 + 2 L pairs of a student and a teacher crop has a cross-entropy of its own, from fp32
log-softmaxes; iBOT's too. Values are compared before they are timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.plain import sinkhorn
from benchmarks.race import plain, race, show, write
from dinoreg.losses.distillation import cross_entropy, softmax_rows
from dinoreg.losses.sinkhorn import sinkhorn_offset
from dinoreg.objectives.targets import class_token_assignments
from dinoreg.parallel.mesh import Ranks, setup_ranks

LOCALS, ITERATIONS = 8, 3
TEACHER_T, STUDENT_T = 0.07, 0.1
MASKED = 40  # patches of an image, of two crops of 196: a half of the crops, 10 to 50 % of each


def our_sinkhorn(logits: Tensor, ranks: Ranks) -> Tensor:
    """The vector from which softmax makes the assignments."""
    return sinkhorn_offset([logits], TEACHER_T, ITERATIONS, ranks)


def plain_pairs(student: Tensor, local: Tensor, targets: Tensor) -> Tensor:
    """student: (B, 2, K) of global crops; local: (B, L, K); targets: (B, 2, K). The mean over all pairs."""
    total = student.new_zeros((), dtype=torch.float32)
    for teacher in range(2):
        views = [student[:, 1 - teacher], *local.unbind(1)]
        for view in views:
            total = total - (targets[:, teacher] * (view.float() / STUDENT_T).log_softmax(-1)).sum(-1).mean()
    return total / (2 + 2 * local.shape[1])


def our_pairs(student: Tensor, local: Tensor, targets: Tensor) -> Tensor:
    rows = class_token_assignments(targets.flatten(0, 1), local.shape[1])
    logits = torch.cat([student.flatten(0, 1), local.flatten(0, 1)])  # a copy, which the cross-entropy uses up
    entropy = cross_entropy(logits, list(rows.values()), STUDENT_T)
    globals_, locals_ = entropy.split([count for count, _ in rows.values()])
    pairs = 2 + 2 * local.shape[1]
    return (2 * globals_.mean() + 2 * local.shape[1] * locals_.mean()) / pairs


def plain_ibot(student: Tensor, teacher: Tensor, offset: Tensor) -> Tensor:
    """Both (M, K), logits of masked patches."""
    targets = (teacher.float() / TEACHER_T + offset).softmax(-1)
    return -(targets * (student.float() / STUDENT_T).log_softmax(-1)).sum(-1).mean()


def our_ibot(student: Tensor, teacher: Tensor, offset: Tensor) -> Tensor:
    # The cross-entropy uses its logits up; here they are read again, so it gets a copy, which counts against it.
    return cross_entropy(student.clone(), [(len(student), softmax_rows(teacher, offset, TEACHER_T))], STUDENT_T).mean()


def learning(loss: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Any]:
    """Forward and backward."""

    def once() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss().backward()

    return once


def agree(one: Tensor, other: Tensor, what: str, tolerance: float) -> None:
    """Raises SystemExit where two ways do not compute the same."""
    apart = float(((one - other).abs().max() / other.abs().max()).detach())
    if not apart <= tolerance:
        raise SystemExit(f"{what}: the two ways differ by {apart:.1e} of the largest value")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.losses", description="The objective's pieces and their plain forms."
    )
    parser.add_argument("--images", type=int, default=8, help="of this process (default: %(default)s)")
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the logits")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    ranks, console = setup_ranks(), Console()
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    torch.manual_seed(0)

    def logits(*shape: int) -> Tensor:
        return torch.randn(*shape, args.prototypes, device=ranks.device).mul_(0.3).to(dtype)

    batch = args.images
    teacher, student, local = (
        logits(2 * batch),
        logits(batch, 2).requires_grad_(),
        logits(batch, LOCALS).requires_grad_(),
    )
    masked, seen = logits(MASKED * batch).requires_grad_(), logits(MASKED * batch)
    offset = our_sinkhorn(teacher, ranks)
    targets = (teacher.float() / TEACHER_T + offset).softmax(-1)
    pairs = targets.unflatten(0, (batch, 2))
    agree(targets, sinkhorn(teacher.float(), TEACHER_T, ITERATIONS), "Sinkhorn-Knopp", 1e-3)
    agree(our_pairs(student, local, pairs), plain_pairs(student, local, pairs), "pairs of crops", 1e-4)
    agree(our_ibot(masked, seen, offset), plain_ibot(masked, seen, offset), "masked patches", 1e-4)
    both = [student, local]
    races: dict[str, dict[str, Callable[[], Any]]] = {
        f"Sinkhorn-Knopp, {ITERATIONS} iterations, {2 * batch} x {args.prototypes:,}": {
            "dinoreg": lambda: our_sinkhorn(teacher, ranks),
            "plain": lambda: sinkhorn(teacher.float(), TEACHER_T, ITERATIONS),
        },
        f"{2 + 2 * LOCALS} pairs of crops, forward and backward, {batch} images": {
            "dinoreg": learning(lambda: our_pairs(student, local, pairs), both),
            "plain": learning(lambda: plain_pairs(student, local, pairs), both),
        },
        f"masked patches, forward and backward, {MASKED * batch} x {args.prototypes:,}": {
            "dinoreg": learning(lambda: our_ibot(masked, seen, offset), [masked]),
            "plain": learning(lambda: plain_ibot(masked, seen, offset), [masked]),
        },
    }  # fmt: skip
    results = {}
    for title, ways in races.items():
        laps = race(ways, ranks.device, args.rounds)
        show(title, laps, console)
        results[title] = plain(laps)
    write(args.out, {"precision": args.precision, "images": batch, "races": results}, ranks.device)
    ranks.close()


if __name__ == "__main__":
    main()
