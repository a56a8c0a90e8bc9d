"""`dinoreg train CONFIG --dry-run`: what a run will be, before it costs anything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from dinoreg.config import ConfigError
from dinoreg.data.sources import open_sources
from dinoreg.models.heads import HeadConfig, PrototypeHead
from dinoreg.models.vit import build_vit
from dinoreg.parallel.shard import reshards
from dinoreg.train.flops import kept_share, masked_patches, peak_flops, sequences, step_flops, traced_step_flops
from dinoreg.train.recipe import RunConfig
from dinoreg.train.schedules import Schedules

GIB = 2**30
GPUS_A_NODE = 8  # what hybrid sharding shards over, where the machines are not known yet


def print_plan(config: RunConfig, console: Console | None = None) -> None:
    """Say what `config` would do: size, arithmetic, memory, length, schedules, and what looks unwise."""
    console = console or Console()
    num_samples, note = _count_samples(config)
    parameters = count_parameters(config)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    size = config.model.size
    table.add_row(
        "network",
        f"{config.model.arch}/{config.model.patch_size}, {size.depth} blocks of {size.embed_dim}, "
        f"{size.num_heads} heads, {config.model.num_registers} registers",
    )
    table.add_row("parameters", ", ".join(f"{name} {count / 1e6:,.2f} M" for name, count in parameters.items()))
    for name, text in _arithmetic(config):
        table.add_row(name, text)
    table.add_row("images", note)
    for name, text in _lengths(config, num_samples):
        table.add_row(name, text)
    table.add_row("run directory", config.run_dir)
    console.print(table, soft_wrap=True)
    console.print()
    console.print(_memory_table(config))
    for warning in warnings_of(config, num_samples):
        console.print(f"[yellow]careful:[/] {warning}", soft_wrap=True)


def count_parameters(config: RunConfig) -> dict[str, int]:
    """Parameters of each network of the student; the teacher has as many again."""
    objective, dim = config.objective, config.model.size.embed_dim
    heads: dict[str, HeadConfig] = {"DINO head": objective.dino.head}
    if objective.ibot.separate_head:
        heads["iBOT head"] = objective.ibot.head
    with torch.device("meta"):
        modules: dict[str, nn.Module] = {"backbone": build_vit(config.model, attention="sdpa")}
        modules |= {name: PrototypeHead(dim, head) for name, head in heads.items()}
    return {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}


def _arithmetic(config: RunConfig) -> list[tuple[str, str]]:
    nominal, executed = step_flops(config)
    traced = traced_step_flops(config)
    rows = [
        ("FLOPs an image", f"{traced / 1e12:.4g} T by fvcore ({nominal / 1e12:.4g} T by formula), student and teacher"),
        ("executed", f"{executed / 1e12:.4g} T, without the rows that drop path skips"),
        ("FLOPs a step", f"{executed * config.train.batch_size / 1e15:.4g} P executed"),
    ]
    if torch.cuda.is_available() and (peak := peak_flops(torch.device("cuda", 0))):
        rate = 0.35 * peak / executed
        rows.append(("speed", f"{rate:,.0f} images/s on each such GPU, at 35 % of its peak and if the data keep up"))
    return rows


def _count_samples(config: RunConfig) -> tuple[int | None, str]:
    """Images in one pass, and what to say of them; a plan can be made before the data are there."""
    if not config.data.sources:
        return None, "not given yet (data.sources=...), so epochs are unknown"
    try:
        count = open_sources(config.data).num_samples
    except (ConfigError, OSError) as error:
        return None, f"cannot be read here ({error}), so epochs are unknown"
    return count, f"{count:,}" if count is not None else "a stream of unknown length"


def _lengths(config: RunConfig, num_samples: int | None) -> list[tuple[str, str]]:
    try:
        return Schedules(config, num_samples).lines()
    except ConfigError as error:
        if num_samples is not None:
            raise
        return [("length", f"unknown: {error}")]


# -- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    state: float  # fp32 weights, gradients, Adam's two moments, and the teacher's weights
    gathered: float  # unsharded copies that are whole for a while
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.state + self.gathered + self.activations + self.logits


def estimate_memory(config: RunConfig, world: int) -> Memory:
    """Memory of the busiest moment on each of `world` GPUs, from what autograd keeps of each layer.

    Good to a fifth or so. The allocator's fragments and CUDA's own context (1 to 2 GiB) come on top.
    """
    parameters = count_parameters(config)
    everything, width = sum(parameters.values()), 4 if config.train.precision == "fp32" else 2
    shards = {"full": world, "hybrid": min(world, GPUS_A_NODE), "none": 1}[config.efficiency.shard]
    images = config.train.batch_size / world / config.train.accumulate
    plain = world == 1 and config.train.precision == "fp32"
    return Memory(
        state=20.0 * everything / shards,
        gathered=0.0 if plain else _gathered(config, parameters, width),
        activations=width * images * _kept_values(config),
        logits=width * images * _logit_values(config),
    )


def _gathered(config: RunConfig, parameters: dict[str, int], width: int) -> float:
    """Two blocks (one running, one prefetched) and the largest head; everything without resharding."""
    everything, backbone = sum(parameters.values()), parameters["backbone"]
    blocks = 2 * backbone / config.model.size.depth if reshards(config.efficiency, everything) else backbone
    heads = (
        max(parameters.values()) if len(parameters) == 1 else max(v for k, v in parameters.items() if k != "backbone")
    )
    # Parts before the last leave their gradients unsharded, in the dtype of the reduction.
    waiting = 4.0 * everything if config.train.accumulate > 1 else 0.0
    return width * (blocks + heads) + waiting


def _kept_values(config: RunConfig) -> float:
    """Numbers that autograd keeps of the student's backbone for one source image.

    Of a block, a token leaves: the inputs of both norms, q, k, v, the attention's result, and the hidden layer of the
    feed-forward part before the activation (dinoreg/models/frugal.py). "selective" keeps the block's input and the
    results of attention and of both branches, "full" the block's input.
    """
    model = config.model
    tokens = sum(count * (1 + model.num_registers + patches) for count, patches in sequences(config))
    dim, hidden, swiglu = model.size.embed_dim, model.ffn_hidden, model.ffn == "swiglu"
    everything = 6 * dim + (2 if swiglu else 1) * hidden
    each = {
        "none": kept_share(model) * everything,
        "selective": dim + kept_share(model) * 3 * dim,
        "full": float(dim),
    }[config.efficiency.activation_checkpointing]
    recomputed = 0 if config.efficiency.activation_checkpointing == "none" else everything
    return tokens * (model.size.depth * each + recomputed)


def _logit_values(config: RunConfig) -> float:
    """Logits of one source image: the student's, which their gradients replace, and the teacher's."""
    masked, head = masked_patches(config), config.objective.dino.head
    patch_head = config.objective.ibot.head if config.objective.ibot.separate_head else head
    student_crops = config.crops.local_count + 2
    return (student_crops + 2) * head.prototypes + 2 * masked * patch_head.prototypes


def _memory_table(config: RunConfig) -> Table:
    table = Table(
        title="memory a GPU, estimated (GiB)", title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    columns = ("GPUs", "images on each", "weights and optimizer", "gathered", "activations", "logits", "together")
    for name in columns:
        table.add_column(name, justify="right")
    batch, parts = config.train.batch_size, config.train.accumulate
    for world in (1, 2, 4, 8, 16, 32, 64, 96, 128, 256):
        if batch % (world * parts):
            continue
        memory = estimate_memory(config, world)
        share = f"{batch // world}" if parts == 1 else f"{parts} x {batch // world // parts}"
        values = (memory.state, memory.gathered, memory.activations, memory.logits, memory.total)
        table.add_row(str(world), share, *(f"{value / GIB:.1f}" for value in values))
    return table


# -- what looks unwise -----------------------------------------------------------------------------------------------


def warnings_of(config: RunConfig, num_samples: int | None) -> list[str]:
    """Choices that run, and that experience speaks against."""
    found = []
    batch, objective = config.train.batch_size, config.objective
    if batch < 64:
        found.append(
            f"train.batch_size {batch}: DINOv2 has not been shown to learn from so few; a larger one with "
            "train.accumulate needs no more memory"
        )
    if batch == 1 and objective.koleo.weight:
        found.append("objective.koleo.weight: a single image has no neighbours, so KoLeo does nothing")
    if objective.dino.head.prototypes > 64 * batch:
        found.append(
            f"objective.dino.head.prototypes {objective.dino.head.prototypes} for {batch} images a step: many will "
            f"stay dead; DINOv2 has 32 to 43 an image, here {32 * batch}"
        )
    if objective.targets.temperature > 0.07:
        found.append(
            f"objective.targets.temperature {objective.targets.temperature}: DINO found more than 0.07 unstable"
        )
    if config.crops.global_size != config.model.image_size:
        found.append(
            f"crops.global_size {config.crops.global_size} is not model.image_size {config.model.image_size}: position "
            "embeddings are resampled for all crops"
        )
    return found + _warnings_of_length(config, num_samples)


def _warnings_of_length(config: RunConfig, num_samples: int | None) -> list[str]:
    try:
        steps = Schedules(config, num_samples).total_steps
    except ConfigError:
        return []
    found = []
    memory = 1 / max(1 - config.objective.teacher.momentum, 1e-9)
    if memory > steps / 10:
        found.append(
            f"objective.teacher.momentum {config.objective.teacher.momentum}: the teacher averages over {memory:,.0f} "
            f"steps of a run of {steps:,}, and lags far behind"
        )
    if num_samples is not None and num_samples < config.train.batch_size:
        found.append(
            f"a step of {config.train.batch_size} images holds some of the {num_samples} images more than once"
        )
    return found
