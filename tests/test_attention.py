"""Attention backends: one function, chosen by what can run, refused in words."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoreg.models import attention, xformers_backend
from dinoreg.models.attention import attend, resolve_backend
from dinoreg.models.layers import Block, Mlp
from dinoreg.models.packing import Packing
from dinoreg.models.vit import ModelConfig, build_vit
from dinoreg.parallel.shard import checkpoint_blocks

CPU, F32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def undecided() -> Iterator[None]:
    """Decisions of one test are not remembered in the next."""
    resolve_backend.cache_clear()
    xformers_backend._mask.cache_clear()
    yield
    resolve_backend.cache_clear()


def slow(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in float64, query by query within each sequence."""
    out, start = torch.zeros_like(v, dtype=torch.float64), 0
    for length in lengths:
        for head in range(q.shape[1]):
            for i in range(start, start + length):
                scores = k[start : start + length, head].double() @ q[i, head].double() / q.shape[-1] ** 0.5
                weights = (scores - scores.max()).exp()
                out[i, head] = weights @ v[start : start + length, head].double() / weights.sum()
        start += length
    return out


@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_a_token_attends_within_its_sequence(backend: str) -> None:
    packing = Packing.of([(2, 5), (3, 2), (1, 7)])
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, packing.tokens, 2, 8, generator=generator).unbind(0)
    torch.testing.assert_close(
        attend(q, k, v, packing, backend).double(), slow(q, k, v, [5, 5, 2, 2, 2, 7]), rtol=0, atol=1e-5
    )


def test_packing_layout() -> None:
    packing = Packing.of([(2, 5), (3, 2)])
    assert packing.boundaries.tolist() == [0, 5, 10, 12, 14, 16] and packing.boundaries.dtype == torch.int32
    assert (packing.sequences, packing.tokens, packing.longest) == (5, 16, 5)
    first, second = packing.split(torch.arange(16))
    assert first.tolist()[1] == [5, 6, 7, 8, 9] and second.tolist() == [[10, 11], [12, 13], [14, 15]]
    assert packing == Packing.of([(2, 5), (3, 2)]) and packing != Packing.of([(1, 5), (3, 2)])


def test_cpu_takes_sdpa_without_importing_xformers(caplog: pytest.LogCaptureFixture) -> None:
    before = "xformers" in sys.modules
    with caplog.at_level(logging.INFO):
        assert [resolve_backend("auto", CPU, F32) for _ in range(3)] == ["sdpa"] * 3
    assert ("xformers" in sys.modules) == before
    said = [r.message for r in caplog.records]
    assert len(said) == 1 and said[0].startswith("attention on cpu in float32: sdpa")  # said once


def test_a_cpu_in_bf16_takes_products_whose_gradients_are_those_of_sdpa() -> None:
    """benchmarks/attention.py says why. Both are as far from float64 as bf16 makes them."""
    assert resolve_backend("auto", CPU, BF16) == "matmul" and resolve_backend("auto", CPU, F32) == "sdpa"
    packing = Packing.of([(2, 40), (3, 7)])
    torch.manual_seed(0)
    exact, grad = torch.randn(3, packing.tokens, 2, 16, dtype=torch.float64), torch.randn(packing.tokens, 2, 16)
    gradients = {}
    for backend, dtype in (("sdpa", torch.float64), ("sdpa", BF16), ("matmul", BF16)):
        leaf = exact.clone().to(dtype).requires_grad_()
        attend(*leaf.unbind(0), packing, backend).backward(grad.to(dtype))
        assert leaf.grad is not None
        gradients[backend, dtype] = leaf.grad.double()
    truth = gradients["sdpa", torch.float64]
    errors = [float((gradients[backend, BF16] - truth).norm() / truth.norm()) for backend in ("sdpa", "matmul")]
    assert max(errors) < 0.01 and errors[1] < 2 * errors[0]


