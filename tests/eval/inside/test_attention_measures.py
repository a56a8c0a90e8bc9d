"""How maps are spread and how alike they are, against slow sums in float64 and maps whose figures are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dinoreg.models.maps import attention_rows
from dinoreg.models.vit import ModelConfig, VisionTransformer, build_vit
from eval.inside.attention.looking import (
    COSINE,
    DIVERGENCE,
    ENTROPY,
    HEAD_ENTROPY,
    LOG_PEAK,
    ON_PATCHES,
    OUTLIER_MASS,
    attend,
    note,
)
from eval.inside.attention.measures import (
    central_patch,
    cosine,
    entropy,
    jensen_shannon,
    lie_of,
    mass_on,
    mean_of_pairs,
    normalised,
    peak,
)


def random_weights(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) ** 4


def slow_entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def test_an_even_map_has_the_entropy_log_n_and_one_patch_alone_none() -> None:
    even, alone = torch.full((1, 49), 1 / 49), torch.eye(49)[:1]
    assert entropy(even).item() == pytest.approx(math.log(49)) and entropy(alone).item() == 0
    assert peak(even).item() == pytest.approx(1) and peak(alone).item() >= 1e6  # the median is 0
    assert normalised(torch.zeros(1, 4)).tolist() == [[0, 0, 0, 0]]


def test_entropy_cosine_and_divergence_equal_slow_sums() -> None:
    p = normalised(random_weights(2, 3, 10))
    alike, apart, spread = cosine(p), jensen_shannon(p), entropy(p)
    for b in range(2):
        rows = p[b].double().tolist()
        for i in range(3):
            assert spread[b, i].item() == pytest.approx(slow_entropy(rows[i]), rel=1e-5)
            for j in range(3):
                mixed = [(x + y) / 2 for x, y in zip(rows[i], rows[j], strict=True)]
                nats = slow_entropy(mixed) - (slow_entropy(rows[i]) + slow_entropy(rows[j])) / 2
                assert apart[b, i, j].item() == pytest.approx(nats / math.log(2), abs=1e-6)
                lengths = math.hypot(*rows[i]) * math.hypot(*rows[j])
                assert alike[b, i, j].item() == pytest.approx(float(np.dot(rows[i], rows[j])) / lengths, rel=1e-5)


def test_equal_maps_are_0_bits_apart_and_maps_without_overlap_1_bit() -> None:
    maps = torch.tensor([[[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0.25, 0.75]]])
    apart, alike = jensen_shannon(maps)[0], cosine(maps)[0]
    assert apart[0, 1].item() == pytest.approx(0, abs=1e-7) and apart[0, 2].item() == pytest.approx(1)
    assert alike[0, 1].item() == pytest.approx(1) and alike[0, 2].item() == 0
    cls, among = mean_of_pairs(jensen_shannon(maps))
    assert cls.item() == pytest.approx(0.5) and among.item() == pytest.approx(1)
    assert mean_of_pairs(maps[:, :1, :1])[1].isnan().all()  # CLS alone


def test_the_peak_is_in_units_of_the_median_of_numpy() -> None:
    for count in (10, 11):
        p = normalised(random_weights(3, count))
        torch.testing.assert_close(peak(p), p.amax(-1) / torch.from_numpy(np.median(p.numpy(), axis=-1)))


def test_figures_of_maps_are_as_exact_where_the_network_computes_in_bf16() -> None:
    weights, outliers = random_weights(2, 3, 4, 30), torch.zeros(2, 30, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = note(weights, outliers)
    exact = note(weights, outliers)
    torch.testing.assert_close(coarse.pairs, exact.pairs)
    torch.testing.assert_close(coarse.similarities, exact.similarities)
    torch.testing.assert_close(coarse.tokens, exact.tokens)


def test_mass_is_counted_in_each_image_by_itself() -> None:
    p = torch.tensor([[[0.1, 0.2, 0.7]], [[0.5, 0.5, 0.0]]])
    chosen = torch.tensor([[True, False, True], [False, True, False]])
    torch.testing.assert_close(mass_on(p, chosen), torch.tensor([[0.8], [0.5]]))
    heads = p[:, :, None].expand(-1, -1, 4, -1)
    torch.testing.assert_close(mass_on(heads, chosen), torch.tensor([[[0.8] * 4], [[0.5] * 4]]))


def test_where_a_map_lies() -> None:
    corner = torch.zeros(4, 5)
    corner[0, 4] = 2.0
    lie = lie_of(corner, (0.0, 4.0))
    assert (lie.row, lie.column, lie.reach) == (0, 1, 0) and math.isnan(lie.border)
    even = lie_of(torch.ones(4, 5), (1.0, 1.0))
    assert even == pytest.approx((0.5, 0.5, 1, 1))
    assert math.isnan(lie_of(torch.ones(2, 2), (0.0, 0.0)).border)
    assert central_patch((16, 16)) == (8, 8) and central_patch((3, 5)) == (1, 2)


def test_heads_that_differ_are_told_apart_from_their_mean() -> None:
    """Head 0 looks at patch 0 alone, head 1 at patch 1: each is sharp, and their mean is two patches."""
    weights = torch.zeros(1, 2, 3, 4)  # heads, CLS with a register and the patch, patches
    weights[0, 0, :, 0] = weights[0, 1, :, 1] = 0.5  # the rest goes to CLS and registers
    outliers = torch.tensor([[True, False, False, False]])
    noted = note(weights, outliers)
    cls = noted.tokens[0, 0]
    assert cls[ON_PATCHES].item() == pytest.approx(0.5) and cls[OUTLIER_MASS].item() == pytest.approx(0.5)
    assert cls[ENTROPY].item() == pytest.approx(math.log(2)) and cls[HEAD_ENTROPY].item() == 0
    assert noted.heads[0, :, 3].tolist() == [1, 0] and noted.outliers.tolist() == [1]
    torch.testing.assert_close(noted.average[0], torch.tensor([0.25, 0.25, 0, 0]).double())
    assert noted.similarities.shape == (2, 2, 2)  # of CLS and the register, not of the patch
    assert noted.pairs[0, COSINE].isnan() and noted.pairs[0, DIVERGENCE].isnan()  # one register has no pair


def test_an_even_map_has_a_peak_of_1() -> None:
    noted = note(torch.full((2, 3, 2, 9), 0.1), torch.zeros(2, 9, dtype=torch.bool))
    torch.testing.assert_close(noted.tokens[..., LOG_PEAK], torch.zeros(2, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(noted.tokens[..., ENTROPY], torch.full((2, 2), math.log(9)))
    assert noted.tokens[..., OUTLIER_MASS].eq(0).all()


def small_network(registers: int) -> VisionTransformer:
    model = build_vit(ModelConfig(embed_dim=32, depth=3, num_heads=2, patch_size=7, image_size=28,
                                  layerscale=1.0, num_registers=registers))  # fmt: skip
    torch.manual_seed(0)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize(("layer", "norm_layer"), [(2, 2), (0, 2), (2, 0)])
def test_attention_and_norms_are_those_of_the_layers_asked_for(registers: int, layer: int, norm_layer: int) -> None:
    model, images = small_network(registers), torch.randn(2, 3, 28, 42)
    found = attend(model, images, layer, norm_layer)
    rows = attention_rows(model, images, layer).transpose(1, 2)[..., 1 + registers :]
    torch.testing.assert_close(found.weights[:, :, :-1], rows)
    assert found.weights.shape == (2, 2, 2 + registers, 24) and found.norms.shape == (2, 24)
    *_, (after, packing) = (pair for _, pair in zip(range(norm_layer + 2), model.residual_stream(images), strict=False))
    expected = packing.split(after)[0][:, 1 + registers :].norm(dim=-1)
    torch.testing.assert_close(found.norms, expected)
    assert (found.weights.sum(-1) < 1).all()


def test_a_head_that_looks_at_no_patch_has_figures_that_can_be_averaged() -> None:
    weights = torch.zeros(2, 1, 4, 16)
    found = note(weights, torch.zeros(2, 16, dtype=torch.bool))
    for figures in (found.tokens, found.heads, found.pairs, found.similarities):
        assert figures.isfinite().all()
    assert found.tokens[0, 0, LOG_PEAK] == 0 and math.isnan(lie_of(weights[0, 0, 0].view(4, 4), (1.5, 1.5)).row)
