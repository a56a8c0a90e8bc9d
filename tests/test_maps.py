"""Attention, norm and PCA maps against plain references."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from foreign_models import huggingface, randomise
from torch import Tensor

from dinoreg.models.maps import attention_maps, attention_rows, patch_norms, pca_rgb
from dinoreg.models.vit import ModelConfig, build_vit
from dinoreg.models.weights import load_backbone

SMALL = ModelConfig(embed_dim=32, depth=3, num_heads=2, patch_size=7, image_size=28, layerscale=0.5, num_registers=4)


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("registers", [None, 4])
@pytest.mark.parametrize("block", [0, 1, -1])
def test_attention_equals_huggingface(tmp_path: Path, registers: int | None, block: int) -> None:
    theirs = huggingface(registers, attn_implementation="eager")
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    ours, first = load_backbone(tmp_path), 1 + (registers or 0)
    with torch.no_grad():
        expected = theirs(images(28, 35), output_attentions=True).attentions[block]  # (B, heads, T, T)
    rows = attention_rows(ours, images(28, 35), block)
    torch.testing.assert_close(rows, expected[:, :, :first].transpose(1, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, first, 2), rtol=0, atol=1e-5)
    maps = attention_maps(ours, images(28, 35), block)
    assert maps.shape == (2, first, 2, 4, 5)
    torch.testing.assert_close(maps.flatten(3), expected[:, :, :first, first:].transpose(1, 2), rtol=0, atol=1e-5)


def test_maps_lie_the_right_way_up() -> None:
    """One patch made loud draws the attention of CLS, or loses it, at its own place."""
    model = build_vit(SMALL)
    randomise(model)
    batch = torch.zeros(1, 3, 28, 42)
    plain = attention_maps(model, batch, 0)
    batch[:, :, 7:14, 28:35] = 3.0
    change = (attention_maps(model, batch, 0) / plain)[0, 0].log()
    change = (change - change.flatten(1).median(dim=1).values[:, None, None]).abs().mean(0)
    assert change.argmax().item() == 1 * 6 + 4


def test_patch_norms_are_taken_before_the_final_norm() -> None:
    model = build_vit(replace(SMALL, num_registers=2))
    randomise(model)
    batch = images(14, 28)
    norms = patch_norms(model, batch)
    prenorm = model.forward_features(batch).prenorm.double()
    assert norms.shape == (2, 2, 4)
    for b in range(2):
        for i in range(2):
            for j in range(4):
                assert norms[b, i, j].item() == pytest.approx(prenorm[b, 3 + i * 4 + j].square().sum().sqrt().item())


def test_pca_against_the_covariance_matrix() -> None:
    patches = torch.randn(30, 16, generator=torch.Generator().manual_seed(1)).exp()
    colours = pca_rgb(patches, (5, 6))
    centred = (patches - patches.mean(0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / 30)
    for channel in range(3):
        score = centred @ vectors[:, -1 - channel] / values[-1 - channel].sqrt()
        score = score * (score**3).mean().sign()
        expected = (score.clamp(-2.3, 2.3) / 4.6 + 0.5).view(5, 6)
        torch.testing.assert_close(colours[..., channel].double(), expected, rtol=0, atol=1e-5)


def test_pca_of_degenerate_features_is_grey() -> None:
    constant = pca_rgb(torch.full((12, 8), 3.7), (3, 4))
    torch.testing.assert_close(constant, torch.full((3, 4, 3), 0.5))
    line = pca_rgb(torch.arange(12.0)[:, None] * torch.ones(8), (3, 4))
    assert line[..., 0].std() > 0.1 and (line[..., 1:] == 0.5).all()
    assert pca_rgb(torch.randn(2, 8), (1, 2)).isfinite().all()
