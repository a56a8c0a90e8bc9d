"""The plan's arithmetic against counters that watch real modules run."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dinoreg.config import load
from dinoreg.models.vit import build_vit
from dinoreg.train.flops import kept_share, masked_patches, peak_of, sequences, step_flops, traced_step_flops
from dinoreg.train.plan import count_parameters, estimate_memory, print_plan, warnings_of
from dinoreg.train.recipe import RunConfig

SMALL = (
    "model.arch=vit_tiny",
    "model.depth=3",
    "model.patch_size=8",
    "model.image_size=64",
    "crops.global_size=64",
    "crops.local_size=32",
    "crops.local_count=3",
    "objective.dino.head.prototypes=256",
    "objective.dino.head.hidden_dim=128",
    "objective.dino.head.bottleneck_dim=32",
    "train.steps=100",
)


def small(*overrides: str) -> RunConfig:
    return load(RunConfig, None, [*SMALL, *overrides])


def crops_of(config: RunConfig, images: int) -> list[torch.Tensor]:
    sizes = [(2, config.crops.global_size), (config.crops.local_count, config.crops.local_size)]
    return [torch.rand(count * images, 3, side, side) for count, side in sizes]


# -- operations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.ffn=swiglu", "model.num_registers=0"],
        ["model.in_channels=1", "photometric.mean=[0.5]", "photometric.std=[0.2]", "crops.local_count=0"],
        ["objective.ibot.separate_head=true", "objective.ibot.head.prototypes=512", "objective.dino.head.layers=1"],
        ["objective.ibot.weight=0", "model.pos_offset=0.1", "model.pos_antialias=false", "model.layerscale=0"],
        ["objective.dino.weight=0", "masks.probability=0.3", "model.arch=vit_so400m", "model.embed_dim=144"],
    ],
)
def test_formula_equals_fvcore(overrides: list[str]) -> None:
    config = small(*overrides)
    assert step_flops(config)[0] == pytest.approx(traced_step_flops(config), rel=1e-9)


@pytest.mark.parametrize(("drop_path", "shape"), [(0.0, "uniform"), (0.5, "uniform"), (0.5, "linear")])
def test_formula_equals_a_real_forward_and_backward(drop_path: float, shape: str) -> None:
    """torch's own counter watches student and teacher at work; dropped rows and those that no loss looks at are not."""
    config = small(f"model.drop_path={drop_path}", f"model.drop_path_shape={shape}", "objective.ibot.weight=0")
    images = 16
    student = build_vit(config.model, attention="sdpa").train()
    teacher = build_vit(config.model, attention="sdpa", drop_path=False).eval().requires_grad_(False)
    for network in (student, teacher):
        network.init_weights()
    crops = crops_of(config, images)
    # The fused attention of CPUs is unknown to the counter; the plain one is two matrix products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        nothing = torch.zeros(0, dtype=torch.int64)
        teacher.forward_tokens(crops[:1], [None], nothing)
        student.forward_tokens(crops, [None] * 2, nothing)[0].sum().backward()
    model_only = step_flops(small(*_without_heads(config)))
    expected = model_only[1]
    # No gradient is needed with respect to the pixels, so the patch embedding costs two forwards and not three.
    pixels = sum(2.0 * crop.numel() * config.model.size.embed_dim for crop in crops) / images
    assert counter.get_total_flops() / images == pytest.approx(expected - pixels, rel=1e-3)
    assert expected < model_only[0]


def _without_heads(config: RunConfig) -> list[str]:
    tiny = [f"objective.dino.head.{key}=1" for key in ("prototypes", "hidden_dim", "bottleneck_dim", "layers")]
    drop = [f"model.drop_path={config.model.drop_path}", f"model.drop_path_shape={config.model.drop_path_shape}"]
    return [*drop, *tiny, "objective.ibot.weight=0"]


def test_masked_patches_are_the_mean_of_the_masks() -> None:
    config = small("train.batch_size=64")
    assert masked_patches(config) == pytest.approx(
        2 * 0.5 * 64 * 0.3, rel=0.03
    )  # 64 patches, half of 2 crops, 0.1 to 0.5
    assert masked_patches(small("objective.ibot.weight=0")) == 0


