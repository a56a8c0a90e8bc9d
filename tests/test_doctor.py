"""Every failure is named, and a healthy run is left in peace: on invented histories and on real runs with a fault."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinoreg.data.batch import Crops
from dinoreg.models.heads import HeadConfig
from dinoreg.models.vit import Features, ModelConfig
from dinoreg.objectives.self_distillation import DinoConfig, ObjectiveConfig, SelfDistillation
from dinoreg.parallel.mesh import Ranks
from dinoreg.train.doctor import diagnose
from dinoreg.train.monitors import MonitorConfig, measure, weight_distance

LN_K = math.log(4096)
Record = dict[str, float]


def ease(step: float, start: float, end: float, pace: float = 400) -> float:
    """From start towards end, most of it within `pace` steps."""
    return end + (start - end) * math.exp(-step / pace)


def healthy(step: int) -> Record:
    """A ViT-S with 4096 prototypes and a batch of 64, as such runs look."""
    entropy = ease(step, LN_K - 0.01, 3.5)
    loss = ease(step, LN_K + 0.05, 5.0)
    return {
        "step": step,
        "images": 64 * step,
        "loss/total": 2 * loss,
        "loss/dino_global": loss,
        "plateau/dino": LN_K,
        "teacher/entropy": entropy,
        "teacher/marginal_entropy": LN_K - 0.2,
        "teacher/kl": loss - entropy,
        "teacher/student_cosine": 0.9,
        "teacher/ema_distance": ease(step, 0.0, 0.05),
        "prototypes/perplexity": 3300.0,
        "prototypes/dead_share": 0.1,
        "prototypes/samples": 128,
        "features/rankme": ease(step, 1.2, 40.0),
        "features/rank_limit": 128,
        "features/cls_std": ease(step, 0.01, 0.7),
        "features/cls_cosine": ease(step, 0.9999, 0.5),
        "grad_norm/backbone": 0.5,
        "lr": 1e-3,
        "throughput/data_wait_share": 0.05,
        "data/bad": 0.0,
    }


def run(
    change: Callable[[int], Record] | None = None, steps: int = 200, every: int = 10, **fixed: float
) -> list[Record]:
    return [{**healthy(s), **(change(s) if change else {}), **fixed} for s in range(every, steps + 1, every)]


def slashed(values: dict[str, float]) -> dict[str, Any]:
    return {name.replace("__", "/"): value for name, value in values.items()}


def names(history: list[Record]) -> list[str]:
    return [finding.name for finding in diagnose(history)]


@pytest.mark.parametrize("steps", [0, 10, 50, 100, 150, 200, 1000, 5000])
@pytest.mark.parametrize("every", [10, 100])
def test_a_healthy_run_is_left_in_peace(steps: int, every: int) -> None:
    assert names(run(steps=steps, every=every)) == []


def test_the_beginning_of_a_long_warmup_is_left_in_peace() -> None:
    """For its first hundreds of steps a network with a small learning rate stays where initialisation put it."""
    for steps in range(10, 900, 10):
        history = run(lambda step: {**healthy(step // 100), "step": step, "lr": 1e-7 * step}, steps=steps)
        assert names(history) == [], steps


def test_slow_improvement_is_improvement() -> None:
    slow = run(lambda step: slashed({"features__cls_std": 1e-4 * step, "features__rankme": 1 + 1e-3 * step}))
    assert names(slow) == []


SPREAD = {"features__cls_std": 0.6}
UNTRAINED = {"loss__dino_global": LN_K, "teacher__entropy": LN_K, "features__cls_std": 0.01, "features__rankme": 1.1}
FAULTS: dict[str, tuple[str, dict[str, float]]] = {
    "same features": ("constant output", {"features__cls_std": 1e-3, "features__cls_cosine": 0.999999}),
    "same targets": (
        "constant output",
        {"teacher__entropy": 0.01, "teacher__marginal_entropy": 0.02, "prototypes__perplexity": 1.02},
    ),
    "one direction": ("rank collapse", {"features__rankme": 1.3, **SPREAD}),
    "uniform": ("uniform output", {"teacher__entropy": LN_K - 0.02, "loss__dino_global": LN_K, **SPREAD}),
    "dead": ("dead prototypes", {"prototypes__dead_share": 0.8}),
    "stuck": ("loss stuck at ln K", {"loss__dino_global": LN_K}),
    "no learning rate": (
        "loss stuck at ln K",
        {"lr": 0.0, "teacher__ema_distance": 0.0, **UNTRAINED},
    ),
    "no gradient": (
        "loss stuck at ln K",
        {"grad_norm__backbone": 0.0, **UNTRAINED},
    ),
    "teacher shared": ("teacher is student", {"teacher__ema_distance": 0.0}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_within_200_steps_and_only_it(fault: str) -> None:
    name, values = FAULTS[fault]
    history = run(**slashed(values))
    assert names(history) == [name]
    (finding,) = diagnose(history)
    assert all((finding.what, finding.cause, finding.remedy)) and "\n" not in str(finding)


def test_a_fault_that_comes_later_is_named_then() -> None:
    broken = run(
        lambda step: slashed({"features__cls_std": 1e-4, "features__cls_cosine": 1.0}) if step > 2000 else {}, 2150
    )
    assert names([record for record in broken if record["step"] <= 2000]) == []
    assert names(broken) == ["constant output"]


def test_monitors_may_be_rarer_than_losses() -> None:
    history = run(**slashed({"loss__dino_global": LN_K}), steps=400)
    rare = [r if r["step"] % 100 == 0 else {k: r[k] for k in ("step", "loss/total", "lr")} for r in history]
    assert names(rare) == ["loss stuck at ln K"]


def test_a_small_batch_cannot_show_dead_prototypes() -> None:
    assert names(run(**slashed({"prototypes__dead_share": 0.99, "teacher__entropy": 2.0}))) == []


def test_a_high_but_falling_loss_is_not_stuck() -> None:
    assert names(run(lambda step: {"loss/dino_global": LN_K * 1.5 - 0.001 * step})) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_numbers_come_first_and_at_once(value: float) -> None:
    history = run(steps=20)
    history[-1] = {**history[-1], "loss/koleo": value, "throughput/mfu": math.nan}
    history.append({"step": 20.0, "knn/top1": 0.5})
    (finding,) = diagnose(history)
    assert finding.name == "non-finite numbers" and "loss/koleo" in finding.what and "mfu" not in finding.what


def test_the_rest() -> None:
    assert names(run(**slashed({"throughput__data_wait_share": 0.6}))) == ["data starving"]
    assert names(run(lambda step: {"data/bad": 2.0 * step})) == ["bad samples"]
    assert names(run(lambda step: {"data/bad": 0.1 * step})) == []


def test_knn_that_falls_below_its_start() -> None:
    def scored(*scores: float) -> list[Record]:
        history = run()
        return history + [{"step": 200.0 + i, "knn/top1": score} for i, score in enumerate(scores)]

    assert names(scored(0.7, 0.5, 0.4)) == ["k-NN below its start"]
    assert names(scored(0.7, 0.5, 0.75)) == []
    assert names(scored(0.7, 0.5)) == []  # one dip is no trend


# -------------------------------------------------------------------------------------------------------- real runs

PROTOTYPES, WIDTH = 128, 32
SCENES = nn.functional.interpolate(
    1.5 * torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(1)), size=(24, 24), mode="bilinear"
)


def make_crops(step: int, images: int = 32) -> Crops:
    """Noisy cuts from 64 blurred scenes; every other image has masks."""
    rng = torch.Generator().manual_seed(step)
    which = torch.randint(0, len(SCENES), (images, 1), generator=rng)

    def cut(count: int, size: int) -> Tensor:
        windows = SCENES.unfold(2, size, 1).unfold(3, size, 1)  # (64, 3, y, x, size, size)
        y, x = torch.randint(0, 24 - size + 1, (2, images, count), generator=rng)
        crops = windows[which, :, y, x]
        return crops + 0.2 * torch.randn(crops.shape, generator=rng)

    masks = torch.zeros(images, 2, 16, dtype=torch.bool)
    masks[::2, :, :5] = True
    return Crops(cut(2, 16), cut(2, 8), masks, masks.flatten().nonzero()[:, 0])


class Run:
    """A few steps of self-distillation on a tiny ViT, with the metrics that the trainer logs."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        head = HeadConfig(prototypes=PROTOTYPES, hidden_dim=64, bottleneck_dim=WIDTH)
        self.cfg = ObjectiveConfig(dino=DinoConfig(head=head))
        model = ModelConfig(
            embed_dim=WIDTH, depth=2, num_heads=2, patch_size=4, image_size=16, num_registers=2, layerscale=1.0
        )
        self.objective = SelfDistillation(self.cfg, model, Ranks.alone())
        self.objective.init_weights()
        self.lr, self.temperature = 2e-3, 0.05
        self.after_step: Callable[[], None] = lambda: None
        self.history: list[Record] = []

    def backbones(self) -> list[nn.Module]:
        return [self.objective.student["backbone"], self.objective.teacher["backbone"]]

    def go(self, steps: int = 200) -> list[str]:
        """Train until the doctor says something, or for all steps; returns what it says at last."""
        optimizer = torch.optim.AdamW(self.objective.student.parameters(), lr=self.lr)
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            metrics, seen = self.objective.forward_backward(
                [make_crops(step)], teacher_temperature=self.temperature, seed=step, observe=step % 10 == 0
            )
            student, teacher = self.backbones()
            metrics["grad_norm/backbone"] = nn.utils.clip_grad_norm_(student.parameters(), 3.0)
            optimizer.step()
            self.after_step()
            self.objective.update_teacher(0.95)
            if seen is None:
                continue
            metrics |= measure(seen, MonitorConfig(), Ranks.alone())
            metrics["teacher/ema_distance"] = weight_distance(teacher, student, Ranks.alone())
            fixed = {"step": step, "lr": self.lr, "plateau/dino": math.log(PROTOTYPES)}
            self.history.append({**fixed, **{name: float(value) for name, value in metrics.items()}})
            if found := names(self.history):
                return found
        return []


