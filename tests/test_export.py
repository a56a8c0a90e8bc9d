"""What `dinoreg export` writes is opened by the library that it is for, and gives the same features there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_models import allow_torchvision, randomise
from torch import Tensor

from dinoreg import cli
from dinoreg.models import onnx_export
from dinoreg.models.export import export
from dinoreg.models.formats import IMAGENET, WeightsError
from dinoreg.models.onnx_export import resample_by_matrices
from dinoreg.models.vit import Features, ModelConfig, VisionTransformer, build_vit, resample_positions
from dinoreg.models.weights import NORMALISATION_KEY, load_backbone, save_backbone

REG = ModelConfig(arch="vit_tiny", depth=2, patch_size=8, image_size=32, layerscale=0.5, num_registers=4)
PLAIN = replace(REG, num_registers=0, pos_antialias=False)
CLIP = replace(PLAIN, pre_norm=True, activation="quick_gelu", norm_eps=1e-5, layerscale=0.0)
ROPE = replace(REG, rope_base=100.0, norm_eps=1e-5, ffn_width=400)
SIZES = [(32, 32), (48, 16)]


def make(cfg: ModelConfig = REG) -> VisionTransformer:
    model = build_vit(cfg, drop_path=False)
    randomise(model)
    if cfg.pre_norm:
        model.patch_embed.proj.bias.data.zero_()  # type: ignore[union-attr]
    if cfg.rope_base:
        for block in model.blocks:
            block.attn.qkv.bias.data[192:384] = 0  # type: ignore[union-attr,operator,index]
    return model


def images(height: int, width: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(3))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def tokens(features: Features) -> Tensor:
    return torch.cat([features.cls[:, None], features.registers, features.patches], 1)


def same(model: VisionTransformer, theirs: Callable[[Tensor], Tensor], sizes: list[tuple[int, int]] = SIZES) -> None:
    with torch.no_grad():
        for size in sizes:
            close(theirs(images(*size)), tokens(model.forward_features(images(*size))))


@pytest.mark.parametrize(
    ("cfg", "kind"),
    [
        (REG, "Dinov2WithRegistersModel"),
        (replace(REG, ffn="swiglu", layerscale=0.0), "Dinov2WithRegistersModel"),
        (replace(REG, num_registers=0), "Dinov2WithRegistersModel"),  # which resamples as this network does
        (replace(PLAIN, norm_eps=1e-5, ffn_width=3 * 192), "Dinov2Model"),
        (ROPE, "DINOv3ViTModel"),
        (replace(ROPE, ffn="swiglu", num_registers=0), "DINOv3ViTModel"),
    ],
)
def test_transformers_opens_the_folder(tmp_path: Path, cfg: ModelConfig, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    allow_torchvision()
    model = make(cfg)
    model.normalisation = ([0.4, 0.5, 0.6], [0.2, 0.2, 0.3])
    assert export(model, "hf", tmp_path / "out") == []
    theirs, said = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(theirs).__name__ == kind and not any(said.values()), said
    same(model, lambda batch: theirs.eval()(batch).last_hidden_state)
    again = load_backbone(tmp_path / "out")
    same(model, lambda batch: tokens(again.forward_features(batch)))
    assert again.normalisation == model.normalisation


def test_transformers_opens_a_clip_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    allow_torchvision()
    model = make(CLIP)
    assert export(model, "hf", tmp_path / "out") == []
    theirs, said = transformers.CLIPVisionModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(said.values()), said
    with torch.no_grad():
        for size in SIZES:
            expected = theirs.eval()(images(*size), interpolate_pos_encoding=True)
            features = model.forward_features(images(*size))
            close(features.prenorm, expected.last_hidden_state)
            close(features.cls, expected.pooler_output)


def test_transformers_prepares_images_as_the_folder_says(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    allow_torchvision()
    model = make()
    model.normalisation = ([0.4, 0.5, 0.6], [0.2, 0.2, 0.3])
    export(model, "hf", tmp_path / "out")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", use_fast=False)
    except ImportError as error:
        pytest.skip(f"transformers' image processors: {error}")
    picture = np.full((40, 50, 3), 102, dtype=np.uint8)
    prepared = torch.as_tensor(np.asarray(processor(images=picture)["pixel_values"][0]))
    assert prepared.shape == (3, 32, 32)
    close(prepared.float().mean((1, 2)), (0.4 - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.2, 0.3]))


@pytest.mark.parametrize(
    "cfg",
    [
        REG,
        replace(REG, ffn="swiglu"),
        replace(REG, num_registers=0, layerscale=0.0, ffn_width=300, activation="quick_gelu"),
        replace(CLIP, pos_antialias=True),
    ],
)
def test_timm_opens_the_folder(tmp_path: Path, cfg: ModelConfig) -> None:
    allow_torchvision()  # first: timm imports it at once
    timm = pytest.importorskip("timm")
    model = make(cfg)
    assert export(model, "timm", tmp_path / "out") == []
    theirs = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True, dynamic_img_size=True).eval()
    same(model, theirs.forward_features)
    assert theirs.pretrained_cfg["mean"] == tuple(IMAGENET[0]) or theirs.pretrained_cfg["mean"] == IMAGENET[0]
    again = load_backbone(tmp_path / "out")
    same(model, lambda batch: tokens(again.forward_features(batch)))
    assert again.config.activation == cfg.activation or cfg.ffn == "swiglu"


def test_timm_loads_the_file_strictly_into_its_own_architecture(tmp_path: Path) -> None:
    allow_torchvision()  # first: timm imports it at once
    timm = pytest.importorskip("timm")
    from safetensors.torch import load_file

    model = make(replace(REG, arch="vit_small", patch_size=14, image_size=56))
    export(model, "timm", tmp_path / "out")
    theirs = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, depth=2, num_classes=0).eval()
    theirs.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    same(model, theirs.forward_features, [(56, 56)])


def official_keys(depth: int, registers: bool, swiglu: bool) -> set[str]:
    """The keys of DINOv2's published files."""
    layers = ["norm1", "attn.qkv", "attn.proj", "norm2", *(["mlp.w12", "mlp.w3"] if swiglu else ["mlp.fc1", "mlp.fc2"])]
    keys = {"cls_token", "pos_embed", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    keys |= {"norm.weight", "norm.bias"} | ({"register_tokens"} if registers else set())
    for block in range(depth):
        keys |= {f"blocks.{block}.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
        keys |= {f"blocks.{block}.ls1.gamma", f"blocks.{block}.ls2.gamma"}
    return keys


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("registers", [0, 4])
def test_a_dinov2_file_has_the_published_keys_and_timm_converts_it(
    tmp_path: Path, registers: int, swiglu: bool
) -> None:
    """timm has a converter of its own for Meta's files, whose code itself is on no package index."""
    from foreign_models import timm_model

    cfg = replace(REG, num_registers=registers, layerscale=0.0, ffn="swiglu" if swiglu else "mlp")
    model = make(cfg)
    notes = export(model, "dinov2", tmp_path / "out.pth")
    assert bool(notes) == (registers == 0) and all("interpolate_antialias=True" in note for note in notes)
    state = torch.load(tmp_path / "out.pth", weights_only=True)
    assert state.keys() == official_keys(2, registers > 0, swiglu)
    assert state["mask_token"].shape == (1, 192) and state["pos_embed"].shape == (1, 17, 192)
    from timm.models.vision_transformer import checkpoint_filter_fn

    name = f"vit_{'giant' if swiglu else 'base'}_patch14{'_reg4' if registers else ''}_dinov2"
    ratio = {"mlp_ratio": (2 * cfg.ffn_hidden + 0.5) / 192} if swiglu else {}
    theirs = timm_model(
        name, img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3, dynamic_img_size=True, **ratio
    )
    theirs.load_state_dict(checkpoint_filter_fn(state, theirs), strict=True)  # type: ignore[arg-type]
    same(model, theirs.forward_features)  # type: ignore[arg-type]
    again = load_backbone(tmp_path / "out.pth")
    assert again.found.startswith("DINOv2: ") and again.config.ffn == cfg.ffn
    same(model, lambda batch: tokens(again.forward_features(batch)), [(32, 32)])


@pytest.mark.parametrize(
    ("cfg", "beside"),
    [
        (REG, False),
        (replace(PLAIN, pos_offset=0.1, ffn="swiglu"), False),
        (replace(ROPE, pre_norm=True, activation="quick_gelu"), True),  # as weights of more than 2 GB are written
    ],
)
def test_onnxruntime_runs_any_batch_of_any_size(
    tmp_path: Path, cfg: ModelConfig, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    if beside:
        monkeypatch.setattr(onnx_export, "LARGEST", 1000)
    model = make(replace(cfg, depth=1))
    assert export(model, "onnx", tmp_path / "out.onnx") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.onnx", *(["out.onnx.data"] if beside else [])]
    session = runtime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    assert names == (["cls", "registers", "patches"] if cfg.num_registers else ["cls", "patches"])
    assert session.get_modelmeta().custom_metadata_map["patch_size"] == "8"
    for count, size in ((1, (32, 32)), (3, (48, 16)), (2, (24, 56)), (2, (8, 8))):
        batch = images(*size, count)
        got = [torch.from_numpy(each) for each in session.run(None, {"images": batch.numpy()})]
        got = [each[:, None] if each.ndim == 2 else each for each in got]
        with torch.no_grad():
            close(torch.cat(got, 1), tokens(model.forward_features(batch)))


def test_onnx_needs_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(WeightsError, match=r"onnxscript is not installed: pip install 'dinoreg\[onnx\]'"):
        export(make(), "onnx", tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("new", [(1, 9), (3, 3), (7, 9), (37, 7), (7, 7)])
def test_resampling_by_matrices_is_torchs(antialias: bool, offset: float, new: tuple[int, int]) -> None:
    grid = torch.randn(1, 49, 5, generator=torch.Generator().manual_seed(0))
    expected = resample_positions(grid, (7, 7), new, antialias=antialias, offset=offset) if new != (7, 7) else grid
    close(resample_by_matrices(grid, (7, 7), new, antialias=antialias, offset=offset), expected)


def test_formats_refuse_what_they_cannot_hold(tmp_path: Path) -> None:
    deep = replace(CLIP, layerscale=0.5)
    biased = make(CLIP)
    biased.patch_embed.proj.bias.data.fill_(1)  # type: ignore[union-attr]
    for model, kind, words in (
        (make(ROPE), "dinov2", "the dinov2 format has no place for rope_base=100.0"),
        (make(replace(PLAIN, norm_eps=1e-5)), "dinov2", "no place for norm_eps=1e-05"),
        (make(replace(PLAIN, activation="quick_gelu")), "dinov2", "no place for activation=quick_gelu"),
        (make(ROPE), "timm", "timm's DINOv2 transformer has no place for rope_base=100.0"),
        (make(replace(CLIP, norm_eps=1e-6)), "timm", "timm's CLIP transformer has no place for norm_eps=1e-06"),
        (biased, "timm", "a bias of the patch embedding"),
        (biased, "hf", "a bias of the patch embedding"),
        (make(deep), "hf", "Hugging Face's CLIP has no place for layerscale=0.5"),
        (make(replace(REG, ffn_width=300)), "hf", "feed-forward layers 300 wide at width 192"),
        (make(replace(ROPE, pre_norm=True)), "hf", "Hugging Face's DINOv3 has no place for pre_norm=True"),
    ):
        with pytest.raises(WeightsError, match=words):
            export(model, kind, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", *words])
    said = capsys.readouterr()
    return int(caught.value.code or 0), said.out, said.err


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    run, model = tmp_path / "mine", make()
    extra = {"step": "100", NORMALISATION_KEY: "[[0.5, 0.5, 0.5], [0.2, 0.2, 0.2]]"}
    save_backbone(run / "teacher" / "step_00000100.safetensors", model.state_dict(), REG, extra)
    code, out, _ = command(capsys, "mine", "--format", "hf")
    assert code == 0 and out.splitlines()[0].startswith("found dinoreg: 2 blocks of width 192")
    assert 'wrote mine_hf; open it by transformers.AutoModel.from_pretrained("mine_hf")' in out
    config = json.loads((tmp_path / "mine_hf" / "preprocessor_config.json").read_text())
    assert config["image_mean"] == [0.5] * 3 and config["crop_size"] == {"height": 32, "width": 32}
    code, _, err = command(capsys, "mine", "--format", "hf")
    assert code == 2 and err == "dinoreg: mine_hf exists: name another with --output, or pass --overwrite\n"
    assert command(capsys, "mine", "--format", "hf", "--overwrite")[0] == 0
    code, _, err = command(capsys, "mine", "--format", "onnx", "--output", "mine_hf", "--overwrite")
    assert code == 2 and err == "dinoreg: mine_hf is a folder, which the format onnx is not\n"
    code, out, _ = command(capsys, "mine_hf", "--format", "safetensors", "--output", "deep/own.safetensors")
    assert code == 0 and "found Hugging Face: 2 blocks" in out
    again = load_backbone(tmp_path / "deep" / "own.safetensors")
    assert again.normalisation == ([0.5] * 3, [0.2] * 3) and again.found.startswith("dinoreg: ")
    same(model, lambda batch: tokens(again.forward_features(batch)))
    code, out, _ = command(capsys, str(run / "teacher" / "step_00000100.safetensors"), "--format", "dinov2")
    assert code == 0 and (tmp_path / "step_00000100_dinov2.pth").is_file()
    code, _, err = command(capsys, "absent", "--format", "timm")
    assert code == 2 and err.startswith("dinoreg: absent: no such file") and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "mine", "mine_hf", "step_00000100_dinov2.pth"]


def test_a_failed_export_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinoreg.models import export as module

    model, target = make(), tmp_path / "out"
    export(model, "hf", target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export(model, "hf", target, overwrite=True)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_dinov2_file_cannot_say_is_noted(tmp_path: Path) -> None:
    model = make(replace(REG, num_heads=4))
    model.normalisation = ([0.5] * 3, [0.2] * 3)
    notes = export(model, "dinov2", tmp_path / "out.pth")
    assert any("the network has 4 heads" in note for note in notes)
    assert any("normalised with mean [0.5, 0.5, 0.5]" in note for note in notes)


def test_the_folder_that_one_stands_in_gives_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export(make(), "timm", tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    assert "wrote mine_hf;" in command(capsys, ".", "--format", "hf")[1]
