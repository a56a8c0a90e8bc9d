"""Backbones of other libraries beside DINOv2's: found by their names, and equal to their own library on them."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import openclip_tower, randomise, timm_model, transformers_model
from safetensors.torch import save_file
from torch import Tensor, nn

from dinoreg.models.formats import WeightsError
from dinoreg.models.rotary import rotate, rotations
from dinoreg.models.vit import Features, ModelConfig, VisionTransformer, build_vit
from dinoreg.models.weights import initialise, load_backbone, save_backbone
from eval.backbone import open_backbone

TINY = ModelConfig(arch="vit_tiny", depth=2, patch_size=8, image_size=32, layerscale=0.0, num_registers=0)
CLIP_MEAN = pytest.approx([0.4815, 0.4578, 0.4082], abs=1e-3)


def images(height: int = 28, width: int = 28) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(3))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def tokens(features: Features) -> Tensor:
    return torch.cat([features.cls[:, None], features.registers, features.patches], 1)


def make(cfg: ModelConfig = TINY, seed: int = 0) -> VisionTransformer:
    model = build_vit(cfg)
    randomise(model, seed)
    return model


@pytest.mark.parametrize("size", [(28, 28), (42, 14), (56, 56)])
@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling"])
def test_equals_huggingface_vit(tmp_path: Path, kind: str, size: tuple[int, int]) -> None:
    theirs = transformers_model(kind, qkv_bias=kind != "ViTModel")
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.5]})
    )
    ours = load_backbone(tmp_path)
    assert ours.found.startswith("Hugging Face ViT: 3 blocks of width 32, 2 heads, patches of 7 at 28 pixels, 0 regis")
    assert ours.normalisation == ([0.5, 0.4, 0.3], [0.5, 0.5, 0.5]) and ours.config.norm_eps == 1e-12
    inner = theirs if kind == "ViTModel" else theirs.vit
    with torch.no_grad():
        expected = inner(images(*size), interpolate_pos_encoding=True)  # type: ignore[operator]
        close(tokens(ours.forward_features(images(*size))), expected.last_hidden_state)
    alone = load_backbone(tmp_path / "model.safetensors")  # the JSON beside it is read too
    assert alone.config == ours.config and alone.normalisation == ours.normalisation


@pytest.mark.parametrize("size", [(28, 28), (42, 14)])
@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_equals_huggingface_clip(tmp_path: Path, kind: str, activation: str, size: tuple[int, int]) -> None:
    theirs = transformers_model(kind, hidden_act=activation)
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    ours = open_backbone(tmp_path)
    assert ours.found.startswith("Hugging Face CLIP: 3 blocks") and f"mlp, {activation}, norm before" in ours.found
    assert ours.normalisation[0] == CLIP_MEAN
    tower = theirs if kind == "CLIPVisionModel" else theirs.vision_model
    batch = images(*size)
    with torch.no_grad():
        expected = tower(batch, interpolate_pos_encoding=True, output_hidden_states=True)  # type: ignore[operator]
        states = [*expected.hidden_states[1:3], expected.last_hidden_state]
        for got, state in zip(ours.layers(batch, [0, 1, 2], norm=False), states, strict=True):
            close(torch.cat([got.cls[:, None], got.patches], 1), state)
        close(ours.layers(batch, [-1])[0].cls, expected.pooler_output)


@pytest.mark.parametrize("size", [(28, 28), (42, 14), (21, 35)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("registers", [0, 4])
def test_equals_huggingface_dinov3(tmp_path: Path, registers: int, gated: bool, size: tuple[int, int]) -> None:
    more = {"use_gated_mlp": gated, "hidden_act": "silu" if gated else "gelu", "intermediate_size": 72}
    theirs = transformers_model("DINOv3ViTModel", num_register_tokens=registers, attn_implementation="eager", **more)
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    ours, batch, first = open_backbone(tmp_path), images(*size), 1 + registers
    assert ours.found.startswith("Hugging Face DINOv3") and "rotary positions, base 100" in ours.found
    with torch.no_grad():
        expected = theirs(batch, output_hidden_states=True, output_attentions=True)
        for index, got in enumerate(ours.layers(batch, range(2), norm=False)):
            close(torch.cat([got.cls[:, None], got.registers, got.patches], 1), expected.hidden_states[index + 1])
        for index in range(3):
            close(ours.attention(batch, index), expected.attentions[index])
        (last,) = ours.layers(batch, [-1])
    close(torch.cat([last.cls[:, None], last.registers], 1), expected.last_hidden_state[:, :first])
    close(last.patches, expected.last_hidden_state[:, first:])


def dinov3_official(theirs: nn.Module, gated: bool) -> dict[str, Tensor]:
    """The same weights under the names of Meta's repository."""
    state, out = theirs.state_dict(), dict[str, Tensor]()
    for key, tensor in state.items():
        key = key.removeprefix("model.").replace("layer.", "blocks.", 1).replace("layer_scale", "ls")
        key = key.replace("embeddings.patch_embeddings", "patch_embed.proj").replace("lambda1", "gamma")
        key = key.replace("embeddings.", "").replace("register_tokens", "storage_tokens").replace("o_proj", "proj")
        for hf, meta in (("gate", "w1"), ("up", "w2"), ("down", "w3")) if gated else (("up", "fc1"), ("down", "fc2")):
            key = key.replace(f"mlp.{hf}_proj", f"mlp.{meta}")
        out[key.replace("attention.", "attn.")] = tensor
    out["mask_token"] = out["mask_token"][0]
    for block in range(3):
        name = f"blocks.{block}.attn."
        q, k, v = (out.pop(f"{name}{part}_proj.weight") for part in "qkv")
        out[name + "qkv.weight"] = torch.cat([q, k, v])
        biases = [out.pop(f"{name}{part}_proj.bias") for part in "qv"]
        unused = torch.full_like(biases[0], 7.0)  # the mask makes them zero
        out[name + "qkv.bias"] = torch.cat([biases[0], unused, biases[1]])
        out[name + "qkv.bias_mask"] = torch.cat([torch.ones(32), torch.zeros(32), torch.ones(32)])
    return {**out, "rope_embed.periods": 100 ** (torch.arange(4) / 4).bfloat16(), "local_cls_norm.bias": torch.ones(32)}


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3_in_metas_own_names(tmp_path: Path, gated: bool) -> None:
    more = {"use_gated_mlp": gated, "hidden_act": "silu" if gated else "gelu"}
    theirs = transformers_model("DINOv3ViTModel", num_register_tokens=4, **more)
    state = dinov3_official(theirs, gated)
    torch.save(state, tmp_path / "v3.pth")
    ours = load_backbone(tmp_path / "v3.pth")
    assert ours.found.startswith("DINOv3: 3 blocks of width 32, 2 heads") and "left out: local_cls_norm" in ours.found
    with torch.no_grad():
        close(tokens(ours.forward_features(images(42, 21))), theirs(images(42, 21)).last_hidden_state)
    state["rope_embed.periods"] = torch.tensor([1.0, 2.0, 3.0, 50.0])
    torch.save(state, tmp_path / "v3.pth")
    with pytest.raises(WeightsError, match="no powers of one base"):
        load_backbone(tmp_path / "v3.pth")


