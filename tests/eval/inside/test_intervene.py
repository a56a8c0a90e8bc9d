"""Changes inside a network: none changes nothing, and each does what slow, obvious code does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dinoreg.models.vit import ModelConfig, VisionTransformer, build_vit
from eval.inside.intervene import EditedBlock, Edits, Groups, Reading, finish, hidden_activations, onward, run
from eval.inside.walk import walk

BASE = ModelConfig(embed_dim=32, depth=3, num_heads=2, patch_size=7, image_size=28, num_registers=0, layerscale=0.0)
KINDS = {
    "registers": replace(BASE, num_registers=3),
    "none": BASE,
    "rotary": replace(BASE, num_registers=2, rope_base=100.0),
    "layerscale": replace(BASE, layerscale=0.5, num_registers=1),
    "swiglu": replace(BASE, ffn="swiglu", num_registers=2, layerscale=0.3),
    "clip": replace(BASE, pre_norm=True, activation="quick_gelu"),
}


def network(kind: str) -> VisionTransformer:
    torch.manual_seed(0)
    model = build_vit(KINDS[kind])
    model.init_weights()
    for parameter in model.parameters():  # large enough that a misplaced one shows
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def by_hand(model: VisionTransformer, pictures: Tensor, cut: dict[int, Tensor], hidden: dict[int, Tensor]) -> Tensor:
    """fp64 (B, T, D): cut: by block, (T, T) bool; hidden: by block, (T, H) factors of the hidden activations."""
    model = model.double()
    x, packing, _ = model.embed([pictures.double()])
    x = packing.split(x)[0]
    for index, block in enumerate(model.blocks):
        q, k, v = block.attn.query_key_value(block.norm1(x.flatten(0, 1)), packing)
        q, k, v = (packing.split(part)[0] for part in (q, k, v))
        out = torch.zeros_like(q)
        for image in range(len(x)):
            for head in range(q.shape[2]):
                scores = q[image, :, head] @ k[image, :, head].T / q.shape[-1] ** 0.5
                if index in cut:
                    scores = scores.masked_fill(cut[index], -torch.inf)
                out[image, :, head] = scores.softmax(-1) @ v[image, :, head]
        x = x + block.ls1(block.attn.proj(out.flatten(2)))
        inner = hidden_activations(block.mlp, block.norm2(x)) * hidden.get(index, torch.ones(1))
        x = x + block.ls2((block.mlp.w3 if hasattr(block.mlp, "w3") else block.mlp.fc2)(inner))
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_without_changes_it_is_the_plain_network_bit_by_bit(kind: str) -> None:
    model = network(kind)
    features = model.forward_features(images())
    assert torch.equal(run(model, images()), features.prenorm)
    x, packing, _ = model.embed([images()])
    for (ours, _), (theirs, _) in zip(onward(model, x, packing), model.residual_stream(images()), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_edges_are_cut_and_neurons_changed_as_slow_code_does(kind: str) -> None:
    model = network(kind)
    groups = Groups.of(model.num_registers)
    tokens = 1 + model.num_registers + 16
    read = groups.registers if model.num_registers else groups.cls
    cut = torch.zeros(tokens, tokens, dtype=torch.bool)
    cut[groups.cls, groups.patches] = True
    also = torch.zeros_like(cut)
    also[groups.patches, read] = True
    width = hidden_activations(model.blocks[0].mlp, torch.zeros(1, 32)).shape[-1]
    factors = torch.rand(tokens, width, generator=torch.Generator().manual_seed(2))
    edits = Edits(
        readings={1: [Reading(groups.cls, groups.patches), Reading(groups.patches, read)]},
        hidden={0: lambda hidden: hidden * factors},
    )
    found = run(model, images(), edits)
    expected = by_hand(model, images(), {1: cut | also}, {0: factors.double()})
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_what_is_read_may_be_another_images_and_nobody_else_sees_it() -> None:
    model = network("registers")
    groups = Groups.of(3)
    streams = list(onward(model, *model.embed([images()])[:2]))
    x, packing = streams[1]
    tokens = packing.split(x)[0]
    same = finish(model, x, packing, Edits(readings={1: [Reading(groups.cls, groups.patches, tokens[:, 4:])]}), 1)
    torch.testing.assert_close(same, packing.split(streams[-1][0])[0], rtol=1e-5, atol=1e-5)
    other = tokens[:, groups.registers].roll(1, 0)
    edits = Edits(readings={1: [Reading(groups.cls, groups.registers, other)]})
    x2, _ = list(onward(model, x, packing, edits, 1))[1]
    after, plain = packing.split(x2)[0], packing.split(streams[2][0])[0]
    assert torch.equal(after[:, 1:], plain[:, 1:])
    assert (after[:, 0] - plain[:, 0]).abs().amax(-1).min() > 1e-3


def test_the_stream_is_edited_where_it_enters_a_block() -> None:
    model = network("none")
    seen = {}

    def note(index: int, x: Tensor) -> Tensor:
        seen[index] = x
        return x + 1 if index == 2 else x

    run(model, images(), Edits(stream={index: lambda x, index=index: note(index, x) for index in range(4)}))
    steps = list(walk(model, images()))
    for index in range(3):
        assert torch.equal(seen[index], steps[index].entering)
    assert not torch.equal(seen[3], steps[2].leaving)


def test_a_token_that_is_left_nothing_to_read_is_refused() -> None:
    model = network("none")
    with pytest.raises(ValueError, match="left something"):
        run(model, images(), Edits(readings={0: [Reading(slice(0, 1), slice(None))]}))


@pytest.mark.parametrize("kind", ["none", "swiglu"])
def test_an_edited_block_edits_whoever_runs_it(kind: str) -> None:
    model, edit = network(kind), lambda hidden: hidden * 0.5
    expected = run(model, images(), Edits(hidden={1: edit}))
    reading = Reading(slice(0, 1), slice(1, 3))
    both = run(model, images(), Edits(hidden={1: edit}, readings={1: [reading]}))
    model.blocks[1] = EditedBlock(model.blocks[1], edit)
    assert torch.equal(run(model, images()), expected)
    assert torch.equal(model.forward_features(images()).prenorm, expected)
    assert torch.equal(list(walk(model, images()))[-1].leaving, expected)
    run(model, images(1))  # another batch, whose layout must not be remembered
    assert torch.equal(run(model, images(), Edits(readings={1: [reading]})), both)