def change_features(run: Run, networks: list[nn.Module], change: Callable[[Tensor], Tensor]) -> None:
    def hook(_: nn.Module, __: Any, found: list[Features]) -> list[Features]:
        return [replace(each, cls=change(each.cls), patches=change(each.patches)) for each in found]

    def tokens(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def changed(*args: Any) -> tuple[Tensor, Tensor]:
            cls, patches = original(*args)
            return change(cls), change(patches)

        return changed

    for network in networks:
        network.register_forward_hook(hook)
        network.forward_tokens = tokens(network.forward_tokens)  # type: ignore[assignment]


def blind(run: Run) -> None:
    """Both networks get the same image, whatever the crop."""
    for network in run.backbones():
        original = network.embed
        network.embed = lambda images, *rest, original=original: original(list(map(torch.zeros_like, images)), *rest)  # type: ignore[assignment]


def heat(run: Run) -> None:
    run.temperature = 100.0


def push_prototypes_away(run: Run) -> None:
    """Seven in ten prototypes answer 0 to everything."""

    def push() -> None:
        for network in (run.objective.student, run.objective.teacher):
            with torch.no_grad():
                network["dino_head"].last_layer.weight_g[: 7 * PROTOTYPES // 10] = 0

    push()
    run.after_step = push


def flatten(run: Run) -> None:
    direction = nn.functional.normalize(torch.randn(WIDTH), dim=0)
    change_features(run, run.backbones(), lambda x: (x @ direction)[..., None] * direction)


def freeze(run: Run) -> None:
    run.lr = 0.0


def cut_gradient(run: Run) -> None:
    change_features(run, run.backbones()[:1], lambda x: x.detach() + 0 * x)


def deafen(run: Run) -> None:
    """The student's answers are too soft to ever match the targets."""
    run.cfg.targets.student_temperature = 1000.0


def share(run: Run) -> None:
    run.objective.teacher = run.objective.student


INJECTED = {
    blind: "constant output",
    heat: "uniform output",
    push_prototypes_away: "dead prototypes",
    flatten: "rank collapse",
    freeze: "loss stuck at ln K",
    deafen: "loss stuck at ln K",
    share: "teacher is student",
}


@pytest.mark.parametrize(("fault", "name"), INJECTED.items(), ids=[fault.__name__ for fault in INJECTED])
def test_an_injected_fault_is_named_within_200_steps(fault: Callable[[Run], None], name: str) -> None:
    run = Run()
    fault(run)
    assert run.go() == [name]


def test_a_backbone_without_gradient_is_named() -> None:
    run = Run()
    cut_gradient(run)
    (found,) = run.go()
    assert found in ("backbone at rest", "loss stuck at ln K")  # the head alone may still learn something


def test_the_run_without_a_fault_is_left_in_peace() -> None:
    run = Run()
    assert run.go() == []
    assert run.history[-1]["loss/dino_global"] < 0.99 * math.log(PROTOTYPES)  # it did learn