@pytest.mark.parametrize("name", ["xformers", "varlen"])
def test_asking_for_what_cannot_run_says_why(name: str) -> None:
    model = build_vit(ModelConfig(embed_dim=32, depth=1, num_heads=2, patch_size=4, image_size=8), attention=name)
    model.init_weights()
    with pytest.raises(
        ValueError, match=f"attention={name} cannot be used: it has no operator for CPU tensors"
    ) as caught:
        model.forward_features(torch.zeros(1, 3, 8, 8))
    assert "\n" not in str(caught.value)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="attention=flash is not known: choose auto, xformers, varlen, sdpa, matmul"):
        resolve_backend("flash", CPU, F32)


def test_varlen_takes_half_precision_only() -> None:
    assert "float32" in attention.unusable("varlen", torch.device("cuda"), F32, 64)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Trying a backend out answers from this dictionary: why it fails, empty where it works."""
    answers = {"xformers": "", "varlen": ""}
    monkeypatch.setattr(attention, "_try_out", lambda name, *_: answers[name])
    yield answers


def test_order_of_preference_on_cuda(fake_cuda: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    cuda = torch.device("cuda", 0)
    assert resolve_backend("auto", cuda, BF16) == "xformers"
    fake_cuda["xformers"] = "xformers is not installed"
    resolve_backend.cache_clear()
    with caplog.at_level(logging.INFO):
        assert resolve_backend("auto", cuda, BF16) == "varlen"
    assert "xformers: xformers is not installed" in caplog.text  # the choice is explained
    assert resolve_backend("auto", cuda, F32) == "sdpa"
    assert resolve_backend("sdpa", cuda, BF16) == "sdpa"


def stand_in(calls: list[Any]) -> dict[str, types.ModuleType]:
    """Modules that behave as far as we use them like xformers, in plain torch."""
    names = ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias")
    modules = {name: types.ModuleType(name) for name in names}

    class BlockDiagonalMask:
        @staticmethod
        def from_seqlens(lengths: list[int], *, device: torch.device) -> list[int]:
            calls.append(lengths)
            return lengths

    def scores(q: Tensor, k: Tensor, lengths: list[int]) -> Tensor:
        ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        products = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        return products.masked_fill(ids[:, None] != ids, float("-inf"))

    def forward(q: Tensor, k: Tensor, v: Tensor, attn_bias: list[int]) -> tuple[Tensor, Tensor]:
        if q.dtype == torch.float16:
            raise NotImplementedError("No operator found for this\nand a long explanation")
        logits = scores(q, k, attn_bias)
        return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v), logits.float().logsumexp(-1)

    def backward(
        grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, attn_bias: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        p = (scores(q, k, attn_bias).float() - lse[..., None]).exp().to(q.dtype)
        dp = torch.einsum("bqhd,bkhd->bhqk", grad, v) - (grad * out).sum(-1).transpose(1, 2)[..., None]
        ds = p * dp / q.shape[-1] ** 0.5
        return (
            torch.einsum("bhqk,bkhd->bqhd", ds, k),
            torch.einsum("bhqk,bqhd->bkhd", ds, q),
            torch.einsum("bhqk,bqhd->bkhd", p, grad),
        )

    modules["xformers.ops"].memory_efficient_attention = lambda *args, **kw: forward(*args, **kw)[0]  # type: ignore[attr-defined]
    fmha = modules["xformers.ops.fmha"]
    fmha.memory_efficient_attention_forward_requires_grad = forward  # type: ignore[attr-defined]
    fmha.memory_efficient_attention_backward = backward  # type: ignore[attr-defined]
    modules["xformers.ops.fmha.attn_bias"].BlockDiagonalMask = BlockDiagonalMask  # type: ignore[attr-defined]
    return modules


@pytest.fixture
def masks_built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The stand-in takes the place of xformers; lists the masks that were built."""
    calls: list[Any] = []
    for name, module in stand_in(calls).items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.mark.parametrize("dtype", [torch.float64, F32])  # fp32 takes another road than the rest
