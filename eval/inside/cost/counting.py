"""Parameters and operations of a backbone as they would be with other numbers of registers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from dinoreg.models.flops import blocks_flops, embedding_flops, traced_backbone_flops
from dinoreg.models.vit import ModelConfig, build_vit


@dataclass(frozen=True)
class Cost:
    """Of a backbone with so many registers. counted, formula: operations that a forward pass of one image takes.

    counted: by fvcore, in a trace of the real modules; formula: from the layers' shapes, to check it. One
    multiplication with its addition counts as two operations.
    """

    registers: int
    parameters: int
    counted: float
    formula: float


def cost_with(model: ModelConfig, registers: int, size: int) -> Cost:
    """This architecture with that many registers, on square images of `size` pixels, a multiple of the patch size."""
    there = replace(model, num_registers=registers, image_size=size)
    patches = (size // model.patch_size) ** 2
    formula = embedding_flops(there, patches) + blocks_flops(there, patches)
    # The learnt grid of positions is that of the network, whatever size its images have.
    parameters = count_parameters(replace(model, num_registers=registers))
    return Cost(registers, parameters, traced_backbone_flops(there, [(1, size)]), formula)


def count_parameters(model: ModelConfig) -> int:
    """All of the backbone's, with the mask token, which is only used in training."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_vit(model, drop_path=False).parameters())


def formula_increase(model: ModelConfig, registers: Iterable[int], size: int) -> list[float]:
    """What the formula says: operations more than without registers, as shares of those."""
    patches = (size // model.patch_size) ** 2

    def operations(number: int) -> float:
        there = replace(model, num_registers=number)
        return embedding_flops(there, patches) + blocks_flops(there, patches)

    return [operations(number) / operations(0) - 1 for number in registers]
