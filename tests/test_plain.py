"""Whole loss curves: dinoreg's step, with all that makes it fast, learns what a step written plainly learns."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from benchmarks.plain import PlainStep
from benchmarks.step import Bench, batches_of
from dinoreg.config import load
from dinoreg.data.photometric import develop
from dinoreg.parallel.mesh import Ranks, setup_ranks
from dinoreg.train.recipe import RunConfig
from dinoreg.train.schedules import Schedules, StepValues

SMALL = (
    "data.sources=[synthetic]", "train.steps=1000", "train.batch_size=8", "model.arch=vit_tiny", "model.embed_dim=48",
    "model.depth=3", "model.num_heads=3", "model.patch_size=8", "model.image_size=32", "crops.global_size=32",
    "crops.local_size=16", "crops.local_count=4", "objective.dino.head.prototypes=256",
    "objective.dino.head.hidden_dim=64", "objective.dino.head.bottleneck_dim=32", "objective.koleo.group=0",
    "model.layerscale=0.1", "model.drop_path=0", "optim.warmup=0", "train.precision=fp32",
)  # fmt: skip
STEPS = 40
LR = "optim.lr=0.02"  # 0.0018 at this batch


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[Ranks]:
    """bf16 weights are kept by FSDP, which wants a process group."""
    ranks = setup_ranks()
    yield ranks
    ranks.close()


def curve(ranks: Ranks, *words: str) -> dict[str, Tensor]:
    """Losses (STEPS,) by name, of dinoreg's own step."""
    bench = Bench(load(RunConfig, None, [*SMALL, LR, *words]), ranks)
    bench.values = schedule(bench.cfg)
    return _stacked([bench.step() for _ in range(STEPS)])


def schedule(cfg: RunConfig) -> StepValues:
    return Schedules(cfg, num_samples=None).at(100)


@lru_cache(maxsize=8)
def plain_curve(*words: str) -> dict[str, Tensor]:
    cfg = load(RunConfig, None, [*SMALL, LR, *words])
    ranks = Ranks.alone()
    batches, plain, values = batches_of(cfg, ranks), PlainStep.build(cfg, ranks.device), schedule(cfg)
    return _stacked([plain.step(develop(next(batches), cfg.photometric), values) for _ in range(STEPS)])


def _stacked(steps: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([step[name] for step in steps]).double() for name in steps[0] if name.startswith("loss/")}


def apart(one: dict[str, Tensor], other: dict[str, Tensor], steps: int = STEPS) -> float:
    """The largest difference of any loss in the first steps."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name])[:steps].abs().max()) for name in one)


def assert_the_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Rounding differs, and training magnifies it: 1e-6 in the first steps has become 1e-6 to 4e-4 in the last."""
    assert apart(one, other, steps=5) < 2e-5
    assert apart(one, other) < 1e-3


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["objective.targets.centering=centering", "model.num_registers=0"],
        ["objective.ibot.separate_head=true", "objective.ibot.head.prototypes=128", "model.ffn=swiglu"],
        ["objective.ibot.weight=0", "model.layerscale=0", "objective.koleo.group=4"],
        ["objective.dino.weight=0", "objective.koleo.weight=0"],
    ],
    ids=["sinkhorn", "centering", "separate heads, SwiGLU", "DINO alone, KoLeo in groups", "iBOT alone"],
)
def test_the_same_loss_curve(words: list[str], alone: Ranks) -> None:
    plain, ours = plain_curve(*words), curve(alone, *words)
    moved = max(float((losses - losses[0]).abs().max()) for losses in plain.values())
    assert moved > 0.1, "nothing was learnt, so nothing was compared"
    assert_the_same(plain, ours)


@pytest.mark.parametrize(
    "word",
    [
        "efficiency.activation_checkpointing=selective",
        "efficiency.activation_checkpointing=full",
        "efficiency.attention=matmul",
        "train.accumulate=2",
    ],
)
def test_no_lever_bends_the_curve(word: str, alone: Ranks) -> None:
    assert_the_same(plain_curve(), curve(alone, word))


@pytest.mark.parametrize("words", [[], ["efficiency.activation_checkpointing=selective"]], ids=["kept", "recomputed"])
def test_bf16_strays_no_further_than_a_few_times_plain_autocast(words: list[str], alone: Ranks) -> None:
    """Both against the plain step in fp32. Here weights are rounded too, and residuals: 1.5 to 3 times as far."""
    noise = apart(plain_curve(), plain_curve("train.precision=bf16"))
    assert apart(plain_curve(), curve(alone, "train.precision=bf16", *words)) < 3 * noise


def test_stochastic_depth_of_either_kind_learns_alike(alone: Ranks) -> None:
    """Rows are dropped by other random numbers, so curves are near and not equal."""
    word = "model.drop_path=0.3"
    plain, ours = plain_curve(word), curve(alone, word)
    for name in ("loss/dino_global", "loss/dino_local", "loss/ibot", "loss/total"):
        assert float(ours[name][-20:].mean()) == pytest.approx(float(plain[name][-20:].mean()), rel=0.02), name
