"""The whole objective: against a slow float64 version, in parts, and on difficult batches."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from test_koleo import reference as koleo_reference
from test_losses import entropy_between
from test_sinkhorn import reference as sinkhorn_reference
from tiny import make_crops, split_crops, tiny_config, tiny_crops, tiny_objective
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dinoreg.data.batch import Crops
from dinoreg.objectives.self_distillation import SelfDistillation

TEACHER_T = 0.05
OBJECTIVES: dict[str, dict[str, Any]] = {
    "separate heads": {},
    "shared head": {"separate_head": False},
    "centering": {"centering": "centering", "separate_head": False},
    "groups": {"group": 4},
    "other weights": {"dino": 0.7, "ibot": 1.9, "koleo": 0.4},
    "no koleo": {"koleo": 0},
    "dino only": {"ibot": 0, "koleo": 0},
    "dino only, separate head asked for": {"ibot": 0},
    "ibot only": {"dino": 0, "koleo": 0},
    "ibot only, shared head": {"dino": 0, "separate_head": False},
}


def run(objective: SelfDistillation, parts: list[Crops], seed: int = 0) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Metrics and gradients."""
    objective.zero_grad(set_to_none=True)
    metrics, _ = objective.forward_backward(parts, teacher_temperature=TEACHER_T, seed=seed)
    gradients = [parameter.grad for parameter in objective.student.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return metrics, gradients  # type: ignore[return-value]


def head_reference(head: nn.Module, x: Tensor) -> Tensor:
    x = head.mlp(x)
    prototypes = head.last_layer.weight_v / head.last_layer.weight_v.norm(dim=1, keepdim=True)
    return x / x.norm(dim=-1, keepdim=True) @ (prototypes * head.last_layer.weight_g).T


def targets_reference(objective: SelfDistillation, term: str, logits: Tensor) -> Tensor:
    targets = objective.cfg.targets
    if targets.centering == "sinkhorn":
        return sinkhorn_reference(logits, TEACHER_T, targets.sinkhorn_iterations)
    center = objective.targets.get_buffer(f"{term}_center").double()
    return ((logits - center) / TEACHER_T).softmax(-1)


def reference(objective: SelfDistillation, crops: Crops) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Metrics and gradients in float64: crop by crop, pair by pair, patch by patch."""
    objective = copy.deepcopy(objective).double()
    cfg, student, teacher = objective.cfg, objective.student, objective.teacher
    images, local_count = crops.local_crops.shape[:2]
    masks = crops.masks if cfg.ibot.weight else torch.zeros_like(crops.masks)
    with torch.no_grad():
        seen = [teacher["backbone"].forward_features(crops.global_crops[:, c]) for c in range(2)]
    views = [student["backbone"].forward_features(crops.global_crops[:, c], masks[:, c]) for c in range(2)]
    views += [student["backbone"].forward_features(crops.local_crops[:, c]) for c in range(local_count)]
    metrics: dict[str, Tensor] = {}
    total = torch.zeros(()).double()

    if cfg.dino.weight:
        logits = head_reference(teacher["dino_head"], torch.cat([s.cls for s in seen])).detach()
        targets = targets_reference(objective, "dino", logits).unflatten(0, (2, images))
        outputs = [head_reference(student["dino_head"], view.cls) for view in views]
        pairs = {
            (t, s): torch.stack([entropy_between(targets[t, i], outputs[s][i]) for i in range(images)]).mean()
            for t, s in product(range(2), range(len(views)))
            if t != s
        }
        metrics["loss/dino_global"] = (pairs[0, 1] + pairs[1, 0]) / 2
        if local_count:
            metrics["loss/dino_local"] = torch.stack([v for (_, s), v in pairs.items() if s > 1]).mean()
        total = total + cfg.dino.weight * torch.stack(list(pairs.values())).mean()

    if cfg.ibot.weight:
        head = "ibot_head" if cfg.ibot.separate_head else "dino_head"
        where = [(c, i, p) for c, i, p in masks.transpose(0, 1).nonzero().tolist()]
        logits = head_reference(teacher[head], torch.stack([seen[c].patches[i, p] for c, i, p in where])).detach()
        targets = targets_reference(objective, "ibot", logits)
        by_crop: dict[tuple[int, int], list[Tensor]] = {}
        for target, (c, i, p) in zip(targets, where, strict=True):
            output = head_reference(student[head], views[c].patches[i, p])
            by_crop.setdefault((c, i), []).append(entropy_between(target, output))
        crop_means = torch.stack([torch.stack(terms).mean() for terms in by_crop.values()])
        metrics["loss/ibot"] = crop_means.mean()
        total = total + cfg.ibot.weight * crop_means.sum() / (2 * images)

    if cfg.koleo.weight:
        values = [koleo_reference(views[c].cls, cfg.koleo.group) for c in range(2)]
        metrics["loss/koleo"] = (values[0] + values[1]) / 2
        total = total + cfg.koleo.weight * (values[0] + values[1])

    metrics["loss/total"] = total
    return metrics, list(torch.autograd.grad(total, list(student.parameters()), allow_unused=False))


def assert_equal(
    got: tuple[dict[str, Tensor], list[Tensor]], expected: tuple[dict[str, Tensor], list[Tensor]], tolerance: float
) -> None:
    assert got[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        torch.testing.assert_close(got[0][name].double(), value.detach().double(), rtol=tolerance, atol=tolerance)
    for gradient, exact in zip(got[1], expected[1], strict=True):
        scale = exact.abs().max().item()
        torch.testing.assert_close(gradient.double(), exact.double(), rtol=0, atol=tolerance * max(1.0, scale))


@pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_metrics_and_gradients_equal_the_slow_version(options: dict[str, Any]) -> None:
    objective, crops = tiny_objective(tiny_config(**options)), tiny_crops(4)
    for center in objective.targets.buffers():
        center.normal_(std=0.1)
    expected = reference(objective, crops)
    assert_equal(run(objective, [crops]), expected, 1e-5)


def test_without_local_crops() -> None:
    objective, crops = tiny_objective(), tiny_crops(4, local_count=0)
    expected = reference(objective, crops)
    assert "loss/dino_local" not in expected[0]
    assert_equal(run(objective, [crops]), expected, 1e-5)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, 8),
        ({"group": 4, "separate_head": False}, 8),
        ({"group": 8}, 8),
        ({"group": 8}, 2),
        ({"centering": "centering"}, 2),
        ({"dino": 0}, 2),
    ],
)
def test_parts_change_nothing(options: dict[str, Any], parts: int) -> None:
    """Masks are spread unevenly over the parts: the last ones have none."""
    crops = tiny_crops(16)
    crops.masks[14:] = False
    crops = make_crops(crops.global_crops, crops.local_crops, crops.masks)
    whole, split = (tiny_objective(tiny_config(**options)) for _ in range(2))
    assert_equal(run(split, split_crops(crops, parts)), run(whole, [crops]), 1e-5)
    for center, expected in zip(split.targets.buffers(), whole.targets.buffers(), strict=True):
        torch.testing.assert_close(center, expected)


def test_eight_parts_of_32_equal_one_of_256() -> None:
    crops, whole, split = tiny_crops(256), tiny_objective(), tiny_objective()
    assert_equal(run(split, split_crops(crops, 8)), run(whole, [crops]), 1e-5)


def test_koleo_over_parts_sees_the_very_tokens_that_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes them from a pass without local crops, beforehand, which must drop the same rows."""
    objective, parts = tiny_objective(drop_path=0.5), split_crops(tiny_crops(12), 2)
    original, seen = objective.student.tokens, []
    monkeypatch.setattr(objective.student, "tokens", lambda *a, **k: seen.append(original(*a, **k)) or seen[-1])
    objective.forward_backward(parts, teacher_temperature=TEACHER_T, seed=3)
    crops = 2 * len(parts[0].global_crops)
    before, after = ([cls[:crops].detach() for cls, _ in pair] for pair in (seen[:2], seen[2:]))
    assert [len(cls) > crops for cls, _ in seen] == [False, False, True, True]
    torch.testing.assert_close(before, after)


def test_seed_decides_drop_path() -> None:
    objective, crops = tiny_objective(drop_path=0.5), tiny_crops(6)
    (_, first), (_, again), (_, other) = (run(objective, [crops], seed) for seed in (1, 1, 2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("kind", "parts"), [("identical", 1), ("identical", 2), ("blank", 1), ("blank", 2), ("one", 1)]
)
def test_difficult_batches_stay_finite(kind: str, parts: int) -> None:
    crops = tiny_crops(1 if kind == "one" else 8)
    if kind == "identical":
        crops.global_crops[:] = crops.global_crops[0, 0].clone()
        crops.local_crops[:] = crops.local_crops[0, 0].clone()
        crops.masks[:] = crops.masks[0, 1].clone()
    if kind == "blank":
        crops.global_crops.zero_()
        crops.local_crops.zero_()
    crops = make_crops(crops.global_crops, crops.local_crops, crops.masks)
    metrics, gradients = run(tiny_objective(), split_crops(crops, parts))
    for name, value in metrics.items():
        assert value.isfinite(), name
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_nothing_masked_gives_every_parameter_a_gradient() -> None:
    crops = tiny_crops(4)
    crops = make_crops(crops.global_crops, crops.local_crops, torch.zeros_like(crops.masks))
    objective = tiny_objective()
    metrics, gradients = run(objective, [crops])  # asserts that none is missing, which sharded gradients need
    assert metrics["loss/ibot"] == 0
    assert all(parameter.grad.abs().max() == 0 for parameter in objective.student["ibot_head"].parameters())
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype: torch.dtype) -> None:
    """Losses come in fp32 and near those of fp32 weights."""
    objective, crops = tiny_objective(), tiny_crops(8)
    expected, _ = run(objective, [crops])
    metrics, gradients = run(copy.deepcopy(objective).to(dtype), [crops])
    assert all(gradient.isfinite().all() for gradient in gradients)
    for name, value in metrics.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=0.02, atol=0.02)


