"""Operations that keep less for the backward pass give what the plain ones give, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_model import SMALL, images, make
from torch import Tensor, nn

from dinoreg.models.frugal import Linear, add_rows, linear_of
from dinoreg.models.layers import Block, SwiGLU
from dinoreg.models.packing import KeptRows, Packing, draw_kept_rows
from dinoreg.models.vit import VisionTransformer
from dinoreg.parallel.shard import checkpoint_blocks

PACKING = Packing.of([(4, 5), (6, 3)])
MAKERS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None, "norm": nn.LayerNorm(12).double(), "gelu": nn.GELU(), "swiglu": SwiGLU.activation,
}  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weights = normal(*out.shape, seed=9)
    return list(torch.autograd.grad((out * weights).sum(), leaves))


def same(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("gained", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_of(kind: str, gained: bool, bias: bool) -> None:
    make_ = MAKERS[kind]
    x, gain = normal(7, 12).requires_grad_(), normal(5, seed=1).requires_grad_()
    layer = Linear(6 if kind == "swiglu" else 12, 5, bias=bias).double()
    own = list(make_.parameters()) if isinstance(make_, nn.Module) else []
    leaves = [x, *layer.parameters(), *own, *([gain] if gained else [])]
    made = x if make_ is None else make_(x)
    plain = layer(made) * gain if gained else layer(made)
    ours = linear_of(make_, x, layer, gain if gained else None)
    torch.testing.assert_close(ours, plain)
    same(gradients(ours, leaves), gradients(plain, leaves))


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    layer, norm = Linear(12, 5).double().requires_grad_(False), nn.LayerNorm(12).double()
    x = normal(7, 12).requires_grad_()
    norm.bias.requires_grad_(False)
    same(gradients(linear_of(norm, x, layer), [x, norm.weight]), gradients(layer(norm(x)), [x, norm.weight]))
    linear_of(norm, x, layer).sum().backward()
    assert layer.weight.grad is None and norm.bias.grad is None and norm.weight.grad is not None


def test_add_rows() -> None:
    x, branch = normal(9, 4).requires_grad_(), normal(5, 4, seed=1).requires_grad_()
    rows, gain = torch.tensor([7, 0, 3, 4, 8]), normal(5, 1, seed=2)
    ours, plain = add_rows(x, rows, branch, gain), x.index_add(0, rows, branch * gain)
    torch.testing.assert_close(ours, plain)
    same(gradients(ours, [x, branch]), gradients(plain, [x, branch]))


def plain_block(block: Block, x: Tensor, kept: KeptRows | None, packing: Packing = PACKING) -> Tensor:
    """Written plainly: norm, branch, gain, sum."""
    everything = packing, torch.arange(len(x))
    for branch, rows in ((block.attn, "attention"), (block.mlp, "ffn")):
        norm, scale = (block.norm1, block.ls1) if rows == "attention" else (block.norm2, block.ls2)
        layout, which = everything if kept is None else (kept.packing, getattr(kept, rows))
        hidden = norm(x if kept is None else x[which])
        if rows == "attention":
            q, k, v = branch.qkv(hidden).unflatten(-1, (3, 2, -1)).unbind(1)
            heads = [[t.transpose(1, 2) for t in layout.split(each)] for each in (q, k, v)]
            mixed = [F.scaled_dot_product_attention(*each) for each in zip(*heads, strict=True)]
            out = branch.proj(torch.cat([m.transpose(1, 2).flatten(0, 1).flatten(1) for m in mixed]))
        else:
            out = branch(hidden)
        x = x + scale(out) if kept is None else x.index_add(0, which, scale(out) * kept.gain)
    return x


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("layerscale", [0.5, 0.0])
@pytest.mark.parametrize("drop", [0.5, 0.0])
@pytest.mark.parametrize("some", [False, True], ids=["all rows", "some rows"])
def test_a_block(ffn: str, layerscale: float, drop: float, some: bool) -> None:
    block = make(replace(SMALL, ffn=ffn, layerscale=layerscale)).double().train().blocks[0]
    assert isinstance(block, Block)
    (kept,) = draw_kept_rows(PACKING, [drop], torch.Generator().manual_seed(3), torch.float64)
    x = normal(PACKING.tokens, 32).requires_grad_()
    rows = torch.tensor([0, 5, 6, 21, 37]) if some else None
    ours, plain = block(x, PACKING, "sdpa", kept, rows), plain_block(block, x, kept)
    plain = plain if rows is None else plain[rows]
    torch.testing.assert_close(ours, plain)
    leaves = [x, *block.parameters()]
    same(gradients(ours, leaves), gradients(plain, leaves))


def looks(model: VisionTransformer, whole: bool, seed: int) -> tuple[Tensor, Tensor]:
    batches = [images(4).double(), images(6, 8, 8).double()]
    masks = [torch.rand(4, 16, generator=torch.Generator().manual_seed(1)) < 0.4, None]
    patches = masks[0].flatten().nonzero()[:, 0]  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(seed)
    if not whole:
        return model.forward_tokens(batches, masks, patches, generator)
    large, small = model(batches, masks, generator)
    return torch.cat([large.cls, small.cls]), large.patches.flatten(0, 1)[patches]


@pytest.mark.parametrize("drop", [0.5, 0.0])
@pytest.mark.parametrize("rope_base", [0.0, 100.0])
def test_chosen_tokens_are_those_of_the_whole_forward(drop: float, rope_base: float) -> None:
    """With the rows that drop path keeps, and with every gradient."""
    model = make(replace(SMALL, drop_path=drop, rope_base=rope_base)).double().train()
    results = []
    for whole in (False, True):
        cls, patches = looks(model, whole, seed=5)
        leaves = [p for p in model.parameters() if p.requires_grad]
        results.append([cls, patches, *gradients(torch.cat([cls, patches]), leaves)])
    same(*results)


def test_a_block_keeps_less_than_a_plain_one() -> None:
    block = make(replace(SMALL, embed_dim=64)).bfloat16().train().blocks[0]
    assert isinstance(block, Block)
    packing = Packing.of([(300, 5)])  # tokens enough to outweigh the scaled weights
    x = normal(packing.tokens, 64).bfloat16().requires_grad_()

    def kept(run: Callable[[], Tensor]) -> int:
        """Bytes for the backward pass, apart from parameters."""
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            held = run()
        parameters = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
        assert held.requires_grad
        return sum(size for pointer, size in sizes.items() if pointer not in parameters)

    assert kept(lambda: block(x, packing, "sdpa")) < 0.75 * kept(lambda: plain_block(block, x, None, packing))


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("some", [False, True], ids=["all rows", "some rows"])
def test_a_block_compiles_into_one_graph(some: bool, checkpointing: str) -> None:
    """Whole, without a break; with dropped rows, for the last block with the wanted ones, and where it runs again."""
    model = make(replace(SMALL, ffn="swiglu")).double().train()
    checkpoint_blocks(model, checkpointing)
    block = model.blocks[0]
    (kept,) = draw_kept_rows(PACKING, [0.5], torch.Generator().manual_seed(3), torch.float64)
    x = normal(PACKING.tokens, 32).requires_grad_()
    rows = torch.tensor([0, 5, 6, 21, 37]) if some else None
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=False)
    leaves = [x, *block.parameters()]
    ours, plain = compiled(x, PACKING, "sdpa", kept, rows), block(x, PACKING, "sdpa", kept, rows)  # type: ignore[operator]
    torch.testing.assert_close(ours, plain)
    same(gradients(ours, leaves), gradients(plain, leaves))
    assert len(graphs) == 1
