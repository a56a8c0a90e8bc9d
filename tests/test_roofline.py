"""Bounds of a step's speed: operations against sums made by hand, and a whole step against dinoreg/train/flops.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import roofline
from benchmarks.fake import load_recipe
from benchmarks.operations import Counter, Operation, Stretch, operations_of
from benchmarks.roofline import Machine, compiled
from dinoreg.parallel.mesh import Ranks, setup_ranks
from dinoreg.train.cluster import GPUS
from dinoreg.train.flops import peak_of, step_flops


@pytest.fixture
def alone() -> Iterator[Ranks]:
    """bf16 weights are kept by FSDP, which wants a process group."""
    ranks = setup_ranks()
    yield ranks
    ranks.close()


def counted(run: Callable[..., Any], *tensors: Tensor) -> list[Operation]:
    with Counter() as counter:
        run(*tensors)
    return counter.operations


def size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_a_linear_layer() -> None:
    x, weight = torch.ones(7, 5, dtype=torch.bfloat16), torch.ones(3, 5, dtype=torch.bfloat16)
    (product,) = counted(F.linear, x, weight)
    assert (product.kind, product.flops, product.width) == ("products", 2 * 7 * 5 * 3, 2)
    assert product.bytes == 2 * (7 * 5 + 5 * 3 + 7 * 3)


def test_attention_has_no_weights_in_memory() -> None:
    q = torch.ones(2, 3, 16, 8)
    (attention,) = counted(F.scaled_dot_product_attention, q, q, q)
    assert (attention.kind, attention.flops) == ("attention", 4 * 2 * 3 * 16**2 * 8)
    assert 4 * size(q) <= attention.bytes < 5 * size(q)


@pytest.mark.parametrize(
    ("run", "bytes_"),
    [
        (lambda x: x.view(-1).unflatten(0, (8, 3)).T.detach(), None),
        (torch.empty_like, None),
        (lambda x: x + 1, 2 * 96),
        (torch.zeros_like, 96),
        (lambda x: x.add_(torch.empty(4, 6)), 3 * 96),
        (lambda x: x[:2].mul_(2), 2 * 48),
        (lambda x: x.zero_(), 96),
        (lambda x: torch.empty(4, 6).copy_(x), 2 * 96),
        (lambda x: x + x[:1].expand(4, 6), 96 + 24 + 96),
        (lambda x: x.index_select(0, torch.arange(2)), (16, 48 + 16 + 48)),
        (lambda x: x.index_add_(0, torch.arange(2), torch.empty(2, 6)), (16, 48 + 16 + 48 + 48)),
        (lambda x: x.index_add(0, torch.arange(2), torch.empty(2, 6)), (16, 96 + 16 + 48 + 96 + 2 * 48)),
        (lambda x: torch._foreach_mul_([x, x[:2]], 2.0), 2 * (96 + 48)),
    ],
)  # fmt: skip
def test_bytes(run: Callable[[Tensor], Any], bytes_: int | tuple[int, ...] | None) -> None:
    """Of operations on a (4, 6) in fp32."""
    wanted = () if bytes_ is None else bytes_ if isinstance(bytes_, tuple) else (bytes_,)
    assert tuple(each.bytes for each in counted(run, torch.ones(4, 6))) == wanted


def test_the_longer_of_arithmetic_and_bytes_and_a_launch() -> None:
    machine, nothing = Machine("H200", products=0.5, attention=0.25, bandwidth=0.5, launch=1.0), Stretch(0, 0, 0)
    gpu = GPUS["H200"]
    peak = peak_of(gpu.name)
    assert peak is not None
    by_arithmetic = Operation("products", 2 * peak, 2, (nothing,), (nothing,))
    assert machine.seconds(by_arithmetic) == pytest.approx(4 + 1)
    by_bytes = Operation("attention", peak, 2, (Stretch(0, 0, int(gpu.memory_bandwidth)),), (nothing,))
    assert machine.seconds(by_bytes) == pytest.approx(4 + 1)
    assert machine.seconds(Operation("moving", 0.0, 4, by_bytes.reads, by_bytes.reads)) == pytest.approx(4 + 1)


def test_a_run_within_a_block_is_one_kernel() -> None:
    """From 0 by way of 1 to 2, once more from 0 to 3, then a product of 2 and 3; after which 0 is read elsewhere."""

    def moving(source: int, target: int, place: int = 5) -> Operation:
        return Operation("moving", 0.0, 2, (Stretch(source, 0, 10),), (Stretch(target, 0, 10),), place)

    product = Operation("products", 1.0, 2, (Stretch(2, 0, 10), Stretch(3, 0, 10)), (Stretch(4, 0, 10),), 5)
    last = [moving(4, 5, place=6), moving(5, 6, place=0), moving(6, 7, place=0)]
    fused, *rest = compiled([moving(0, 1), moving(1, 2), moving(0, 3), product, *last])
    assert fused.reads == (Stretch(0, 0, 10),)
    assert set(fused.writes) == {Stretch(2, 0, 10), Stretch(3, 0, 10)}
    assert rest == [product, *last]


@pytest.mark.parametrize("recipe", ["vits14_in1k", "vitl14_in22k"])
def test_arithmetic_of_a_step_is_what_the_formulas_say(recipe: str, alone: Ranks) -> None:
    """But for attention's weights, which its backward makes again, and for images, which want no gradient."""
    cfg = load_recipe(recipe, ["train.batch_size=10", "model.depth=8"])  # drop path leaves whole numbers of 10
    for side, flops in zip(("plain", "none"), step_flops(cfg), strict=True):
        operations = operations_of(cfg, side, alone)
        assert sum(each.flops for each in operations) / cfg.train.batch_size == pytest.approx(flops, rel=0.01)
    passes = {each.place for each in operations if each.kind == "products" and each.place > 0}
    assert len(passes) == 3 * cfg.model.size.depth  # of the teacher, of the student, and back
    eager, fused = (
        sum(each.bytes for each in some if each.place > 0 and each.kind == "moving")
        for some in (operations, compiled(operations))
    )
    assert 0.2 * eager < fused < 0.8 * eager


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "found.json"
    words = ["vits14_in1k", "model.depth=1", "train.batch_size=2", "--gpu", "A100", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["roofline", *words])
    roofline.main()
    (found,) = json.loads(out.read_text())["found"]
    for bound in found["bounds"].values():
        assert sum(bound["shares"][kind] for kind in roofline.KINDS) == pytest.approx(1)
    rates = [bound["images_per_second"] for bound in found["bounds"].values()]
    assert rates == sorted(rates)