def test_rotations_turn_by_place_and_keep_lengths() -> None:
    """Scores of two patches depend on their distance only; the class token's do on neither place."""
    turns = rotations((5, 3), 2, 16, 100.0, torch.device("cpu"), torch.float64)
    assert turns.shape == (17, 2, 16) and turns[:2, 0].eq(1).all() and turns[:2, 1].eq(0).all()
    pair = torch.randn(2, 1, 2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, k = pair.expand(2, 17, 2, 16)
    scores = torch.einsum("qhd,khd->hqk", rotate(q, turns), rotate(k, turns))
    torch.testing.assert_close(rotate(q, turns).norm(dim=-1), q.norm(dim=-1))
    by_place = scores[:, 2:, 2:].unflatten(1, (5, 3)).unflatten(3, (5, 3))
    torch.testing.assert_close(by_place[:, :-1, :, :-1], by_place[:, 1:, :, 1:])
    torch.testing.assert_close(by_place[:, :, 1:, :, 1:], by_place[:, :, :-1, :, :-1])
    assert by_place[:, 0, 0, 1, 0].sub(by_place[:, 0, 0, 0, 1]).abs().min() > 1e-3
    torch.testing.assert_close(scores[:, 0], torch.einsum("hd,khd->hk", q[0], rotate(k, turns)))


@pytest.mark.parametrize("size", [(28, 28), (42, 42)])
@pytest.mark.parametrize("wrapped", ["whole", "tower", "training"])
@pytest.mark.parametrize("quick", [False, True])
def test_equals_openclip(tmp_path: Path, wrapped: str, quick: bool, size: tuple[int, int]) -> None:
    openclip_tower()  # or skip
    from open_clip.model import resize_pos_embed
    from open_clip.transformer import QuickGELU

    activation = {"act_layer": QuickGELU} if quick else {}
    theirs = openclip_tower(**activation, ls_init_value=0.1 if wrapped == "tower" else None)
    state: dict[str, Any] = dict(theirs.state_dict())
    if wrapped != "tower":
        state = {f"visual.{key}": t for key, t in state.items()} | {"logit_scale": torch.tensor(4.6)}
        state |= {"positional_embedding": torch.zeros(9, 8), "transformer.resblocks.0.ln_1.weight": torch.zeros(8)}
        state |= {"input_resolution": torch.tensor(28)} if quick else {}
    if wrapped == "training":
        state = {"state_dict": {f"module.{key}": t for key, t in state.items()}, "epoch": 3}
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    if quick and wrapped == "tower":
        settings = {"model_cfg": {"quick_gelu": True, "vision_cfg": {"width": 192, "head_width": 64}}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    ours = load_backbone(tmp_path)
    assert ours.found.startswith("OpenCLIP: 3 blocks of width 192, 3 heads")
    assert ("gelu assumed" in ours.found) != quick and ours.normalisation[0] == CLIP_MEAN  # type: ignore[index]
    if size != (28, 28):  # OpenCLIP resamples when it opens a file
        bigger = openclip_tower(**activation, image_size=size[0], ls_init_value=0.1 if wrapped == "tower" else None)
        resized = {f"visual.{key}": t for key, t in theirs.state_dict().items()}
        resize_pos_embed(resized, argparse.Namespace(visual=bigger))
        bigger.load_state_dict({key.removeprefix("visual."): t for key, t in resized.items()})
        theirs = bigger
    with torch.no_grad():
        pooled, patches = theirs(images(*size))
        features = ours.forward_features(images(*size))
        close(features.patches, patches)
        close(features.cls @ theirs.proj, pooled)


def test_equals_a_whole_openclip_model(tmp_path: Path) -> None:
    openclip_tower()  # or skip
    from open_clip.model import CLIP

    vision = {"layers": 2, "width": 96, "head_width": 48, "patch_size": 7, "image_size": 28, "mlp_ratio": 3.0}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    theirs = randomise(CLIP(16, vision, text, quick_gelu=True))
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    with pytest.raises(WeightsError, match="width 96 is none of"):
        load_backbone(tmp_path)
    settings = {
        "model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, "quick_gelu": True},
        "preprocess_cfg": {"mean": [0.1] * 3, "std": [0.9] * 3},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    ours = load_backbone(tmp_path)
    assert ours.normalisation == ([0.1] * 3, [0.9] * 3) and ours.num_heads == 2 and "assumed" not in ours.found
    with torch.no_grad():
        close(ours.forward_features(images()).cls @ theirs.visual.proj, theirs.encode_image(images()))  # type: ignore[operator,union-attr]
    settings["model_cfg"]["vision_cfg"] = {**vision, "final_ln_after_pool": True}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match="norm follows its pooling"):
        load_backbone(tmp_path)
    state = {**theirs.state_dict(), "visual.ln_post.weight": torch.zeros(8)}
    torch.save(state, tmp_path / "coca.bin")
    with pytest.raises(WeightsError, match="norm follows its pooling"):
        load_backbone(tmp_path / "coca.bin")


@pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore:.*torch.jit", "ignore:Converting a tensor")
def test_a_torchscript_archive_is_opened_when_it_is_trusted(tmp_path: Path) -> None:
    """The form in which OpenAI published CLIP."""
    theirs = openclip_tower()
    model = nn.Module()
    model.visual = theirs
    model.register_buffer("input_resolution", torch.tensor(28))
    model.forward = lambda batch: theirs(batch)[0]  # type: ignore[assignment]
    torch.jit.trace(model, images(28, 28)).save(tmp_path / "ViT.pt")
    with pytest.raises(WeightsError, match="would run code when opened: it asks for TorchScript; if you trust"):
        load_backbone(tmp_path / "ViT.pt")
    ours = load_backbone(tmp_path / "ViT.pt", trust=True)
    assert "quick_gelu" in ours.found and "left out: input_resolution, proj" in ours.found


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32}, "timm: "),
        ("deit3_small_patch16_224", {"img_size": 32, "embed_dim": 192, "num_heads": 3}, "timm: "),
        ("vit_base_patch16_clip_224", {"img_size": 32, "embed_dim": 192, "num_heads": 3}, "timm: "),
        ("vit_base_patch16_clip_quickgelu_224", {"img_size": 32, "embed_dim": 192, "num_heads": 3}, "timm: "),
        ("vit_little_patch16_reg4_gap_256", {"img_size": 32, "class_token": True, "global_pool": "token"}, "timm: "),
        ("vit_tiny_patch16_224", {"img_size": 32, "qkv_bias": False, "mlp_ratio": 3.0}, "timm: "),
    ],
)
def test_equals_timm(tmp_path: Path, name: str, options: dict[str, Any], kind: str) -> None:
    theirs = timm_model(name, dynamic_img_size=True, depth=2, **options)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    settings = {"architecture": name, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}, "model_args": options}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    ours = load_backbone(tmp_path)
    assert ("no bias in attn.qkv" in ours.found) == ("qkv_bias" in options)
    assert ours.found.startswith(kind) and ours.normalisation == ([0.5] * 3, [0.5] * 3)
    for size in ((32, 32), (16, 48)):
        with torch.no_grad():
            close(tokens(ours.forward_features(images(*size))), theirs.forward_features(images(*size)))  # type: ignore[operator]
    in_openclip = {f"visual.trunk.{key}": t for key, t in theirs.state_dict().items()}
    torch.save({**in_openclip, "visual.head.proj.weight": torch.zeros(3)}, tmp_path / "tower.bin")
    if "quickgelu" not in name and "little" not in name:
        close(load_backbone(tmp_path / "tower.bin").norm.weight, ours.norm.weight)


