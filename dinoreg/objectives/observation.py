"""What a step leaves behind for the monitors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Observation:
    """Detached by-products of a step: this rank's, of its first part only. Two global crops an image, n in all.

    teacher_cls, student_cls: (n, D) after the final norm, of the same crops, which the student saw masked.
    tokens_prenorm: (n, 1 + R + N, D) of the teacher, before the final norm, [CLS, registers, patches].
    dino_targets: (rows, K) target distributions in fp32; dino_cross_entropy: the student's mean cross-entropy with
    these very targets (over pairs of global crops), so that minus their mean entropy it is KL(teacher || student).
    An objective without DINO gives iBOT's, of some masked patches.
    """

    teacher_cls: Tensor
    student_cls: Tensor
    tokens_prenorm: Tensor
    num_registers: int
    dino_targets: Tensor
    dino_cross_entropy: Tensor
