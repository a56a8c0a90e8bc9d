"""The vision transformer: packing, masks, drop path, positions, initialisation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dinoreg import chunks
from dinoreg.config import ConfigError
from dinoreg.models.heads import HeadConfig, PrototypeHead
from dinoreg.models.packing import Packing, draw_kept_rows
from dinoreg.models.vit import ARCHS, ModelConfig, VisionTransformer, build_vit, resample_positions
from dinoreg.parallel.shard import checkpoint_blocks

SMALL = ModelConfig(
    arch="vit_tiny", embed_dim=32, depth=3, num_heads=2, patch_size=4, image_size=16, layerscale=0.5, num_registers=4
)


def make(cfg: ModelConfig = SMALL, seed: int = 0, **kwargs: bool) -> VisionTransformer:
    """A network with weights large enough that every one of them matters."""
    torch.manual_seed(seed)
    model = build_vit(cfg, **kwargs)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    return model.eval()


def images(count: int, height: int = 16, width: int = 16, channels: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4])
def test_packed_equals_separate(ffn: str, registers: int) -> None:
    model = make(replace(SMALL, ffn=ffn, num_registers=registers))
    batches = [images(3), images(5, 8, 8), images(2, 8, 20)]
    together = model(batches)
    for batch, packed in zip(batches, together, strict=True):
        for image, row in zip(batch, range(len(batch)), strict=True):
            alone = model.forward_features(image[None])
            torch.testing.assert_close(packed.prenorm[row], alone.prenorm[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(packed.cls[row], alone.cls[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(packed.patches[row], alone.patches[0], rtol=0, atol=1e-5)


def test_gradients_of_packed_equal_separate() -> None:
    model, batches = make(), [images(3), images(4, 8, 12)]
    weights = [torch.randn(3, 32), torch.randn(4, 32)]
    sum((f.cls * w).sum() for f, w in zip(model(batches), weights, strict=True)).backward()  # type: ignore[union-attr]
    packed = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for batch, weight in zip(batches, weights, strict=True):
        (model.forward_features(batch).cls * weight).sum().backward()
    for one, other in zip(packed, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_features_are_the_normed_tokens_in_order() -> None:
    model = make()
    features = model.forward_features(images(2, 8, 20))
    assert features.grid == (2, 5)
    assert features.registers.shape == (2, 4, 32) and features.patches.shape == (2, 10, 32)
    expected = torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)
    torch.testing.assert_close(model.norm(features.prenorm), expected, rtol=0, atol=1e-6)


def test_masked_patches_become_the_mask_token_but_keep_their_position() -> None:
    model, batch = make(), images(2)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, [3, 7]] = True
    poisoned = batch.clone()
    poisoned[0, :, 0:4, 12:16] = 1e3  # patch 3
    poisoned[0, :, 4:8, 12:16] = -1e3  # patch 7
    a, b = model.forward_features(batch, mask), model.forward_features(poisoned, mask)
    torch.testing.assert_close(a.prenorm, b.prenorm, rtol=0, atol=0)
    tokens = model._embed(batch, mask, (4, 4))
    torch.testing.assert_close(tokens[0, 5 + 3], model.mask_token[0] + model.pos_embed[0, 1 + 3])
    assert not torch.equal(tokens[0, 5 + 4], model.mask_token[0] + model.pos_embed[0, 1 + 4])


def test_mask_token_has_a_zero_gradient_without_masks_in_training() -> None:
    model = make().train()
    model.forward_features(images(1)).cls.sum().backward()
    assert model.mask_token.grad is not None and not model.mask_token.grad.any()
    assert all(p.grad is not None for p in model.parameters())


def test_registers_have_no_position_and_no_register_is_none() -> None:
    model = make()
    tokens = model._embed(images(1), None, (4, 4))
    torch.testing.assert_close(tokens[0, 1:5], model.register_tokens[0])  # type: ignore[index]
    without = make(replace(SMALL, num_registers=0))
    assert "register_tokens" not in without.state_dict()
    assert without.forward_features(images(2)).registers.shape == (2, 0, 32)


def test_other_channels_and_wrong_sizes() -> None:
    model = make(replace(SMALL, in_channels=5))
    assert model.forward_features(images(1, channels=5)).cls.isfinite().all()
    with pytest.raises(ValueError, match="3 channels, the model takes 5"):
        model.forward_features(images(1))
    with pytest.raises(ValueError, match="not tiled by patches of 4"):
        model.forward_features(images(1, 18, 16, channels=5))


def test_drop_path_is_the_plain_residual_with_kept_rows_rescaled() -> None:
    """Against a slow forward, sequence by sequence, with the very rows that were drawn."""
    model = make(replace(SMALL, drop_path=0.5)).train()
    batches = [images(5), images(3, 8, 8)]
    out = model(batches, generator=torch.Generator().manual_seed(7))
    packing = Packing.of([(5, 1 + 4 + 16), (3, 1 + 4 + 4)])
    drawn = draw_kept_rows(packing, model.drop_rates, torch.Generator().manual_seed(7), torch.float32)
    tokens = [sequence for b in batches for sequence in model._embed(b, None, (b.shape[2] // 4, b.shape[3] // 4))]
    starts = packing.boundaries[:-1].tolist()
    gains = [5 / 2] * 5 + [3 / 1] * 3
    for block, kept in zip(model.blocks, drawn, strict=True):
        assert kept is not None and kept.packing.groups == ((2, 21), (1, 9))
        for i, start in enumerate(starts):
            alone = Packing.of([(1, len(tokens[i]))])
            if start in kept.attention:
                tokens[i] = tokens[i] + gains[i] * block.attention_branch(tokens[i], alone, "sdpa")
            if start in kept.ffn:
                tokens[i] = tokens[i] + gains[i] * block.ffn_branch(tokens[i])
    for i in range(8):
        got = out[0].prenorm[i] if i < 5 else out[1].prenorm[i - 5]
        torch.testing.assert_close(got, tokens[i], rtol=0, atol=1e-5)


def test_drop_path_rows() -> None:
    packing = Packing.of([(6, 3), (20, 2)])
    drawn = draw_kept_rows(packing, [0.3, 0.0, 0.9], torch.Generator().manual_seed(0), torch.float32)
    assert drawn[1] is None
    for kept, expected in ((drawn[0], (4, 14)), (drawn[2], (1, 2))):
        assert kept is not None
        assert kept.packing.groups == ((expected[0], 3), (expected[1], 2))
        for rows in (kept.attention, kept.ffn):
            assert len(rows.unique()) == len(rows) == kept.packing.tokens
            first = rows[: expected[0] * 3].view(-1, 3)
            assert (first[:, 0] % 3 == 0).all() and (first - first[:, :1]).tolist() == [[0, 1, 2]] * expected[0]
            assert first.max() < 18 <= rows[expected[0] * 3 :].min()
    assert drawn[0] is not None and not torch.equal(drawn[0].attention, drawn[0].ffn)


def test_drop_path_is_replayed_by_its_generator_and_absent_from_teacher_and_eval() -> None:
    model, batch = make(replace(SMALL, drop_path=0.5)).train(), [images(6)]
    one, same, other = (model(batch, generator=torch.Generator().manual_seed(s))[0].cls for s in (1, 1, 2))
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert not torch.allclose(one, other)
    teacher = make(replace(SMALL, drop_path=0.5), drop_path=False).train()
    torch.testing.assert_close(teacher(batch)[0].cls, model.eval()(batch)[0].cls, rtol=0, atol=0)


def test_drop_path_keeps_the_expectation() -> None:
    """A linear network's mean over many draws is the network without drop path."""
    cfg = replace(SMALL, depth=1, drop_path=0.4)
    model, batch = make(cfg).train(), images(1).expand(5, -1, -1, -1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        embedded = model._embed(batch, None, (4, 4)).flatten(0, 1)
        branch = model.blocks[0].attention_branch(embedded, Packing.of([(5, 21)]), "sdpa")  # type: ignore[operator]
        total = torch.zeros_like(branch)
        for _ in range(400):
            kept = draw_kept_rows(Packing.of([(5, 21)]), [0.4], generator, torch.float32)[0]
            assert kept is not None
            total.index_add_(0, kept.attention, branch[kept.attention] * kept.gain)
    ratio = (total / 400 / branch).view(5, -1)[:, 0]
    assert (ratio - 1).abs().max() < 0.15  # the standard error is 0.04


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_blocks_keep_the_same_rows(mode: str) -> None:
    batches = [images(6), images(4, 8, 8)]

    def gradients(model: VisionTransformer) -> list[Tensor]:
        features = model.train()(batches, generator=torch.Generator().manual_seed(3))
        sum(f.cls.square().sum() for f in features).backward()  # type: ignore[union-attr]
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, recomputing = make(replace(SMALL, drop_path=0.5)), make(replace(SMALL, drop_path=0.5))
    checkpoint_blocks(recomputing, mode)
    for one, other in zip(gradients(plain), gradients(recomputing), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_linear_drop_rates() -> None:
    model = build_vit(replace(SMALL, drop_path=0.4, drop_path_shape="linear"))
    assert model.drop_rates == pytest.approx([0, 0.2, 0.4])


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_meta_construction_then_init_leaves_no_nan(ffn: str) -> None:
    with torch.device("meta"):
        model = build_vit(replace(SMALL, ffn=ffn, layerscale=1e-5))
        head = PrototypeHead(32, HeadConfig(prototypes=64, hidden_dim=16, bottleneck_dim=8))
    for module in (model, head):
        module.to_empty(device="cpu")
        for tensor in module.state_dict().values():
            tensor.fill_(float("nan"))
        torch.manual_seed(0)
        module.init_weights()
        assert not [name for name, tensor in module.state_dict().items() if not tensor.isfinite().all()]
    state = model.state_dict()
    assert state["pos_embed"].std() == pytest.approx(0.02, rel=0.2)
    assert state["blocks.1.attn.qkv.weight"].std() == pytest.approx(0.02, rel=0.2)
    assert 0 < state["cls_token"].abs().max() < 1e-5 and 0 < state["register_tokens"].abs().max() < 1e-5
    assert not state["mask_token"].any() and not state["blocks.0.attn.qkv.bias"].any()
    assert (state["blocks.2.ls2.gamma"] == 1e-5).all()
    bound = (3 * 4 * 4) ** -0.5
    assert 0.9 * bound < state["patch_embed.proj.weight"].abs().max() <= bound


PUBLISHED = {  # millions of parameters in the public DINOv2 files
    ("vit_small", "mlp"): 22.06,
    ("vit_base", "mlp"): 86.58,
    ("vit_large", "mlp"): 304.37,
    ("vit_giant", "swiglu"): 1136.48,
}


@pytest.mark.parametrize(("arch", "ffn"), PUBLISHED)
def test_sizes_are_the_published_ones(arch: str, ffn: str) -> None:
    cfg = ModelConfig(arch=arch, ffn=ffn, image_size=518, num_registers=0)  # type: ignore[arg-type]
    with torch.device("meta"):
        count = sum(p.numel() for p in build_vit(cfg).parameters())
    assert count / 1e6 == pytest.approx(PUBLISHED[arch, ffn], abs=0.005)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_arch_builds(arch: str) -> None:
    with torch.device("meta"):
        model = build_vit(ModelConfig(arch=arch))  # type: ignore[arg-type]
    assert len(model.blocks) == ARCHS[arch].depth
    if arch == "vit_so400m":
        assert model.state_dict()["blocks.0.mlp.fc1.weight"].shape == (4304, 1152)


@pytest.mark.parametrize(("dim", "hidden"), [(384, 1024), (768, 2048), (1024, 2736), (1536, 4096)])
def test_swiglu_widths_are_dinov2s(dim: int, hidden: int) -> None:
    assert ModelConfig(embed_dim=dim, ffn="swiglu").ffn_hidden == hidden


def test_impossible_models_are_named() -> None:
    for change, key in (
        ({"num_heads": 5}, "num_heads"),
        ({"patch_size": 5}, "patch_size"),
        ({"num_registers": -1}, "num_registers"),
        ({"drop_path": 1.0}, "drop_path"),
    ):
        with pytest.raises(ConfigError) as caught:
            build_vit(replace(SMALL, **change))  # type: ignore[arg-type]
        assert caught.value.key == key


def test_positions_are_resampled_in_fp32_and_as_dinov2_does() -> None:
    positions = torch.randn(1, 49, 8, generator=torch.Generator().manual_seed(0))
    half = resample_positions(positions.bfloat16(), (7, 7), (3, 5), antialias=True)
    exact = resample_positions(positions.bfloat16().float(), (7, 7), (3, 5), antialias=True)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, exact.bfloat16(), rtol=0, atol=0)
    # An offset moves the sampling points: factor (3 + 0.1) / 7, no antialiasing, cubic weights with a = -0.75.
    shifted = resample_positions(positions, (7, 7), (3, 3), antialias=False, offset=0.1)
    expected = _bicubic(positions.double().view(7, 7, 8), 3, (3 + 0.1) / 7)
    torch.testing.assert_close(shifted.view(3, 3, 8).double(), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="pos_offset"):
        resample_positions(positions, (7, 7), (20, 20), antialias=False, offset=1.5)


def _bicubic(grid: Tensor, size: int, factor: float) -> Tensor:
    """Bicubic resampling of a square (n, n, D) grid by hand, edges repeated, to (size, size, D)."""

    def weight(x: float, a: float = -0.75) -> float:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    n = len(grid)
    matrix = torch.zeros(size, n, dtype=torch.float64)
    for out in range(size):
        centre = (out + 0.5) / factor - 0.5
        for tap in range(int(centre // 1) - 1, int(centre // 1) + 3):
            matrix[out, min(max(tap, 0), n - 1)] += weight(centre - tap)
    return torch.einsum("ih,jw,hwd->ijd", matrix, matrix, grid)


def test_head_is_a_cosine_with_each_prototype_times_its_length() -> None:
    torch.manual_seed(0)
    head = PrototypeHead(16, HeadConfig(prototypes=10, hidden_dim=12, bottleneck_dim=6))
    head.init_weights()
    torch.nn.init.uniform_(head.last_layer.weight_g, 0.5, 2)
    x = torch.randn(7, 16)
    hidden = head.mlp(x).double()
    for i in range(7):
        for k in range(10):
            v = head.last_layer.weight_v[k].double()
            cosine = (hidden[i] @ v) / (hidden[i].norm() * v.norm())
            assert head(x)[i, k].item() == pytest.approx((cosine * head.last_layer.weight_g[k]).item(), abs=1e-6)
    assert list(head.state_dict()) == [
        *[f"mlp.{i}.{p}" for i in (0, 2, 4) for p in ("weight", "bias")],
        "last_layer.weight_g",
        "last_layer.weight_v",
    ]


def test_prototypes_pass_gradients_as_written_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", {"cpu": 4 * 6})  # several pieces, the last one shorter
    torch.manual_seed(0)
    layer = PrototypeHead(16, HeadConfig(prototypes=10, bottleneck_dim=6)).double().last_layer
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    torch.nn.init.normal_(layer.weight_v)
    torch.nn.init.uniform_(layer.weight_g, 0.5, 2)
    weights, leaves = torch.randn(7, 10, dtype=torch.float64), [x, layer.weight_v, layer.weight_g]
    prototypes = layer.weight_g * layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True)
    plain = torch.autograd.grad((x / x.norm(dim=1, keepdim=True) @ prototypes.T * weights).sum(), leaves)
    for one, other in zip(torch.autograd.grad((layer(x) * weights).sum(), leaves), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # x is normalised in fp32


def test_head_options() -> None:
    head = PrototypeHead(16, HeadConfig(prototypes=10, bottleneck_dim=6, layers=1, train_scale=False))
    head.init_weights()
    assert not head.last_layer.weight_g.requires_grad and (head.last_layer.weight_g == 1).all()
    assert len(head.mlp) == 1
    tiny = torch.full((1, 6), 1e-12, dtype=torch.bfloat16)
    assert head.last_layer(tiny.float()).abs().max() > 1e-3  # not lost to an epsilon made for fp16


def test_activations_follow_the_parameters_dtype() -> None:
    model = make().bfloat16()
    features = model.forward_features(images(2))
    assert features.cls.dtype == features.prenorm.dtype == torch.bfloat16
    exact = make().forward_features(images(2))
    torch.testing.assert_close(features.cls.float(), exact.cls, rtol=0, atol=0.15)
