"""What attention adds to CLS is the sum of what it reads from CLS, registers and patches, and the bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decoupled import DIM, pictures, random_network, reading
from foreign_models import huggingface, openclip_tower, timm_model
from torch import Tensor

from dinoreg.models.vit import VisionTransformer
from dinoreg.models.weights import load_backbone
from eval.inside.decoupling.split import GROUPS, Choices, Split, branch_outputs, outputs, split_cls
from eval.inside.walk import Step, walk

OWN: dict[str, dict[str, Any]] = {
    "LayerScale": {"num_registers": 4, "layerscale": 0.1},
    "no LayerScale": {"num_registers": 4, "layerscale": 0.0},
    "no registers": {"num_registers": 0},
    "rotary": {"num_registers": 2, "rope_base": 100.0},
    "SwiGLU, norm before": {"num_registers": 1, "ffn": "swiglu", "pre_norm": True},
    "another grid": {"num_registers": 4, "image_size": 48},
}


def open_foreign(kind: str, folder: Path) -> VisionTransformer:
    """A network with random weights as another library saves it."""
    if kind == "timm":
        model = timm_model(
            "vit_small_patch14_reg4_dinov2", img_size=28, embed_dim=192, depth=3, num_heads=3, init_values=0.5
        )
        torch.save(model.state_dict(), folder / "timm.pth")
        return load_backbone(folder / "timm.pth")
    if kind == "openclip":
        torch.save(openclip_tower().state_dict(), folder / "clip.pt")
        return load_backbone(folder / "clip.pt")
    huggingface(4).save_pretrained(folder / "dinov2")
    return load_backbone(folder / "dinov2")


def check_identity(model: VisionTransformer) -> None:
    model = model.double()
    for step in walk(model, pictures(3, size=model.config.image_size).double()):
        split = split_cls(step, model.num_registers)
        branch = step.attended[:, 0] - step.entering[:, 0]
        direct = step.block.attention_branch(step.entering.flatten(0, 1), step.packing, model.backend(step.entering))
        direct = direct.unflatten(0, step.entering.shape[:2])[:, 0]
        scale = direct.abs().max()
        assert (split.branch - direct).abs().max() < 1e-13 * scale
        assert (split.branch - branch).abs().max() < 1e-12 * max(scale, step.entering.abs().max())
        torch.testing.assert_close(split.shares.sum(-1), torch.ones_like(split.shares[..., 0]), atol=1e-14, rtol=0)


@pytest.mark.parametrize("name", OWN)
def test_the_parts_sum_to_the_attention_branch(name: str) -> None:
    check_identity(random_network(**OWN[name]))


@pytest.mark.parametrize("kind", ["timm", "openclip", "dinov2"])
def test_the_parts_sum_to_the_branch_of_networks_of_other_libraries(kind: str, tmp_path: Path) -> None:
    check_identity(open_foreign(kind, tmp_path))


def test_the_gram_matrix_is_the_sum_of_those_of_the_parts_and_of_their_products() -> None:
    *_, split = splits(random_network(num_registers=4).double(), 6)
    parts = split.parts.unbind(1)
    whole = sum(parts, torch.zeros(()).double())
    expanded = sum((one @ other.T for one in parts for other in parts), torch.zeros(()).double())
    torch.testing.assert_close(whole @ whole.T, expanded, atol=1e-12, rtol=1e-12)
    patches, registers = parts[0], parts[1]  # equation 5 of the paper
    both = patches @ patches.T + registers @ registers.T + patches @ registers.T + registers @ patches.T
    torch.testing.assert_close((patches + registers) @ (patches + registers).T, both, atol=1e-12, rtol=1e-12)


def test_a_part_is_what_a_slow_loop_finds() -> None:
    model = random_network(num_registers=2).double()
    *_, (step, split) = [(step, split_cls(step, 2)) for step in walk(model, pictures(2).double())]
    groups = dict(zip(GROUPS, (range(3, 19), range(1, 3), range(1)), strict=True))
    for image in range(2):
        for at, places in enumerate(groups.values()):
            kept, alone = slow_part(step, image, list(places))
            torch.testing.assert_close(split.parts[image, at], kept, atol=1e-13, rtol=1e-12)
            torch.testing.assert_close(split.alone[image, at], alone, atol=1e-13, rtol=1e-12)


def slow_part(step: Step, image: int, places: list[int]) -> tuple[Tensor, Tensor]:
    """From the formula, head by head and token by token; as it is, and with weights that sum to 1."""
    q, k, v = (each[image] for each in step.query_key_value())
    found, scaled = [], []
    for head in range(len(q)):
        logits = torch.stack([q[head, 0] @ key for key in k[head]]) / q.shape[-1] ** 0.5
        weights = logits.exp() / logits.exp().sum()
        read = sum((weights[at] * v[head, at] for at in places), torch.zeros(v.shape[-1]).double())
        found.append(read)
        scaled.append(read / weights[places].sum())
    through = [step.block.attn.proj.weight @ torch.cat(each) for each in (found, scaled)]
    gamma = step.block.ls1.gamma
    return gamma * through[0], gamma * through[1]


def splits(model: VisionTransformer, count: int) -> list[Split]:
    dtype = model.cls_token.dtype
    return [split_cls(step, model.num_registers) for step in walk(model, pictures(count).to(dtype))]


def test_where_cls_looks_only_at_registers_patches_add_nothing() -> None:
    *_, split = splits(reading("registers"), 4)
    assert split.shares[..., 0].max() < 1e-12
    assert split.parts[:, 0].abs().max() < 1e-10
    assert split.parts[:, 1, 3:].std(0).min() > 1e-3  # which differ between images
    torch.testing.assert_close(split.parts[:, 1] + split.bias, split.branch, atol=1e-6, rtol=1e-6)


def test_with_uniform_attention_the_patch_part_is_the_mean_value() -> None:
    model = reading("all alike", registers=3).double()
    *_, step = walk(model, pictures(4).double())
    split, patches = split_cls(step, 3), 16 / (1 + 3 + 16)
    torch.testing.assert_close(split.shares[..., 0], torch.full_like(split.shares[..., 0], patches))
    _, _, v = step.query_key_value()
    mean = v[:, :, 4:].mean(2).flatten(1) @ step.block.attn.proj.weight.T * step.block.ls1.gamma
    torch.testing.assert_close(split.parts[:, 0], patches * mean, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(split.alone[:, 0], mean, atol=1e-12, rtol=1e-12)


def test_whole_outputs_are_those_of_the_network() -> None:
    model = random_network(num_registers=2).double()
    images = pictures(3).double()
    *_, step = walk(model, images)
    split = split_cls(step, 2)
    points = outputs(split, step.block, model.norm, Choices())
    assert points.shape == (3, 3, 4, DIM)
    features = model.forward_features(images)
    torch.testing.assert_close(points[:, 1, 0], step.attended[:, 0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(points[:, 2, 0], features.cls, atol=1e-12, rtol=1e-12)


def test_the_output_with_one_group_is_that_of_a_network_in_which_only_it_is_read() -> None:
    """Renormalised, what is kept of the last block is what attention restricted to those keys gives."""
    model = random_network(num_registers=2).double()
    *_, step = walk(model, pictures(3).double())
    points = outputs(split_cls(step, 2), step.block, model.norm, Choices(renormalise=True))
    q, k, v = step.query_key_value()
    for kind, group in ((1, slice(3, None)), (2, slice(1, 3)), (3, slice(0, 1))):
        weights = (q[:, :, :1] @ k[:, :, group].transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        read = (weights @ v[:, :, group])[:, :, 0].flatten(1)
        attended = step.entering[:, 0] + step.block.ls1(step.block.attn.proj(read))
        expected = model.norm(attended + step.block.ffn_branch(attended))
        torch.testing.assert_close(points[:, 2, kind], expected, atol=1e-11, rtol=1e-11)


def test_the_choices_say_what_is_in_the_whole() -> None:
    *_, split = splits(random_network(num_registers=2), 2)
    plain, lean, full = (branch_outputs(split, each) for each in (Choices(), Choices(own=False), Choices(bias=True)))
    torch.testing.assert_close(plain[:, 0], split.parts.sum(1))
    torch.testing.assert_close(lean[:, 0], split.parts[:, :2].sum(1))
    torch.testing.assert_close(full, plain + split.bias)
    torch.testing.assert_close(full[:, 0], split.branch)


def test_in_bf16_the_split_is_computed_in_fp32() -> None:
    model = random_network(num_registers=2)
    with torch.autocast("cpu", torch.bfloat16):
        for step in walk(model, pictures(2)):
            split = split_cls(step, 2)
            assert split.parts.dtype == torch.float32
            branch = (step.attended - step.entering)[:, 0].float()
            assert (split.branch - branch).norm() < 0.03 * branch.norm()
