"""Weights of other libraries give the outputs of other libraries; files are told apart and refused in words."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_models import huggingface, randomise, timm_model
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import dinoreg
from dinoreg.models.files import naming_a_full_disk
from dinoreg.models.formats import WeightsError
from dinoreg.models.vit import ModelConfig, VisionTransformer, build_vit
from dinoreg.models.weights import compact, initialise, load_backbone, read_weights, save_backbone

TINY = ModelConfig(arch="vit_tiny", depth=2, patch_size=8, image_size=32, layerscale=0.5)
SIZES = [(28, 28), (42, 42), (14, 35), (56, 7)]


def make(cfg: ModelConfig = TINY, seed: int = 0) -> VisionTransformer:
    model = build_vit(cfg)
    randomise(model, seed)
    return model


def images(height: int, width: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(3))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("registers", [None, 4, 1])
def test_equals_huggingface(tmp_path: Path, registers: int | None, swiglu: bool, size: tuple[int, int]) -> None:
    theirs = huggingface(registers, swiglu)
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    ours = load_backbone(tmp_path)
    batch = images(*size)
    with torch.no_grad():
        expected = theirs(batch, output_hidden_states=True)
        features = ours.forward_features(batch)
    first = 1 + (registers or 0)
    close(features.cls, expected.last_hidden_state[:, 0])
    close(features.registers, expected.last_hidden_state[:, 1:first])
    close(features.patches, expected.last_hidden_state[:, first:])
    close(features.prenorm, expected.hidden_states[-1])


def test_huggingface_masks_and_names_in_memory() -> None:
    """The mask token acts at the same place; module names since transformers 5 are understood too."""
    from dinoreg.models.foreign.detect import convert
    from dinoreg.models.formats import infer_config

    theirs = huggingface(4)
    weights = convert(theirs.state_dict(), {"num_attention_heads": 2})
    ours = build_vit(infer_config(weights)).eval()
    ours.load_state_dict(weights.state)
    mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    with torch.no_grad():
        close(
            ours.forward_features(images(28, 28), mask).prenorm,
            theirs.embeddings
            and theirs(images(28, 28), bool_masked_pos=mask, output_hidden_states=True).hidden_states[-1],
        )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 3}),
        ("vit_small_patch14_dinov2", {"img_size": 56, "depth": 3}),
        ("vit_giant_patch14_reg4_dinov2", {"img_size": 28, "depth": 2, "embed_dim": 192, "num_heads": 3}),
        ("vit_small_patch16_224", {"img_size": 64, "depth": 3, "reg_tokens": 2}),
    ],
)
def test_equals_timm(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    theirs = timm_model(name, dynamic_img_size=True, **options)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = load_backbone(tmp_path / "model.safetensors")
    patch = ours.patch_size
    for height, width in ((options["img_size"], options["img_size"]), (2 * patch, 5 * patch)):
        with torch.no_grad():
            expected = theirs.forward_features(images(height, width))  # type: ignore[operator]
            features = ours.forward_features(images(height, width))
        close(torch.cat([features.cls[:, None], features.registers, features.patches], 1), expected)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_own_file_is_enough_alone(tmp_path: Path, registers: int, ffn: str) -> None:
    cfg = replace(TINY, embed_dim=40, num_heads=5, in_channels=4, num_registers=registers, ffn=ffn, pos_offset=0.1)
    model = make(cfg)  # type: ignore[arg-type]
    save_backbone(tmp_path / "deep" / "step.safetensors", model.state_dict(), cfg, {"step": "7"})
    again = dinoreg.load_backbone(tmp_path / "deep" / "step.safetensors")
    assert again.config == cfg and not again.training
    batch = torch.randn(2, 4, 16, 40)
    close(again.forward_features(batch).prenorm, model.eval().forward_features(batch).prenorm)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["step.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    model, path = make(), tmp_path / "a.safetensors"
    save_backbone(path, model.state_dict(), TINY)
    before = path.read_bytes()
    shared = torch.zeros(4)
    with pytest.raises(RuntimeError):
        save_backbone(path, {"one": shared, "two": shared}, TINY)  # safetensors refuses shared memory
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def chunked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as DINOv2's training writes them with block_chunks = 2."""
    return {k.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): t for k, t in state.items()}


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_checkpoints(tmp_path: Path, registers: int) -> None:
    cfg = replace(TINY, num_registers=registers)
    model = make(cfg).eval()
    state = dict(model.state_dict())
    heads = {"dino_head.mlp.0.weight": torch.zeros(3, 3), "ibot_head.last_layer.weight_g": torch.zeros(3, 1)}
    teacher = {f"backbone.{k}": t for k, t in chunked(state).items()} | heads
    for name, content in (
        ("flat.pth", state),
        ("teacher.pth", {"teacher": teacher, "iteration": 3}),
        ("module.pth", {"teacher": {f"module.{k}": t for k, t in teacher.items()}}),
    ):
        torch.save(content, tmp_path / name)
        loaded = load_backbone(tmp_path / name)
        assert (loaded.config.pos_antialias, loaded.config.pos_offset) == ((True, 0.0) if registers else (False, 0.1))
        assert (
            loaded.config.arch == "vit_tiny" and loaded.config.depth == 2 and loaded.config.num_registers == registers
        )
        close(loaded.forward_features(images(32, 32)).prenorm, model.forward_features(images(32, 32)).prenorm)
    assert sorted(read_weights(tmp_path / "teacher.pth").unused) == sorted(heads)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load_backbone(tmp_path / "old.pth")