def test_published_size_of_the_long_setup() -> None:
    """About 2.06 T nominal and 1.38 T executed for ViT-L/14 with 2 + 8 crops, estimated apart, without registers."""
    nominal, executed = step_flops(load(RunConfig, "vitl14_in22k", ["model.num_registers=0"]))
    assert nominal == pytest.approx(2.06e12, rel=0.1) and executed == pytest.approx(1.38e12, rel=0.1)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("AMD Something", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak


# -- size and memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "ffn", "millions"),
    [
        ("vit_small", "mlp", 22.06),
        ("vit_base", "mlp", 86.58),
        ("vit_large", "mlp", 304.37),
        ("vit_giant", "swiglu", 1136.48),
    ],
)
def test_parameters_of_the_public_models(arch: str, ffn: str, millions: float) -> None:
    config = load(
        RunConfig,
        None,
        ["train.steps=1", f"model.arch={arch}", f"model.ffn={ffn}", "model.image_size=518", "model.num_registers=0"],
    )
    assert count_parameters(config)["backbone"] / 1e6 == pytest.approx(millions, abs=0.005)


def saved_numbers(config: RunConfig, images: int) -> int:
    """Numbers in the tensors that autograd keeps in the student's forward, parameters left out, shared storage once."""
    model = build_vit(config.model, attention="sdpa").train()
    model.init_weights()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = model(crops_of(config, images))
    assert features
    return sum(storage.nbytes() for storage in kept.values()) // 4


@pytest.mark.parametrize(
    "overrides", [["model.depth=8"], ["model.depth=8", "model.ffn=swiglu"], ["model.depth=8", "model.drop_path=0.5"]]
)
def test_activation_memory_is_what_autograd_keeps(overrides: list[str]) -> None:
    images = 4
    config = small(*overrides, f"train.batch_size={images}", "train.precision=fp32")
    estimate = estimate_memory(config, world=1).activations / 4
    # SDPA's results are kept by resolution, for its own backward pass, and packed; other backends have only the latter.
    size, tokens = config.model.size, sum(n * (1 + config.model.num_registers + p) for n, p in sequences(config))
    twice = images * tokens * size.depth * kept_share(config.model) * size.embed_dim
    assert estimate + twice == pytest.approx(saved_numbers(config, images), rel=0.1)


def test_memory_falls_with_gpus_checkpointing_and_parts() -> None:
    def total(world: int, *overrides: str) -> float:
        return estimate_memory(load(RunConfig, "vitl16_short_in1k", overrides), world).total

    assert total(8) > total(16) > total(32)
    none, selective, full = (
        total(8, f"efficiency.activation_checkpointing={m}") for m in ("none", "selective", "full")
    )
    assert none > selective > full
    assert total(8) > total(8, "train.accumulate=4")
    state = [
        estimate_memory(load(RunConfig, "vitg14", [f"efficiency.shard={s}"]), 64).state
        for s in ("full", "hybrid", "none")
    ]
    assert state[1] == 8 * state[0] and state[2] == 64 * state[0]


# -- what is printed -------------------------------------------------------------------------------------------------


def printed(config: RunConfig) -> str:
    out = io.StringIO()
    print_plan(config, Console(file=out, width=200))
    return out.getvalue()


def test_plan_needs_neither_data_nor_gpu() -> None:
    text = printed(small("train.batch_size=256"))
    for words in (
        "vit_tiny/8, 3 blocks of 192",
        "by fvcore",
        "100 steps x 256 images = 25,600 images",
        "not given yet",
    ):
        assert words in text
    assert "data.sources: no such file or folder" in printed(small("data.sources=/no/such/folder"))
    assert "unknown: train.epochs: epochs need sources" in printed(small("train.steps=null", "train.epochs=3"))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.batch_size=16"], "train.batch_size 16"),
        (["objective.dino.head.prototypes=65536"], "here 2048"),
        (["objective.teacher.momentum=0.9995"], "averages over 2,000 steps of a run of 100"),
        (["objective.targets.temperature=0.1"], "more than 0.07"),
        (["crops.global_size=72"], "resampled"),
    ],
)
def test_warnings(overrides: list[str], says: str) -> None:
    calm = ["train.batch_size=64", "objective.teacher.momentum=0.8"]
    assert warnings_of(small(*calm), 1000) == []
    found = warnings_of(small(*calm, *overrides), 1000)
    assert len(found) == 1 and says in found[0]
    assert any("more than once" in warning for warning in warnings_of(small(*calm), 10))