def test_what_timm_has_and_we_have_not(tmp_path: Path) -> None:
    for name, options, words in (
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, "fc_norm"),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "fc_norm": False}, "without cls_token"),
        ("vit_tiny_patch16_224", {"qk_norm": True}, "attn.k_norm"),
        ("deit3_small_patch16_224", {"embed_dim": 80, "num_heads": 2}, "width 80 is none of"),
    ):
        theirs = timm_model(name, depth=1, img_size=32, **options)
        save_file(theirs.state_dict(), tmp_path / "model.safetensors")
        with pytest.raises(WeightsError, match=words) as caught:
            load_backbone(tmp_path / "model.safetensors")
        assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


def test_metas_checkpoints_are_told_apart(tmp_path: Path) -> None:
    """Each resamples positions as its own code does, which shows at other sizes only."""
    model = make()
    state = {key: t for key, t in model.state_dict().items() if key != "mask_token"}
    head = {"head.mlp.0.weight": torch.zeros(2, 2), "head.last_layer.weight_g": torch.zeros(2, 1)}
    other = make(seed=1).state_dict()
    scaled = make(replace(TINY, layerscale=1e-5)).state_dict()
    deit3 = {k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for k, t in scaled.items()}
    del deit3["mask_token"]
    without = torch.cat([torch.zeros(1, 1, 192), deit3["pos_embed"][:, 1:]], 1)
    deit3["pos_embed"] = deit3["pos_embed"][:, 1:]
    student = under("module.backbone.", other)
    teacher = under("backbone.", state) | head
    masked = {**state, "masked_embed": torch.ones(1, 192)}
    arguments = argparse.Namespace(arch="vit_tiny", lr=0.1)
    labelled = {**state, "head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5)}
    for name, content, kind, antialias, offset in (
        ("dino_pretrain", state, "DINO or iBOT", False, 0.1),
        ("dino_full", {"student": student, "teacher": teacher, "args": arguments}, "DINO or iBOT", False, 0.1),
        ("ibot", {"student": under("module.backbone.", masked) | head, "epoch": 3}, "iBOT", False, 0.1),
        ("ibot_teacher", {"state_dict": state}, "DINO or iBOT", False, 0.1),
        ("deit", {"model": labelled}, "DeiT or MAE", False, 0.0),
        ("mae", {"model": state}, "DeiT or MAE", False, 0.0),
        ("deit3", {"model": {**deit3, "head.weight": torch.zeros(5, 192)}}, "DeiT-III", False, 0.0),
        ("timm", labelled, "timm", True, 0.0),
    ):
        torch.save(content, tmp_path / f"{name}.pth")
        ours = load_backbone(tmp_path / f"{name}.pth")
        assert ours.found.startswith(f"{kind}: 2 blocks of width 192, 3 heads"), name
        assert (ours.config.pos_antialias, ours.config.pos_offset) == (antialias, offset), name
        expected = make(replace(TINY, pos_antialias=antialias, pos_offset=offset))
        if name == "deit3":
            expected = make(replace(expected.config, layerscale=1e-5))
            expected.pos_embed.data.copy_(without)  # type: ignore[union-attr]
        for size in ((32, 32), (48, 16)):
            close(ours.forward_features(images(*size)).prenorm, expected.eval().forward_features(images(*size)).prenorm)
    assert load_backbone(tmp_path / "ibot.pth").mask_token.eq(1).all()
    assert "left out: head" in load_backbone(tmp_path / "dino_full.pth").found
    save_file(state, tmp_path / "plain.safetensors")
    assert load_backbone(tmp_path / "plain.safetensors").found.startswith("timm: ")


def test_chunks_as_in_an_official_teacher_checkpoint(tmp_path: Path) -> None:
    """Four chunks of blocks, numbered through, as DINOv2 writes a teacher while it trains."""
    cfg = replace(TINY, depth=4, num_registers=4, layerscale=1e-5, ffn="swiglu")
    model = make(cfg).eval()
    teacher = {k.replace("blocks.", f"blocks.{int(k.split('.')[1]) // 2}.", 1) if k.startswith("blocks.") else k: t
               for k, t in model.state_dict().items()}  # fmt: skip
    assert "blocks.1.3.norm1.weight" in teacher
    torch.save({"teacher": under("backbone.", teacher)}, tmp_path / "teacher_checkpoint.pth")
    ours = open_backbone(tmp_path / "teacher_checkpoint.pth")
    assert ours.found == (
        "DINOv2: 4 blocks of width 192, 3 heads, patches of 8 at 32 pixels, 4 registers, swiglu, "
        "positions resampled with antialiasing, offset 0"
    )
    close(ours.model.forward_features(images(32, 32)).prenorm, model.forward_features(images(32, 32)).prenorm)


def test_broken_backbones_are_refused_in_one_line(tmp_path: Path) -> None:
    state = dict(make(replace(TINY, depth=12)).state_dict())
    half = {key: t.half() for key, t in state.items()}
    torch.save(half, tmp_path / "half.pth")
    assert {p.dtype for p in load_backbone(tmp_path / "half.pth").parameters()} == {torch.float32}
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / ".metadata").touch()
    with pytest.raises(WeightsError, match="give the run directory"):
        load_backbone(tmp_path / "checkpoint")
    no_norms = {key: t for key, t in state.items() if "norm1" not in key}
    nan = {**state, "blocks.3.attn.qkv.bias": torch.full((576,), float("nan"))}
    nan["blocks.4.attn.qkv.bias"] = torch.full((576,), float("inf"))
    lost = {key: t for key, t in state.items() if not key.endswith(("fc1.bias", "fc2.bias")) or ".7." in key}
    extra = {**state, **{f"blocks.{i}.adapter.weight": torch.zeros(2) for i in range(12)}}
    many = {**state, **{f"strange_{i}": torch.zeros(2) for i in range(9)}}
    short = {**state, "blocks.5.mlp.fc1.weight": torch.zeros(768, 191)}
    resnet = {"visual.conv1.weight": torch.zeros(2, 3, 3, 3), "visual.layer1.0.conv1.weight": torch.zeros(2)}
    for content, words in (
        (no_norms, r"incomplete: without blocks\.\{0-11\}\.norm1\.bias, blocks\.\{0-11\}\.norm1\.weight"),
        (nan, r"not finite: blocks\.\{3-4\}\.attn\.qkv\.bias"),
        (lost, r"without blocks\.\{0-6,8-11\}\.mlp\.fc1\.bias, blocks\.\{0-6,8-11\}\.mlp\.fc2\.bias"),
        (extra, r"unknown architecture: what is blocks\.\{0-11\}\.adapter\.weight\?"),
        (many, "strange_4 and 4 more"),
        (short, "blocks.5.mlp.fc1.weight is 768 x 191, 768 x 192 was expected"),
        ({**state, "dist_token": torch.zeros(1, 1, 192)}, "distilled DeiT"),
        (resnet, "image tower is a ResNet"),
        ({**state, "rope_embed.periods": torch.ones(4)}, "DINOv3 model with pos_embed"),
        ({"classifier.weight": torch.zeros(2, 2)}, "only heads"),
        ({"features.0.weight": torch.zeros(2, 2)}, "no vision transformer in it"),
    ):
        torch.save(content, tmp_path / "broken.pth")
        with pytest.raises(WeightsError, match=words) as caught:
            load_backbone(tmp_path / "broken.pth")
        assert str(caught.value).startswith(f"{tmp_path}/broken.pth: ") and "\n" not in str(caught.value)
        if content is nan:  # what is missing or strange is reported there, but this would start a run from nothing
            with pytest.raises(WeightsError, match=words):
                initialise(make(replace(TINY, depth=12)), tmp_path / "broken.pth")


