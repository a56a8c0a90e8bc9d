"""Which parameter gets which learning rate and decay, and what clipping does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dinoreg.train.optimizer import OptimConfig, Optimizer, ParameterRule, parameter_rule
from dinoreg.train.schedules import StepValues

VALUES = StepValues(lr=0.1, weight_decay=0.5, last_layer_lr=0.0, teacher_momentum=0.9, teacher_temperature=0.07)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("backbone.blocks.0.attn.qkv.weight", ParameterRule(0.9**12, True)),
        ("backbone.blocks.11.mlp.fc1.weight", ParameterRule(0.9, True)),
        ("backbone.blocks.11.mlp.fc1.bias", ParameterRule(0.9, False)),
        ("backbone.blocks.3.ls1.gamma", ParameterRule(0.9**9, False)),
        ("backbone.blocks.3.norm1.weight", ParameterRule(0.9**9, False)),
        ("backbone.norm.weight", ParameterRule(1.0, False)),
        ("backbone.cls_token", ParameterRule(0.9**13, True)),
        ("backbone.register_tokens", ParameterRule(0.9**13, True)),
        ("backbone.pos_embed", ParameterRule(0.9**13, True)),
        ("backbone.patch_embed.proj.weight", ParameterRule(0.2 * 0.9**13, True)),
        ("dino_head.mlp.0.weight", ParameterRule(1.0, True)),
        ("dino_head.last_layer.weight_g", ParameterRule(1.0, True, last_layer=True)),
        ("ibot_head.last_layer.weight_v", ParameterRule(1.0, True, last_layer=True)),
    ],
)
def test_rules_are_those_of_dinov2(name: str, rule: ParameterRule) -> None:
    found = parameter_rule(name, 12, OptimConfig())
    assert (found.decay, found.last_layer) == (rule.decay, rule.last_layer)
    assert found.lr == pytest.approx(rule.lr, rel=1e-12)


def test_tokens_and_prototype_scale_can_be_left_undecayed() -> None:
    cfg = OptimConfig(decay_tokens=False, decay_prototype_scale=False)
    names = ["backbone.register_tokens", "backbone.pos_embed", "dino_head.last_layer.weight_g"]
    assert not any(parameter_rule(name, 12, cfg).decay for name in names)
    assert parameter_rule("dino_head.last_layer.weight_v", 12, cfg).decay


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depth = 1
        self.weight = nn.Parameter(torch.ones(3))
        self.last_layer = nn.Linear(2, 2, bias=False)


def optimizer(**options: float | bool) -> tuple[Optimizer, nn.ModuleDict]:
    student = nn.ModuleDict({"backbone": Toy(), "dino_head": Toy()})
    return Optimizer(student, OptimConfig(**options)), student  # type: ignore[arg-type]


@pytest.mark.parametrize("per_module", [True, False])
def test_clipping_scales_to_the_limit(per_module: bool) -> None:
    opt, student = optimizer(clip=2.0, clip_per_module=per_module)
    scale = {"backbone": 10.0, "dino_head": 0.1}
    for name, parameter in student.named_parameters():
        parameter.grad = torch.full_like(parameter, scale[name.split(".")[0]])
    before = {name: torch.cat([p.grad.double().flatten() for p in m.parameters()]) for name, m in student.items()}
    norms = opt.clip()
    total = torch.cat(list(before.values())).norm()
    for name, module in student.items():
        own = before[name].norm()
        assert norms[f"grad_norm/{name}"].item() == pytest.approx(own.item(), rel=1e-6)
        factor = min(1.0, 2.0 / (own if per_module else total).item())
        after = torch.cat([p.grad.double().flatten() for p in module.parameters()])
        torch.testing.assert_close(after, before[name] * factor, rtol=1e-5, atol=0)


def test_no_clipping_at_zero() -> None:
    opt, student = optimizer(clip=0.0)
    for parameter in student.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    opt.clip()
    assert all((p.grad == 1e6).all() for p in student.parameters())


def test_frozen_last_layer_keeps_still_and_decay_is_decoupled() -> None:
    opt, student = optimizer(clip=0.0)
    frozen = student["dino_head"].last_layer.weight.detach().clone()
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    opt.set_values(VALUES)
    opt.step()
    torch.testing.assert_close(student["dino_head"].last_layer.weight, frozen, rtol=0, atol=0)
    # No gradient, so AdamW only decays: w <- w (1 - lr * wd).
    torch.testing.assert_close(student["dino_head"].weight, torch.full((3,), 1 - 0.1 * 0.5))
    assert all(p.grad is None for p in student.parameters())
