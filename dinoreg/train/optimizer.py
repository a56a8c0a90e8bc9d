"""AdamW with DINOv2's per-parameter rules."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinoreg.config import ConfigError
from dinoreg.train.schedules import StepValues

_TOKENS = ("cls_token", "register_tokens", "mask_token", "pos_embed")


@dataclass
class OptimConfig:
    """Learning rate, weight decay and their rules. Durations: '10 epochs', '5000 steps', '1e6 images' or a fraction."""

    lr: float = 4e-3  # peak, at `lr_reference_batch` images
    lr_scaling: Literal["sqrt", "linear", "none"] = "sqrt"  # with train.batch_size / lr_reference_batch
    lr_reference_batch: int = 1024
    lr_end: float = 1e-6
    warmup: int | float | str = 0.1
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 0.9  # learning rate of block i is multiplied by layer_decay ** (depth - i)
    patch_embed_lr: float = 0.2  # extra factor for the patch embedding
    decay_tokens: bool = True  # DINOv2 decays class, register, mask tokens and positions; timm does not
    decay_prototype_scale: bool = True  # DINOv2 decays weight_g of the heads
    freeze_last_layer: int | float | str = 0.01  # prototypes keep still for this long
    clip: float = 3.0  # gradient norm; 0 turns clipping off
    clip_per_module: bool = True  # backbone and heads clipped each on its own, as DINOv2 does

    def check(self) -> None:
        if self.clip < 0:
            raise ConfigError(f"a gradient norm cannot be clipped at {self.clip}; 0 turns clipping off", key="clip")


@dataclass(frozen=True)
class ParameterRule:
    """How one parameter differs from the schedule."""

    lr: float = 1.0  # factor
    decay: bool = True
    last_layer: bool = False  # follows the last layer's learning rate, which is zero while it is frozen


def parameter_rule(name: str, depth: int, cfg: OptimConfig) -> ParameterRule:
    """The rule for a parameter called `backbone.blocks.3.attn.qkv.weight`, `dino_head.last_layer.weight_g`, ...

    Layer-wise decay as in BEiT: tokens, positions, the patch embedding and a norm before the blocks count as layer 0,
    block i as layer i + 1, the final norm and the heads as the last.
    """
    lr = 1.0
    if name.startswith("backbone."):
        block = re.match(r"backbone\.blocks\.(\d+)\.", name)
        if block:
            lr = cfg.layer_decay ** (depth - int(block.group(1)))
        elif "patch_embed" in name or "norm_pre" in name or name.endswith(_TOKENS):
            lr = cfg.layer_decay ** (depth + 1)
        if "patch_embed" in name:
            lr *= cfg.patch_embed_lr
    exempt = name.endswith((".bias", ".gamma")) or "norm" in name
    exempt |= name.endswith(_TOKENS) and not cfg.decay_tokens
    exempt |= name.endswith("weight_g") and not cfg.decay_prototype_scale
    return ParameterRule(lr, not exempt, "last_layer" in name)


def _trainable(student: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in student.named_parameters() if p.requires_grad)


class Optimizer:
    """AdamW over parameters grouped by rule, and gradient clipping.

    Args:
        student: modules by name; its `backbone` has a `depth`.
    """

    def __init__(self, student: nn.ModuleDict, cfg: OptimConfig) -> None:
        self.cfg, self.student = cfg, student
        depth: int = student["backbone"].depth  # type: ignore[assignment]
        groups: dict[ParameterRule, list[nn.Parameter]] = defaultdict(list)
        for name, parameter in _trainable(student):
            groups[parameter_rule(name, depth, cfg)].append(parameter)
        self.rules = list(groups)
        self.adamw = torch.optim.AdamW(
            [{"params": parameters} for parameters in groups.values()],
            lr=0.0,
            betas=(cfg.betas[0], cfg.betas[1]),
            fused=True,
        )

    def set_values(self, values: StepValues) -> None:
        """Give every group its learning rate and weight decay for the coming step."""
        for rule, group in zip(self.rules, self.adamw.param_groups, strict=True):
            group["lr"] = (values.last_layer_lr if rule.last_layer else values.lr) * rule.lr
            group["weight_decay"] = values.weight_decay if rule.decay else 0.0

    def step(self, skip: Tensor | None = None) -> None:
        """Update, and forget the gradients. skip: a device scalar; where it is 1, weights and moments stay."""
        # The fused kernels read it on the device, as they do for torch's GradScaler: nobody waits.
        self.adamw.found_inf = skip  # type: ignore[attr-defined]
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)

    @torch.no_grad()
    def clip(self) -> dict[str, Tensor]:
        """Scale gradients down where they are long.

        Returns:
            `grad_norm/<module>` before clipping, device scalars, the same on all ranks.
        """
        gradients = {
            name: [p.grad for p in module.parameters() if p.grad is not None] for name, module in self.student.items()
        }
        norms = {name: _norm(grads) for name, grads in gradients.items()}
        total = torch.stack(list(norms.values())).norm()
        if self.cfg.clip > 0:
            for name, grads in gradients.items():
                _scale(grads, self.cfg.clip, norms[name] if self.cfg.clip_per_module else total)
        return {f"grad_norm/{name}": norm for name, norm in norms.items()}


def _norm(grads: list[Tensor]) -> Tensor:
    """L2 norm over all gradients; under FSDP over all shards, as a plain scalar on every rank."""
    norm = torch.nn.utils.get_total_norm(grads)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _scale(grads: Iterable[Tensor], limit: float, norm: Tensor) -> None:
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    if local:
        torch._foreach_mul_(local, (limit / (norm + 1e-6)).clamp(max=1.0))