def test_huggingface_models_of_other_kinds_are_refused(tmp_path: Path) -> None:
    theirs = transformers_model("ViTModel", hidden_act="relu")
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(WeightsError, match="its activation is relu"):
        load_backbone(tmp_path)
    gated = transformers_model("DINOv3ViTModel", use_gated_mlp=True, hidden_act="gelu")
    gated.save_pretrained(tmp_path / "gated")  # type: ignore[operator]
    with pytest.raises(WeightsError, match="its activation is gelu"):
        load_backbone(tmp_path / "gated")
    config = json.loads((tmp_path / "config.json").read_text())
    for kind in ("deit", "siglip_vision_model", "swin"):
        (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": kind}))
        with pytest.raises(WeightsError, match=f"kind {kind}: only dinov2, "):
            load_backbone(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_base": 100.0, "num_registers": 3},
        {"pre_norm": True, "activation": "quick_gelu", "norm_eps": 1e-5},
        {"ffn": "swiglu", "ffn_width": 100},
    ],
)
def test_networks_of_these_kinds_can_be_trained_and_saved(tmp_path: Path, change: dict[str, Any]) -> None:
    """With drop path, images of two sizes, and every parameter with a gradient; the file opens as the same network."""
    cfg = replace(TINY, drop_path=0.5, **change)
    model = build_vit(cfg)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.init_weights()
    randomise(model)
    model.train()
    masks = [torch.rand(2, 16) > 0.5, None]
    both = model([images(32, 32), images(16, 24)], masks, torch.Generator().manual_seed(0))
    sum(features.prenorm.square().sum() + tokens(features).sum() for features in both).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    together = model([images(32, 32), images(16, 24)])
    close(together[1].prenorm, model.forward_features(images(16, 24)).prenorm)
    save_backbone(tmp_path / "own.safetensors", model.state_dict(), cfg)
    again = load_backbone(tmp_path / "own.safetensors")
    assert again.config == cfg
    close(again.forward_features(images(32, 32)).prenorm, together[0].prenorm)


def test_starting_from_another_kind_of_network_says_what_differs(tmp_path: Path) -> None:
    theirs = make(replace(TINY, rope_base=100.0, norm_eps=1e-5))
    save_backbone(tmp_path / "theirs.safetensors", theirs.state_dict(), theirs.config)
    report = initialise(make(seed=1), tmp_path / "theirs.safetensors")
    assert report.missing == ["pos_embed"]
    assert any("rope_base=100.0, this model 0.0" in note for note in report.notes)
    assert any("norm_eps=1e-05, this model 1e-06" in note for note in report.notes)