def test_xformers_path_with_a_stand_in(masks_built: list[Any], dtype: torch.dtype) -> None:
    """What xformers is asked gives SDPA's values and gradients; its mask is built once a layout."""
    packing = Packing.of([(2, 5), (3, 2)])
    qkv = torch.randn(packing.tokens, 3, 2, 8, dtype=dtype, requires_grad=True)
    results = []
    for backend in ("xformers", "sdpa", "xformers"):
        out = attend(*qkv.unbind(1), packing, backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    for one, other in ((results[0], results[1]), (results[2], results[1])):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert masks_built == [[5, 5, 2, 2, 2]]


def test_xformers_operator_is_well_formed(masks_built: list[Any]) -> None:
    """Schema, shapes without data, gradient and tracing agree with what it does."""
    q, k, v = torch.randn(16, 3, 2, 8, dtype=torch.float64, requires_grad=True).unbind(1)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(xformers_backend._attention, (q, k, v, [2, 5, 3, 2]), test_utils=tests)


def test_selective_recomputation_keeps_its_output(masks_built: list[Any]) -> None:
    """The operator's name is one that selective checkpointing saves: it runs once, also in the backward pass."""
    runs = []
    forward = sys.modules["xformers.ops.fmha"].memory_efficient_attention_forward_requires_grad
    counted = lambda *args, **kw: (runs.append(1), forward(*args, **kw))[1]  # noqa: E731
    sys.modules["xformers.ops.fmha"].memory_efficient_attention_forward_requires_grad = counted  # type: ignore[attr-defined]
    packing = Packing.of([(2, 5)])
    block = Block(16, 2, Mlp(16, 32), 1.0).double()
    block.init_weights()
    holder = torch.nn.Module()
    holder.blocks = torch.nn.ModuleList([block])
    checkpoint_blocks(holder, "selective")
    block(torch.randn(10, 16, dtype=torch.float64, requires_grad=True), packing, "xformers").sum().backward()
    assert len(runs) == 1


def test_trying_out_tells_the_first_line_of_a_refusal(masks_built: list[Any]) -> None:
    assert attention._try_out("xformers", CPU, F32, 8) == attention._try_out("xformers", CPU, BF16, 8) == ""
    assert attention._try_out("xformers", CPU, torch.float16, 8) == "No operator found for this"


def test_absent_xformers_is_called_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    assert "xformers is not installed (pip install 'dinoreg[cuda]')" in attention._try_out("xformers", CPU, BF16, 64)


@pytest.mark.parametrize("name", ["xformers", "sdpa"])
def test_compiled_blocks_equal_eager_ones(masks_built: list[Any], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Both kinds of forward, with and without drop path; graphs are captured whole and reused by the next block."""
    from torch._dynamo.testing import CompileCounter

    monkeypatch.setattr(attention, "unusable", lambda *_: "")
    cfg = ModelConfig(embed_dim=32, depth=3, num_heads=2, patch_size=4, image_size=16, layerscale=0.5, drop_path=0.4)
    torch.manual_seed(0)
    model = build_vit(cfg, attention=name).double()
    model.init_weights()
    batches = [torch.randn(4, 3, 16, 16), torch.randn(6, 3, 8, 8)]

    def both() -> list[Tensor]:
        kept = model.train()(batches, generator=torch.Generator().manual_seed(1))
        return [f.prenorm for f in [*kept, *model.eval()(batches)]]

    eager, counter = both(), CompileCounter()
    for block in model.blocks:
        block.compile(backend=counter, dynamic=False, fullgraph=True)
    try:
        for one, other in zip(eager, both(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        assert counter.frame_count == 2
        assert bool(masks_built) == (name == "xformers")
    finally:
        torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["xformers", "varlen", "sdpa"])
def test_backends_agree_on_a_gpu(name: str) -> None:
    device = torch.device("cuda")
    if why := attention.unusable(name, device, BF16, 64):
        pytest.skip(f"{name}: {why}")
    packing = Packing.of([(3, 201), (5, 41)], device)
    qkv = torch.randn(packing.tokens, 3, 4, 64, device=device, dtype=BF16, requires_grad=True)
    out = attend(*qkv.unbind(1), packing, name)
    (grad,) = torch.autograd.grad(out.float().square().sum(), qkv)
    exact = qkv.detach().float().requires_grad_()
    expected = attend(*exact.unbind(1), packing, "sdpa")
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), exact)
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(grad.float(), expected_grad, rtol=0.05, atol=0.05)
