"""How much arithmetic a step of training costs, from the formulas of the layers and, as a check, from a trace.

What counts as an operation is said in dinoreg/models/flops.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from dinoreg.data.masks import block_counts, block_size
from dinoreg.models.flops import analyse, blocks_flops, embedding_flops, feed_forward_flops, traced_backbone_flops
from dinoreg.models.heads import HeadConfig, PrototypeHead
from dinoreg.models.vit import ModelConfig
from dinoreg.train.recipe import RunConfig

# bf16 without sparsity, operations a second, from the vendors' data sheets; the first pattern that fits counts.
_PEAKS = (
    (r"GB200|B200|GB300|B300", 2250e12),
    (r"GH200|H200|H100.*(SXM|80GB HBM3)|H800", 989e12),
    (r"H100.*NVL", 835e12),
    (r"H100", 756e12),  # PCIe
    (r"A100|A800", 312e12),
    (r"L40S", 362e12),
    (r"L40", 181e12),
    (r"L4\b", 121e12),
    (r"A40|A6000", 150e12),
    (r"A10G", 70e12),
    (r"A10\b", 125e12),
    (r"V100", 125e12),  # fp16: it has no bf16
    (r"T4\b", 65e12),  # fp16
    (r"RTX 5090", 210e12),
    (r"RTX 4090", 165e12),
    (r"RTX 3090", 71e12),
)


def peak_flops(device: torch.device) -> float | None:
    """The device's bf16 peak in operations a second, or None where unknown (CPUs: it depends on too much).

    A run with `efficiency.fp8` is held against it too, although its blocks could reach twice as much: utilisations stay
    comparable, show what float8 gained, and may exceed 1.
    """
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """The bf16 peak of a GPU by its name, None where unknown: better no utilisation than a wrong one."""
    if "MIG" in name:  # a slice of a GPU
        return None
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, name)), None)


def step_flops(config: RunConfig) -> tuple[float, float]:
    """(nominal, executed) operations that training spends on one source image.

    The student goes forward and backward (3 times its forward) through all crops, the teacher forward through the
    global ones. "Executed" leaves out the rows that drop path skips and those of the last feed-forward that no loss
    looks at; recomputed activations count in neither.
    """
    crops, kept = sequences(config), kept_share(config.model)
    nominal = 3 * _forward_flops(config, crops) + _forward_flops(config, crops[:1])
    return nominal, 3 * _executed_flops(config, crops, kept) + teacher_flops(config)


def teacher_flops(config: RunConfig) -> float:
    """Executed by the teacher for one source image; the rest of a step is the student's, one third of it forward."""
    return _executed_flops(config, sequences(config)[:1], 1.0)


def _forward_flops(config: RunConfig, crops: Sequence[tuple[int, int]], kept: float = 1.0) -> float:
    """Of one source image, with this share of the rows of residual branches."""
    embedding = sum(count * embedding_flops(config.model, patches) for count, patches in crops)
    blocks = sum(count * blocks_flops(config.model, patches) for count, patches in crops)
    return embedding + kept * blocks + _head_flops(config, sum(count for count, _ in crops))


def _executed_flops(config: RunConfig, crops: Sequence[tuple[int, int]], kept: float) -> float:
    """As above, where the last feed-forward sees the class tokens and the masked patches alone, dropped or not."""
    seen = sum(count * (1 + config.model.num_registers + patches) for count, patches in crops)
    wanted = sum(count for count, _ in crops) + masked_patches(config)
    last_kept = 1 - config.model.drop_path if kept < 1 else 1.0  # both shapes of drop path end at its rate
    return _forward_flops(config, crops, kept) - (last_kept * seen - wanted) * feed_forward_flops(config.model)


def sequences(config: RunConfig) -> list[tuple[int, int]]:
    """(crops of one image, patches of each) for the global and the local crops."""
    sizes = [(2, config.crops.global_size), (config.crops.local_count, config.crops.local_size)]
    return [(count, (size // config.model.patch_size) ** 2) for count, size in sizes]


def kept_share(model: ModelConfig) -> float:
    """Share of rows that a residual branch sees, averaged over blocks: both shapes of drop path are lines."""
    return 1 - (model.drop_path if model.drop_path_shape == "uniform" or model.size.depth == 1 else model.drop_path / 2)


def masked_patches(config: RunConfig) -> float:
    """Masked patches of one source image, over its two global crops, on average."""
    if not config.objective.ibot.weight:
        return 0.0
    images, patches = block_size(config.train.batch_size), sequences(config)[0][1]
    return float(block_counts(config.masks, images, patches).sum()) / images


def _head_flops(config: RunConfig, crops: int) -> float:
    """Heads, forward, for the class tokens of `crops` crops and the masked patches of one image."""
    objective, dim = config.objective, config.model.size.embed_dim
    patch_head = objective.ibot.head if objective.ibot.separate_head else objective.dino.head
    class_tokens = crops * _row_flops(dim, objective.dino.head) if objective.dino.weight else 0.0
    return class_tokens + masked_patches(config) * _row_flops(dim, patch_head)


def _row_flops(dim: int, head: HeadConfig) -> float:
    widths = [dim, *[head.hidden_dim] * (head.layers - 1), head.bottleneck_dim, head.prototypes]
    return 2.0 * sum(a * b for a, b in pairwise(widths))


# -- by tracing ------------------------------------------------------------------------------------------------------


def traced_step_flops(config: RunConfig) -> float:
    """Nominal operations for one source image, counted by fvcore in a trace of the real modules.

    Blocks are alike, so a network of a single block is traced and its block counted `depth` times.
    """
    student, teacher = _traced_backbone(config, sequences(config)), _traced_backbone(config, sequences(config)[:1])
    dim, objective = config.model.size.embed_dim, config.objective
    dino = _traced_row(dim, objective.dino.head) if objective.dino.weight else 0.0
    ibot = _traced_row(dim, objective.ibot.head if objective.ibot.separate_head else objective.dino.head)
    crops, masked = config.crops.local_count + 2, masked_patches(config)
    return 3 * (student + crops * dino + masked * ibot) + teacher + 2 * dino + masked * ibot


def _traced_backbone(config: RunConfig, sequences: Sequence[tuple[int, int]]) -> float:
    model = config.model
    sides = [(count, math.isqrt(patches) * model.patch_size) for count, patches in sequences if count]
    return traced_backbone_flops(replace(model, image_size=config.crops.global_size), sides)


def _traced_row(dim: int, head: HeadConfig) -> float:
    return 2.0 * analyse(PrototypeHead(dim, head), (torch.zeros(1, dim),)).total()
