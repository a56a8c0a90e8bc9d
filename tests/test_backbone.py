"""What the adapter of evaluations says agrees with the network, with itself and with the library of the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from foreign_models import huggingface, randomise
from torch import Tensor

from dinoreg.models.formats import IMAGENET, WeightsError
from dinoreg.models.vit import ModelConfig, build_vit
from dinoreg.models.weights import NORMALISATION_KEY, save_backbone
from eval.backbone import Backbone, open_backbone

SMALL = ModelConfig(embed_dim=32, depth=3, num_heads=2, patch_size=7, image_size=28, layerscale=0.5, num_registers=4)


def images(height: int = 28, width: int = 42, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=dtype)


def backbone(cfg: ModelConfig = SMALL, seed: int = 0) -> Backbone:
    model = build_vit(cfg)
    randomise(model, seed)
    return Backbone(model)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("registers", [0, 4])
def test_the_last_layer_is_what_the_network_returns(registers: int) -> None:
    ours = backbone(replace(SMALL, num_registers=registers))
    features = ours.model.forward_features(images())
    first, last, again = ours.layers(images(), [0, -1, 2])
    for got in (last, again):
        close(got.cls, features.cls)
        close(got.registers, features.registers)
        close(got.patches, features.patches)
        assert got.grid == (4, 6) and got.registers.shape == (2, registers, 32)
    assert not torch.allclose(first.cls, last.cls)
    (raw,) = ours.layers(images(), [-1], norm=False)
    close(torch.cat([raw.cls[:, None], raw.registers, raw.patches], 1), features.prenorm)
    assert not raw.cls.requires_grad and ours.layers(images(), []) == []


def test_blocks_after_the_last_wanted_are_not_run() -> None:
    ours = backbone()
    ran: list[int] = []
    for index, block in enumerate(ours.model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    ours.layers(images(), [-2])
    ours.qkv(images(), 1)
    assert ran == [0, 1, 0]
    for outside in (3, -4):
        with pytest.raises(IndexError):
            ours.layers(images(), [outside])
        with pytest.raises(IndexError):
            ours.attention(images(), outside)


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_attention_times_values_is_what_the_block_adds(layer: int) -> None:
    ours = backbone().to("cpu", torch.float64)
    batch = images(dtype=torch.float64)
    attention = ours.attention(batch, layer)
    tokens = 1 + 4 + 24
    assert attention.shape == (2, 2, tokens, tokens)
    close(attention.sum(-1), torch.ones(2, 2, tokens, dtype=torch.float64))
    q, k, v = ours.qkv(batch, layer)
    assert q.shape == k.shape == v.shape == (2, 2, tokens, 16)
    block = ours.model.blocks[layer]
    index = range(ours.depth)[layer]
    stream = [packing.split(x)[0] for x, packing in ours.model.residual_stream(batch)]
    mixed = (attention @ v).transpose(1, 2).flatten(2)
    after = stream[index] + block.ls1(block.attn.proj(mixed))  # type: ignore[operator,union-attr]
    after = after + block.ffn_branch(after)  # type: ignore[operator]
    close(after, stream[index + 1])


@pytest.mark.parametrize("registers", [None, 4])
@pytest.mark.parametrize("size", [(28, 28), (28, 42)])
def test_equals_huggingface_layer_by_layer(tmp_path: Path, registers: int | None, size: tuple[int, int]) -> None:
    theirs = huggingface(registers, attn_implementation="eager")
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    ours, batch, first = open_backbone(tmp_path), images(*size), 1 + (registers or 0)
    with torch.no_grad():
        expected = theirs(batch, output_hidden_states=True, output_attentions=True)
        embedded = theirs.embeddings.patch_embeddings(batch)  # type: ignore[operator,union-attr]
        for index, got in enumerate(ours.layers(batch, range(3))):
            state = theirs.layernorm(expected.hidden_states[index + 1])  # type: ignore[operator]
            close(got.cls, state[:, 0])
            close(got.registers, state[:, 1:first])
            close(got.patches, state[:, first:])
            close(ours.attention(batch, index), expected.attentions[index])
        close(ours.patch_embedding(batch), embedded)
    assert ours.found.startswith("Hugging Face: 3 blocks of width 32, 2 heads, patches of 7 at 28 pixels, ")
    assert f"{registers or 0} registers" in ours.found
    assert ours.normalisation == IMAGENET and ours.step is None


def test_a_run_directory_is_its_newest_teacher(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    (run / "teacher").mkdir(parents=True)
    with pytest.raises(WeightsError, match="no teacher yet"):
        open_backbone(run)
    for step in (20, 100):
        file = run / "teacher" / f"step_{step:08d}.safetensors"
        extra = {"step": str(step), NORMALISATION_KEY: "[[0.5, 0.5, 0.5], [0.2, 0.2, 0.2]]"}
        save_backbone(file, backbone(seed=step).model.state_dict(), SMALL, extra)
    ours = open_backbone(run)
    assert ours.found.endswith(", after 100 steps")
    assert ours.step == 100 and ours.name == "mine" and ours.normalisation == ([0.5, 0.5, 0.5], [0.2, 0.2, 0.2])
    alone = open_backbone(file)
    assert alone.digest == ours.digest and alone.name == "step_00000100.safetensors"
    close(ours.layers(images(), [-1])[0].cls, backbone(seed=100).layers(images(), [-1])[0].cls)


def test_the_digest_changes_with_a_weight_and_with_how_it_is_used() -> None:
    first, again = backbone(), backbone()
    assert first.digest == again.digest and len(first.digest) == 16
    int(first.digest, 16)
    other = backbone()
    with torch.no_grad():
        other.model.norm.bias[0] += 1e-6
    sampled = backbone(replace(SMALL, pos_antialias=False))
    assert len({first.digest, other.digest, sampled.digest, backbone(seed=1).digest}) == 4