class RefuseHostSync(TorchDispatchMode):
    """On a GPU these operations wait for the device: they bring a value or a number of rows to the host."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_", "index_put") else []
        assert name not in self.REFUSED, f"{name} waits for the device"
        assert not any(i is not None and i.dtype == torch.bool for i in indices), "a boolean index waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("centering", ["sinkhorn", "centering"])
@pytest.mark.parametrize("parts", [1, 2])
def test_nothing_waits_for_the_device(parts: int, centering: str) -> None:
    objective = tiny_objective(tiny_config(centering=centering), drop_path=0.5)
    crops = split_crops(tiny_crops(8), parts)
    with RefuseHostSync():
        objective.forward_backward(crops, teacher_temperature=TEACHER_T, seed=0, observe=True)
        objective.update_teacher(0.99)


def test_the_refusal_works() -> None:
    for wait in (lambda: torch.ones(2)[torch.tensor([True, False])], lambda: torch.ones(()).item()):
        with pytest.raises(AssertionError, match="waits for the device"), RefuseHostSync():
            wait()


def test_observation() -> None:
    objective, crops = tiny_objective(), tiny_crops(8)
    parts = split_crops(crops, 2)
    metrics, seen = objective.forward_backward(parts, teacher_temperature=TEACHER_T, seed=0, observe=True)
    assert seen is not None
    assert seen.teacher_cls.shape == seen.student_cls.shape == (8, 32)
    assert seen.tokens_prenorm.shape == (8, 1 + 4 + 16, 32)
    assert seen.num_registers == 4
    torch.testing.assert_close(seen.dino_targets.sum(-1), torch.ones(8))
    teacher = objective.teacher["backbone"].forward_features(parts[0].global_crops.flatten(0, 1))
    torch.testing.assert_close(seen.teacher_cls, teacher.cls)
    torch.testing.assert_close(seen.tokens_prenorm, teacher.prenorm)
    assert not any(tensor.requires_grad for tensor in (seen.student_cls, seen.dino_targets, seen.dino_cross_entropy))

    metrics, seen = objective.forward_backward([crops], teacher_temperature=TEACHER_T, seed=0, observe=True)
    assert seen is not None
    torch.testing.assert_close(seen.dino_cross_entropy, metrics["loss/dino_global"])
    assert objective.forward_backward([crops], teacher_temperature=TEACHER_T, seed=0)[1] is None


@pytest.mark.parametrize("options", [{}, {"dino": 0}])
def test_observed_divergence_of_a_twin_is_that_of_the_temperatures(options: dict[str, Any]) -> None:
    """Cross-entropy minus entropy is KL(teacher || student), never negative."""
    objective = tiny_objective(tiny_config(**options))
    _, seen = objective.forward_backward([tiny_crops(8)], teacher_temperature=TEACHER_T, seed=0, observe=True)
    assert seen is not None
    entropy = torch.special.entr(seen.dino_targets).sum(-1).mean()
    assert seen.dino_cross_entropy > entropy


def test_teacher_starts_as_the_student_and_follows_it() -> None:
    objective = tiny_objective()
    objective.init_weights()
    pairs = list(zip(objective.teacher.parameters(), objective.student.parameters(), strict=True))
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    with torch.no_grad():
        for _, theirs in pairs:
            theirs.add_(torch.randn_like(theirs))
    expected = [0.9 * mine.double() + 0.1 * theirs.double() for mine, theirs in pairs]
    objective.update_teacher(0.9)
    for (mine, _), value in zip(pairs, expected, strict=True):
        torch.testing.assert_close(mine.double(), value, rtol=1e-6, atol=1e-7)
    before = [mine.clone() for mine, _ in pairs]
    objective.update_teacher(1.0)
    assert all(torch.equal(mine, old) for (mine, _), old in zip(pairs, before, strict=True))


def test_teacher_is_never_trained() -> None:
    objective = tiny_objective(drop_path=0.5).train()
    assert not any(module.training for module in objective.teacher.modules())
    assert objective.student["backbone"].training
    run(objective, [tiny_crops(4)])
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in objective.teacher.parameters())


@pytest.mark.parametrize(
    ("options", "modules"),
    [
        ({}, {"backbone", "dino_head", "ibot_head"}),
        ({"separate_head": False}, {"backbone", "dino_head"}),
        ({"ibot": 0}, {"backbone", "dino_head"}),
        ({"dino": 0}, {"backbone", "ibot_head"}),
        ({"dino": 0, "separate_head": False}, {"backbone", "dino_head"}),
    ],
)
def test_only_heads_that_are_used_exist(options: dict[str, Any], modules: set[str]) -> None:
    objective = tiny_objective(tiny_config(**options))
    assert set(objective.student) == set(objective.teacher) == modules


def test_initialised_from_nothing() -> None:
    """As the trainer does: on the meta device first, then memory full of NaN."""
    cfg = tiny_config(centering="centering")
    with torch.device("meta"):
        objective = SelfDistillation(cfg, tiny_objective().student["backbone"].config, tiny_objective().ranks)
    objective.to_empty(device="cpu")
    for tensor in objective.state_dict().values():
        tensor.fill_(torch.nan)
    objective.init_weights()
    assert all(tensor.isfinite().all() for tensor in objective.state_dict().values())
