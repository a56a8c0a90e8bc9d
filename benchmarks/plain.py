"""A training step written plainly, as the papers put it and public trainers do it: what dinoreg's own is compared with.

Crops of one size at a time, dropped residuals times zero, all rows through all layers, logits in fp32, a matrix of
assignments that Sinkhorn-Knopp rewrites, a cross-entropy for each of the 2 + 2 L pairs of crops, AdamW with a group for
each parameter, autocast for bf16. It uses the real modules' weights and none of their own forwards, on one process.
tests/test_plain.py holds the two loss curves against each other; benchmarks.step their times and their memory.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoreg.config import ConfigError
from dinoreg.data.batch import Crops
from dinoreg.models.vit import VisionTransformer
from dinoreg.objectives.self_distillation import SelfDistillation
from dinoreg.parallel.mesh import Ranks
from dinoreg.parallel.precision import resolve_precision
from dinoreg.parallel.shard import EfficiencyConfig
from dinoreg.train.build import build_objective
from dinoreg.train.optimizer import parameter_rule
from dinoreg.train.recipe import RunConfig
from dinoreg.train.schedules import StepValues


class PlainStep:
    """Student, teacher and optimizer; `step` is one update.

    Raises ConfigError for what it does not know: rotary positions and parts of a batch.
    """

    def __init__(self, cfg: RunConfig, objective: SelfDistillation) -> None:
        """objective: whose weights are used, plain tensors in fp32."""
        if cfg.model.rope_base or cfg.train.accumulate > 1:
            raise ConfigError("the plain step knows learnt positions and whole batches only")
        device = next(objective.parameters()).device
        self.cfg, self.device = cfg, device
        self.precision = resolve_precision(cfg.train.precision, device)
        self.student, self.teacher = objective.student, objective.teacher
        self.drop = torch.Generator(device).manual_seed(cfg.seed)
        self.centers = {term: torch.zeros(count, device=device) for term, count in objective.targets.prototypes.items()}
        depth: int = self.student["backbone"].depth  # type: ignore[assignment]
        named = [(name, p) for name, p in self.student.named_parameters() if p.requires_grad]
        self.rules = [parameter_rule(name, depth, cfg.optim) for name, _ in named]
        self.adamw = torch.optim.AdamW([{"params": [p]} for _, p in named], lr=0.0, betas=cfg.optim.betas)

    @staticmethod
    def build(cfg: RunConfig, device: torch.device) -> PlainStep:
        """With the weights that a run of `cfg` starts from."""
        bare = replace(cfg, train=replace(cfg.train, precision="fp32"), efficiency=EfficiencyConfig())
        return PlainStep(cfg, build_objective(bare, Ranks.alone(device)))

    def step(self, crops: Crops, values: StepValues) -> dict[str, Tensor]:
        """One update on developed crops; the losses, as `SelfDistillation.forward_backward` names them."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            targets = self._targets(crops, values.teacher_temperature)
            losses = self._losses(crops, targets)
        losses["loss/total"].backward()
        self._update(values)
        return {name: value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def _targets(self, crops: Crops, temperature: float) -> dict[str, Tensor]:
        """Assignments by term: (2, b, K) of class tokens, (m, K) of the masked patches."""
        x = backbone(self.teacher["backbone"], crops.global_crops.flatten(0, 1), None)  # type: ignore[arg-type]
        found = {}
        for term, name in self.teacher.head_of.items():
            logits = head(self.teacher[name], x[:, 0] if term == "dino" else self._masked(x, crops))
            found[term] = self._balanced(term, logits.float(), temperature)
        if "dino" in found:
            found["dino"] = found["dino"].unflatten(0, (-1, 2)).transpose(0, 1)
        return found

    def _balanced(self, term: str, logits: Tensor, temperature: float) -> Tensor:
        if self.cfg.objective.targets.centering == "sinkhorn":
            return sinkhorn(logits, temperature, self.cfg.objective.targets.sinkhorn_iterations)
        center = self.centers[term]
        targets = ((logits - center) / temperature).softmax(-1)
        if len(logits):
            center.lerp_(logits.mean(0), 1 - self.cfg.objective.targets.center_momentum)
        return targets

    def _masked(self, x: Tensor, crops: Crops) -> Tensor:
        patches = x[:, 1 + self.cfg.model.num_registers :]
        return patches.flatten(0, 1)[crops.masked_index]

    def _losses(self, crops: Crops, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        cfg, net, drop = self.cfg.objective, self.student["backbone"], self.drop
        images, heads, temperature = len(crops.global_crops), self.student.head_of, cfg.targets.student_temperature
        masks = crops.masks.flatten(0, 1) if "ibot" in heads else None
        seen = backbone(net, crops.global_crops.flatten(0, 1), masks, drop)  # type: ignore[arg-type]
        losses: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.device)
        if "dino" in heads:
            views = list(seen[:, 0].unflatten(0, (images, 2)).unbind(1))
            if crops.local_crops.shape[1]:
                local = backbone(net, crops.local_crops.flatten(0, 1), None, drop)  # type: ignore[arg-type]
                views += local[:, 0].unflatten(0, (images, -1)).unbind(1)
            logits = [head(self.student[heads["dino"]], view) for view in views]
            pairs = {(t, s): entropy(targets["dino"][t], logits[s], temperature).mean()
                     for t, s in product(range(2), range(len(views))) if t != s}  # fmt: skip
            losses["loss/dino_global"] = (pairs[0, 1] + pairs[1, 0]) / 2
            if len(views) > 2:
                losses["loss/dino_local"] = torch.stack([pair for (_, s), pair in pairs.items() if s > 1]).mean()
            total = total + cfg.dino.weight * torch.stack(list(pairs.values())).mean()
        if "ibot" in heads:
            entropies = entropy(
                targets["ibot"], head(self.student[heads["ibot"]], self._masked(seen, crops)), temperature
            )
            masked = crops.masks.flatten(0, 1)
            weights = (1 / masked.sum(-1).clamp_min(1))[:, None].expand_as(masked).flatten()[crops.masked_index]
            by_crop = (weights * entropies).sum()
            losses["loss/ibot"] = by_crop / masked.any(-1).sum().clamp_min(1)
            total = total + cfg.ibot.weight * by_crop / len(masked)
        if cfg.koleo.weight:
            both = [koleo(seen[:, 0].unflatten(0, (images, 2))[:, crop], cfg.koleo.group) for crop in range(2)]
            losses["loss/koleo"] = (both[0] + both[1]) / 2
            total = total + cfg.koleo.weight * (both[0] + both[1])
        return losses | {"loss/total": total}

    @torch.no_grad()
    def _update(self, values: StepValues) -> None:
        optim = self.cfg.optim
        if optim.clip:
            modules = self.student.values() if optim.clip_per_module else [self.student]
            for module in modules:
                nn.utils.clip_grad_norm_(module.parameters(), optim.clip)
        for rule, group in zip(self.rules, self.adamw.param_groups, strict=True):
            group["lr"] = (values.last_layer_lr if rule.last_layer else values.lr) * rule.lr
            group["weight_decay"] = values.weight_decay if rule.decay else 0.0
        self.adamw.step()
        self.adamw.zero_grad()
        for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mine.mul_(values.teacher_momentum).add_(theirs, alpha=1 - values.teacher_momentum)


def backbone(
    net: VisionTransformer, images: Tensor, masks: Tensor | None, drop: torch.Generator | None = None
) -> Tensor:
    """(B, C, H, W) -> (B, tokens, D) after the final norm."""
    packed, packing, _ = net.embed([images], [masks])
    (x,) = packing.split(packed)
    rates = net.drop_rates if drop is not None else [0.0] * net.depth
    each: Any
    for each, rate in zip(net.blocks, rates, strict=True):
        x = x + dropped(each.ls1(attention(each.attn, each.norm1(x))), rate, drop)
        x = x + dropped(each.ls2(feed_forward(each.mlp, each.norm2(x))), rate, drop)
    return net.norm(x)


def attention(layer: Any, x: Tensor) -> Tensor:
    q, k, v = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return layer.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def feed_forward(layer: Any, x: Tensor) -> Tensor:
    if hasattr(layer, "w12"):
        gate, value = layer.w12(x).chunk(2, dim=-1)
        return layer.w3(F.silu(gate) * value)
    return layer.fc2(F.gelu(layer.fc1(x)))


def dropped(branch: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """Stochastic depth (Huang et al. 2016): whole sequences times 0, the others times 1 / (1 - rate)."""
    if not rate:
        return branch
    kept = torch.rand(len(branch), 1, 1, generator=generator, device=branch.device) >= rate
    return branch * kept / (1 - rate)


def head(layer: Any, x: Tensor) -> Tensor:
    """(n, D) -> logits (n, K)."""
    prototypes = F.normalize(layer.last_layer.weight_v, dim=-1) * layer.last_layer.weight_g
    return F.linear(F.normalize(layer.mlp(x), dim=-1), prototypes)


def sinkhorn(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """(B, K) -> assignments (B, K) (SwAV, algorithm 1: Caron et al. 2020)."""
    if not len(logits):
        return logits
    q = (logits / temperature).exp().T
    q = q / q.sum()
    count, samples = q.shape
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / count
        q = q / q.sum(0, keepdim=True) / samples
    return (q * samples).T


def entropy(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """(n, K) and (n, K) -> (n,), in nats."""
    return -(targets * (logits.float() / temperature).log_softmax(-1)).sum(-1)


def koleo(features: Tensor, group: int) -> Tensor:
    """DINOv2, section 4; features (b, D), of which each `group` is by itself (0: all together)."""
    return torch.stack([_koleo(some) for some in features.split(group or len(features))]).mean()


def _koleo(features: Tensor) -> Tensor:
    if len(features) < 2:
        return features.sum() * 0
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=-1)
        similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
        return -(unit - unit[similarity.argmax(1)]).norm(dim=-1).clamp_min(1e-6).log().mean()