def test_known_sizes_are_recognised() -> None:
    from dinoreg.models.formats import Weights, infer_config

    for arch, ffn in (("vit_small", "mlp"), ("vit_so400m", "mlp"), ("vit_giant", "swiglu"), ("vit_huge", "mlp")):
        cfg = ModelConfig(arch=arch, ffn=ffn, image_size=518)  # type: ignore[arg-type]
        with torch.device("meta"):
            state = build_vit(cfg).state_dict()
        assert infer_config(Weights(state, "")) == cfg


def test_files_that_hold_no_backbone(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_backbone(good, make().state_dict(), TINY)
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-1000])
    torch.save(make().state_dict(), tmp_path / "good.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "good.pth").read_bytes()[:-1000])
    (tmp_path / "text.pth").write_text("not weights at all\n")
    (tmp_path / "empty.pth").touch()
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"step": 3}, tmp_path / "none.pth")
    torch.save({"teacher": {"dino_head.mlp.0.weight": torch.zeros(2)}}, tmp_path / "heads.pth")
    torch.save({"conv1.weight": torch.zeros(2, 3, 7, 7)}, tmp_path / "resnet.pth")
    torch.save({**make().state_dict(), "rope_embed.periods": torch.zeros(2)}, tmp_path / "v3.pth")
    torch.save({**make().state_dict(), "blocks.0.attn.q_norm.weight": torch.zeros(2)}, tmp_path / "qnorm.pth")
    torch.save({k: t for k, t in make().state_dict().items() if k != "norm.bias"}, tmp_path / "gap.pth")
    torch.save(make(replace(TINY, embed_dim=40, num_heads=5)).state_dict(), tmp_path / "width.pth")
    torch.save(Runs(), tmp_path / "code.pth")
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    save_file({"embeddings.word.weight": torch.zeros(2)}, folder / "model.safetensors")
    (tmp_path / "empty_folder").mkdir()
    for name, words in {
        "absent.pth": "no such file", "cut.safetensors": "truncated", "cut.pth": "truncated",
        "text.pth": "no checkpoint", "empty.pth": "truncated", "list.pth": "holds a list", "none.pth": "no tensors",
        "heads.pth": "only heads", "resnet.pth": "no vision transformer", "v3.pth": "DINOv3", "qnorm.pth": "q_norm",
        "gap.pth": "without norm.bias", "width.pth": "unknown architecture: width 40", "code.pth": "it asks for",
        "bert": "kind bert", "empty_folder": "without model.safetensors",
    }.items():  # fmt: skip
        with pytest.raises(WeightsError, match=words) as caught:
            load_backbone(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)
    assert not Runs.ran


