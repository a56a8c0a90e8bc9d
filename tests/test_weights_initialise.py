"""Starting a model from weights of another shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from foreign_models import huggingface, randomise
from torch import Tensor

from dinoreg.models.adapt import resize_patch_kernel, spread_channels
from dinoreg.models.formats import WeightsError
from dinoreg.models.vit import ModelConfig, VisionTransformer, build_vit
from dinoreg.models.weights import initialise, load_backbone, save_backbone

SOURCE = ModelConfig(arch="vit_tiny", depth=2, patch_size=8, image_size=32, layerscale=0.5, num_registers=4)


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, VisionTransformer]:
    model = build_vit(SOURCE)
    randomise(model)
    save_backbone(tmp_path / "source.safetensors", model.state_dict(), SOURCE)
    return tmp_path / "source.safetensors", model.eval()


def fresh(cfg: ModelConfig) -> VisionTransformer:
    torch.manual_seed(1)
    model = build_vit(cfg)
    model.init_weights()
    return model.eval()


def images(size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(3))


def close(one: Tensor, other: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=atol)


def test_same_shape_is_the_same_model(source: tuple[Path, VisionTransformer]) -> None:
    path, original = source
    model = fresh(SOURCE)
    report = initialise(model, path)
    assert report.share == 1 and not report.adapted and not report.missing and not report.unused
    assert sorted(report.taken) == sorted(original.state_dict())
    close(model.forward_features(images()).prenorm, original.forward_features(images()).prenorm, atol=0)


def test_other_resolution_gives_the_sources_features_there(source: tuple[Path, VisionTransformer]) -> None:
    path, original = source
    model = fresh(replace(SOURCE, image_size=56))
    report = initialise(model, path)
    assert "4 x 4 grid resampled to 7 x 7" in report.adapted["pos_embed"]
    close(model.forward_features(images(56)).prenorm, original.forward_features(images(56)).prenorm)


@pytest.mark.parametrize("kind", [None, 4])
def test_public_weights_with_and_without_registers(tmp_path: Path, kind: int | None) -> None:
    """At another size than the source's, its own convention of resampling counts."""
    theirs = huggingface(kind, dim=192, heads=3)
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    cfg = ModelConfig(arch="vit_tiny", depth=3, patch_size=7, image_size=42, num_registers=kind or 0)
    model = fresh(cfg)
    report = initialise(model, tmp_path)
    with torch.no_grad():
        close(model.forward_features(images(42)).cls, theirs(images(42)).last_hidden_state[:, 0])
    assert bool(report.notes) == (kind is None)  # it was trained without antialiasing, this model resamples with it


@pytest.mark.parametrize("registers", [0, 2, 6])
def test_other_number_of_registers(source: tuple[Path, VisionTransformer], registers: int) -> None:
    path, original = source
    model = fresh(replace(SOURCE, num_registers=registers))
    new = model.register_tokens.detach().clone() if model.register_tokens is not None else torch.empty(1, 0, 192)
    report = initialise(model, path)
    if registers == 0:
        assert report.unused == ["register_tokens"]
        return
    assert model.register_tokens is not None and original.register_tokens is not None
    kept = min(registers, 4)
    close(model.register_tokens[:, :kept], original.register_tokens[:, :kept], atol=0)
    close(model.register_tokens[:, kept:], new[:, kept:], atol=0)
    assert (
        report.adapted["register_tokens"]
        == {2: "first 2 kept of 4", 6: "first 4 kept, 2 freshly initialised"}[registers]
    )


def test_registers_for_a_source_without(tmp_path: Path) -> None:
    cfg = replace(SOURCE, num_registers=0)
    original = build_vit(cfg)
    randomise(original)
    save_backbone(tmp_path / "a.safetensors", original.state_dict(), cfg)
    report = initialise(fresh(SOURCE), tmp_path / "a.safetensors")
    assert report.missing == ["register_tokens"]
    assert "missing  register_tokens" in str(report) and "taken    blocks.{0-1}.attn.qkv.weight" in str(report)
    without = fresh(cfg)
    initialise(without, tmp_path / "a.safetensors")
    close(without.forward_features(images()).prenorm, original.eval().forward_features(images()).prenorm, atol=0)