class Runs:
    """Something whose unpickling runs code."""

    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (setattr, (Runs, "ran", True))


class Writes:
    """What a malicious file does: a command of its maker's."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (self.command,))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("hidden", ["alone", "beside", "within"])
def test_code_in_a_file_runs_only_when_it_is_trusted(tmp_path: Path, zipped: bool, hidden: str) -> None:
    bad, state = Writes(f"echo ran >> {tmp_path}/witness"), dict(make().state_dict())
    content = {"alone": bad, "beside": {**state, "args": bad}, "within": {"teacher": state, "deep": [{"x": (bad,)}]}}
    path, witness = tmp_path / "foreign.pth", tmp_path / "witness"
    torch.save(content[hidden], path, _use_new_zipfile_serialization=zipped)
    for opening in (load_backbone, read_weights, lambda name: initialise(make(), name)):
        with pytest.raises(WeightsError, match=r"asks for (posix|os)\.system; if you trust") as caught:
            opening(path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
        assert "trust=True" in str(caught.value) and "model.init_from_trusted=true" in str(caught.value)
    assert not witness.exists()
    if hidden != "alone":
        loaded = load_backbone(path, trust=True)
        close(loaded.forward_features(images(32, 32)).cls, make().eval().forward_features(images(32, 32)).cls)
        assert witness.read_text() == "ran\n"
        assert initialise(make(seed=1), path, trust=True).share == 1


def test_a_folder_is_not_trusted_either(tmp_path: Path) -> None:
    torch.save({"x": Writes(f"touch {tmp_path}/witness")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="would run code"):
        load_backbone(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere.bin"}}))
    with pytest.raises(WeightsError, match=r"names \.\./elsewhere\.bin, which lies elsewhere"):
        load_backbone(tmp_path, trust=True)
    assert not (tmp_path / "witness").exists()


def test_a_trusted_file_may_need_what_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "foreign.pth").write_bytes(b"\x80\x02cno_such_module\nThing\n.")
    with pytest.raises(WeightsError, match=r"asks for no_such_module\.Thing|no checkpoint"):
        load_backbone(tmp_path / "foreign.pth")
    with pytest.raises(WeightsError, match="needs code that is not installed here"):
        load_backbone(tmp_path / "foreign.pth", trust=True)


def test_strange_names_and_shapes_are_refused_at_once(tmp_path: Path) -> None:
    """A state dict is free to claim anything; only WeightsError may come of it."""
    state = dict(make().state_dict())
    strange: list[dict[str, Any]] = [
        {"blocks.999999999.norm1.weight": torch.zeros(2)},
        {"blocks.x.norm1.weight": torch.zeros(2)},
        {"blocks.²": torch.zeros(2)},
        {"patch_embed.proj.weight": torch.zeros(3)},
        {"patch_embed.proj.weight": torch.zeros(192, 3, 0, 0)},
        {"pos_embed": torch.zeros(())},
        {"pos_embed": torch.zeros(1, 0, 192)},
        {"register_tokens": torch.zeros(4)},
        {"reg_token": torch.zeros(4)},
        {"blocks.0.mlp.fc2.weight": torch.zeros(())},
        {"blocks.0.attn.qkv.weight": torch.zeros(2, 2, dtype=torch.complex64)},
        {"embeddings.cls_token": torch.zeros(1)},
        {"cls_token": torch.zeros(1, 1, 192).to_sparse()},
    ]
    path = tmp_path / "strange.pth"
    for change in strange:
        torch.save({**state, **change}, path)
        for opening in (load_backbone, lambda name: initialise(make(), name)):
            with pytest.raises(WeightsError) as caught:
                opening(path)
            assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "metadata",
    ["", "[]", "{", '{"depth": 1000000000}', '{"depth": "2"}', '{"patch_size": 0}', '{"activation": "relu"}',
     '{"ffn": "moe"}', '{"norm_eps": NaN}'],
)  # fmt: skip
def test_our_own_header_may_be_forged_too(tmp_path: Path, metadata: str) -> None:
    save_file(dict(make().state_dict()), tmp_path / "own.safetensors", {"dinoreg.model": metadata})
    with pytest.raises(WeightsError) as caught:
        load_backbone(tmp_path / "own.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_give_one_line(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "damaged"
    state = {"norm.weight": torch.zeros(8), "deep": {"step": 3, "names": ["a", "b"]}}
    torch.save(state, path)
    seeds = [path.read_bytes()]
    torch.save(state, path, _use_new_zipfile_serialization=False)
    seeds.append(path.read_bytes())
    save_backbone(path, {"norm.weight": torch.zeros(8)}, TINY)
    seeds.append(path.read_bytes())
    for turn in range(600):
        content = bytearray(seeds[turn % 3])
        for _ in range(rng.integers(1, 6)):
            content[rng.integers(len(content))] = rng.integers(256)
        path.write_bytes(content)
        with pytest.raises(WeightsError) as caught:
            load_backbone(path)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_hub_names_need_the_hub_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match="huggingface_hub is not installed"):
        load_backbone("hf:facebook/dinov2-small")


def test_sharded_huggingface_folder(tmp_path: Path) -> None:
    theirs = huggingface(4)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")  # type: ignore[operator]
    assert (tmp_path / "model.safetensors.index.json").is_file()
    with torch.no_grad():
        close(load_backbone(tmp_path).forward_features(images(28, 28)).cls, theirs(images(28, 28)).pooler_output)


def test_compact_names() -> None:
    keys = ["cls_token", *[f"blocks.{i}.{p}" for i in (0, 1, 2, 5) for p in ("a.b", "c")], "norm.bias"]
    assert compact(keys) == ["cls_token", "blocks.{0-2,5}.a.b", "blocks.{0-2,5}.c", "norm.bias"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_quantised_weights_are_not_taken_for_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {key: t.to(dtype) if key.endswith("qkv.weight") else t for key, t in make().state_dict().items()}
    save_backbone(tmp_path / "small.safetensors", state, TINY)
    with pytest.raises(WeightsError, match=r"quantised, or no weights: blocks.{0-\d}.attn.qkv.weight of the type"):
        load_backbone(tmp_path / "small.safetensors")


@pytest.mark.parametrize("said", ["[[0.5, 0.5, 0.5], [0, 0, 0]]", "[[0.5], [0.1]]", "[[0.5, 0.5, NaN], [1, 1, 1]]"])
def test_a_normalisation_that_is_none_is_refused(tmp_path: Path, said: str) -> None:
    save_backbone(tmp_path / "own.safetensors", make().state_dict(), TINY, {"dinoreg.normalisation": said})
    with pytest.raises(WeightsError, match="are not those of images of 3 channels"):
        load_backbone(tmp_path / "own.safetensors")


def test_a_run_without_a_teacher_and_an_empty_name_are_called_so(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(WeightsError, match="a run that has written no teacher yet"):
        load_backbone(tmp_path / "run")
    with pytest.raises(WeightsError, match="the name is empty"):
        load_backbone("")


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 100096 vs 99984"),
        OSError(28, "No space left on device"),
    ],
)
def test_a_full_disk_is_told_with_the_file(error: Exception) -> None:
    with pytest.raises(OSError, match=r"No space left on device: 'out.pth'"), naming_a_full_disk(Path("out.pth")):
        raise error
    with pytest.raises(RuntimeError, match="something else"), naming_a_full_disk(Path("out.pth")):
        raise RuntimeError("something else")