@pytest.mark.parametrize("channels", [1, 2, 4, 6, 7])
def test_other_channels_keep_the_tokens_of_grey_images(source: tuple[Path, VisionTransformer], channels: int) -> None:
    path, original = source
    model = fresh(replace(SOURCE, in_channels=channels))
    report = initialise(model, path)
    assert f"3 input channels spread over {channels}" in report.adapted["patch_embed.proj.weight"]
    grey = images(channels=1)
    close(
        model.forward_features(grey.expand(-1, channels, -1, -1)).prenorm,
        original.forward_features(grey.expand(-1, 3, -1, -1)).prenorm,
    )
    if channels == 4:
        close(spread_channels(torch.ones(1, 3, 1, 1), 4).flatten(), torch.tensor([0.5, 1, 1, 0.5]), atol=0)


def test_larger_patches_of_a_larger_image_give_the_same_tokens(source: tuple[Path, VisionTransformer]) -> None:
    path, original = source
    model = fresh(replace(SOURCE, patch_size=16, image_size=64))
    report = initialise(model, path)
    assert "kernel of 8 pixels resized to 16" in report.adapted["patch_embed.proj.weight"]
    patches = images().unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 8, 8)
    larger = F.interpolate(patches, size=16, mode="bicubic", antialias=True)
    close(model.patch_embed(larger), original.patch_embed(patches), atol=1e-4)


def test_patch_kernel_resizing_is_least_squares() -> None:
    """Against lstsq on the resizing matrix built pixel by pixel."""
    kernel = torch.randn(3, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    columns = []
    for i in range(36):
        unit = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
        unit.view(-1)[i] = 1
        columns.append(F.interpolate(unit, size=(4, 4), mode="bicubic", antialias=True).flatten())
    b = torch.stack(columns, dim=1)  # (16, 36)
    expected = torch.linalg.lstsq(b.T, kernel.view(6, 36).T).solution.T.view(3, 2, 4, 4)
    close(resize_patch_kernel(kernel, 4), expected, atol=1e-10)


def test_layerscale_may_come_or_go(source: tuple[Path, VisionTransformer], tmp_path: Path) -> None:
    path, original = source
    without = fresh(replace(SOURCE, layerscale=0.0))
    report = initialise(without, path)
    assert "blocks.1.mlp.fc2.bias" in report.adapted and not report.missing and not report.unused
    close(without.forward_features(images()).prenorm, original.forward_features(images()).prenorm)
    save_backbone(tmp_path / "none.safetensors", without.state_dict(), without.config)
    again = fresh(SOURCE)
    initialise(again, tmp_path / "none.safetensors")
    close(again.forward_features(images()).prenorm, original.forward_features(images()).prenorm)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arch": "vit_small"}, "width is 192, the model's is 384"),
        ({"depth": 3}, "depth is 2, the model's is 3"),
        ({"num_heads": 6}, "number of heads is 3, the model's is 6"),
        ({"ffn": "swiglu"}, "parameters are in it"),
    ],
)
def test_another_size_is_refused(source: tuple[Path, VisionTransformer], change: dict[str, object], words: str) -> None:
    with pytest.raises(WeightsError, match=words) as caught:
        initialise(fresh(replace(SOURCE, **change)), source[0])  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_too_little_in_a_file_is_refused(source: tuple[Path, VisionTransformer], tmp_path: Path) -> None:
    state = {k: t for k, t in source[1].state_dict().items() if "attn" not in k}
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(WeightsError, match=r"only \d\d.\d% of the model's parameters"):
        initialise(fresh(SOURCE), tmp_path / "part.pth")


def test_dinov2_files_without_registers_at_another_size(tmp_path: Path) -> None:
    """The public ViT-S/14 and its like: offset 0.1 and no antialiasing, kept exactly at the model's native size."""
    cfg = replace(SOURCE, num_registers=0)
    original = build_vit(cfg)
    randomise(original)
    torch.save(original.state_dict(), tmp_path / "dinov2.pth")
    as_published = load_backbone(tmp_path / "dinov2.pth")
    model = fresh(replace(cfg, image_size=24))
    initialise(model, tmp_path / "dinov2.pth")
    close(model.forward_features(images(24)).prenorm, as_published.forward_features(images(24)).prenorm, atol=0)
    assert not torch.allclose(original.forward_features(images(24)).cls, as_published.forward_features(images(24)).cls)
