"""Rows, one shot, ridge, registers and clutter, against slow references and known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from decoupled import DIM, SIZE, pictures, random_network, reading

from dinoreg.models.vit import VisionTransformer
from eval.inside.decoupling.clutter import clutter, rank_correlation
from eval.inside.decoupling.measure import ROW, Measured, measure, mixtures, part_names
from eval.inside.decoupling.oneshot import build_prototypes, class_score, draw_shots, guess
from eval.inside.decoupling.registers import RegisterSums
from eval.inside.decoupling.ridge import cross_fitted, fit_ridge, r2
from eval.inside.decoupling.split import GROUPS, Choices, split_cls
from eval.inside.decoupling.tally import choose_blocks
from eval.inside.look import Batch
from eval.inside.walk import walk


def look(model: VisionTransformer, count: int = 4, choices: Choices | None = None) -> Measured:
    images = pictures(count)
    batch = Batch(
        (images * 40 + 128).clamp(0, 255).to(torch.uint8), images, torch.arange(count), torch.zeros(count).long()
    )
    return measure(model, batch, choices or Choices(), range(model.depth))


def at(found: Measured, name: str) -> torch.Tensor:
    """(B, L)."""
    return found.rows[..., ROW.index(name)]


def test_without_registers_their_figures_are_undefined_and_not_zero() -> None:
    found = look(random_network(num_registers=0))
    for name in ROW:
        assert at(found, name).isnan().all() == name.endswith("_registers"), name
    assert "registers" not in part_names(Choices(renormalise=True), 0)
    assert not any("registers" in name for name in mixtures(Choices(), 0))


def test_rows_tell_shares_norms_and_cosines() -> None:
    model = random_network(num_registers=2)
    found = look(model)
    shares = sum(at(found, f"share_{group}") for group in ("patches", "registers", "cls"))
    torch.testing.assert_close(shares, torch.ones(4, 3))
    states = [x for x, _ in model.residual_stream(pictures(4))]
    cls = torch.stack([x.unflatten(0, (4, -1))[:, 0] for x in states], dim=1)
    torch.testing.assert_close(at(found, "norm_entering"), cls[:, :-1].norm(dim=-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(at(found, "cosine_last"), F.cosine_similarity(cls[:, 1:], cls[:, -1:], dim=-1))
    # The parts in the order of their names, and what they sum to.
    parts, names = found.parts[2], part_names(Choices(), 2)
    norms = torch.stack([at(found, f"norm_{name}")[:, 2] for name in names], dim=1)
    torch.testing.assert_close(parts.norm(dim=-1), norms)
    whole = found.points[:, 0, 0]
    torch.testing.assert_close(parts[:, :3].sum(1), whole)
    torch.testing.assert_close(at(found, "cosine_patches")[:, 2], F.cosine_similarity(parts[:, 0], whole))


@pytest.mark.parametrize("renormalise", [False, True])
def test_mixtures_of_parts_are_what_their_names_say(renormalise: bool) -> None:
    """But for the output bias, which is in none of them."""
    model, choices = random_network(num_registers=2), Choices(renormalise=renormalise)
    found = look(model, choices=choices)
    *_, step = walk(model, pictures(4))
    split, names = split_cls(step, 2), part_names(choices, 2)
    mixed = {name: found.parts[2][:, [names.index(part) for part in parts]].sum(1)
             for name, parts in mixtures(choices, 2).items()}  # fmt: skip
    torch.testing.assert_close(mixed["attended"] + split.bias, step.attended[:, 0])
    torch.testing.assert_close(mixed["branch"], found.points[:, 0, 0])
    torch.testing.assert_close(mixed["skip"], step.entering[:, 0] + split.parts[:, 2])
    for kind, group in enumerate(GROUPS, 1):
        torch.testing.assert_close(mixed[group], found.points[:, 0, kind])
        torch.testing.assert_close(mixed[f"{group}+residual"] + split.bias, found.points[:, 1, kind])


def test_a_network_whose_cls_reads_only_registers_has_no_patch_part() -> None:
    found = look(reading("registers"))
    assert at(found, "share_patches")[:, -1].max() < 1e-6
    torch.testing.assert_close(at(found, "share_registers")[:, -1], torch.ones(4))
    assert at(found, "norm_patches")[:, -1].max() < 1e-6 * at(found, "norm_registers")[:, -1].min()
    torch.testing.assert_close(at(found, "cosine_registers")[:, -1], torch.ones(4))


def test_each_class_gets_an_image_a_draw_another_one_where_it_can() -> None:
    labels = torch.tensor([0] * 3 + [1] * 2 + [3])
    shots = draw_shots(labels, 3, 4)
    assert sorted(shots[:, 0]) == [0, 1, 2] and set(shots[:, 1]) == {3, 4}
    assert (shots[:, 2] == -1).all() and (shots[:, 3] == 5).all()
    vectors = {place: torch.full((3, 2), float(place + 1)) * torch.tensor([1.0, place]) for place in (1, 2, 3, 5)}
    table = build_prototypes(vectors, shots, torch.zeros(3, 2))
    assert table.shape == (3, 4, 3, 2)
    assert (table[:, 2] == 0).all()
    lost = next(draw for draw in range(3) if shots[draw, 0] == 0)
    assert any(torch.equal(table[lost, 0], F.normalize(vectors[place], dim=-1)) for place in (1, 2))


def test_guesses_are_those_of_the_nearest_by_cosine() -> None:
    generator = torch.Generator().manual_seed(0)
    points, prototypes = torch.randn(20, 3, 4, 8, generator=generator), torch.randn(2, 9, 3, 8, generator=generator)
    labels = torch.randint(9, (20,), generator=generator)
    found = guess(points, F.normalize(prototypes, dim=-1), labels)
    assert found.shape == (20, 2, 3, 4, 2)
    for image, draw, point, kind in np.ndindex(20, 2, 3, 4):
        near = F.cosine_similarity(points[image, point, kind][None], prototypes[draw, :, point])
        best = near.argsort(descending=True)
        assert found[image, draw, point, kind, 0] == float(best[0] == labels[image])
        assert found[image, draw, point, kind, 1] == float(labels[image] in best[:5])


def test_a_class_without_a_training_image_is_never_found() -> None:
    prototypes = F.normalize(torch.rand(1, 10, 3, 8), dim=-1)
    prototypes[:, 3] = 0
    points = -torch.rand(4, 3, 4, 8)  # unlike all others
    found = guess(points, prototypes, torch.tensor([3, 3, 0, 1]))
    assert not found[:2].any()
    others = prototypes[:, [0, 1, 2, 4, 5, 6, 7, 8, 9]]
    assert torch.equal(found[2:], guess(points, others, torch.tensor([0, 0, 0, 1]))[2:])


def test_a_network_in_bf16_is_not_judged_in_bf16() -> None:
    model, images = random_network(num_registers=2), pictures(4)
    pixels = (images * 40 + 128).clamp(0, 255).to(torch.uint8)
    prototypes = F.normalize(torch.randn(2, 50, 3, DIM, generator=torch.Generator().manual_seed(0)), dim=-1)
    batch = Batch(pixels, images, torch.arange(4), torch.arange(4))
    with torch.autocast("cpu", torch.bfloat16):
        found = measure(model, batch, Choices(), [], prototypes)
    assert torch.equal(found.clutter, clutter(pixels)) and found.right is not None
    assert torch.equal(found.right, guess(found.points, prototypes, batch.labels))
    weights = found.attention / found.attention.sum(-1, keepdim=True)
    assert found.known.dtype == weights.dtype == torch.float32


def test_an_output_that_is_zero_guesses_by_lot() -> None:
    prototypes = F.normalize(torch.randn(1, 10, 3, 8), dim=-1)
    found = guess(torch.zeros(4, 3, 4, 8), prototypes, torch.arange(4))
    torch.testing.assert_close(found[..., 0], torch.full_like(found[..., 0], 0.1))
    torch.testing.assert_close(found[..., 1], torch.full_like(found[..., 1], 0.5))


def test_the_interval_of_one_shot_is_that_of_other_classes() -> None:
    labels = torch.arange(40).repeat_interleave(50)
    right = (labels % 2).double()  # classes are found whole or not at all: 2,000 images tell no more than 40
    score = class_score(right, labels)
    assert score.value == 50
    assert 28 < score.high - score.low < 33  # 2 x 1.96 x sqrt(.25 / 40)
    always = class_score(torch.ones(2000), labels)
    assert always.value == always.high == 100 and 99.7 < always.low < 99.9


def test_ridge_solves_the_normal_equations_and_leaves_one_out() -> None:
    generator = torch.Generator().manual_seed(0)
    for count, width in ((30, 6), (12, 20)):
        x = torch.randn(count, width, generator=generator).double() + 1
        y = (
            x[:, :3] @ torch.randn(3, 2, generator=generator).double()
            + torch.randn(count, 2, generator=generator).double()
        )
        for penalty in (1e-3, 0.5):
            fit = fit_ridge(x, y, torch.tensor([penalty]).double())
            centred = x - x.mean(0)
            inner = centred.T @ centred + penalty * count * torch.eye(width).double()
            torch.testing.assert_close(fit.weight, torch.linalg.solve(inner, centred.T @ (y - y.mean(0))))
            torch.testing.assert_close(fit.predict(x.mean(0)[None]), y.mean(0)[None])
        penalties = torch.tensor([1e-3, 0.03, 1.0, 30.0]).double()
        errors = [slow_left_out(x, y, float(penalty) * count) for penalty in penalties]
        assert fit_ridge(x, y, penalties).penalty == pytest.approx(float(penalties[int(np.argmin(errors))]) * count)


def slow_left_out(x: torch.Tensor, y: torch.Tensor, penalty: float) -> float:
    """Fits again without each image, by the same penalty."""
    error = 0.0
    for out in range(len(x)):
        kept = torch.arange(len(x)) != out
        centre, offset = x[kept].mean(0), y[kept].mean(0)
        a, b = x[kept] - centre, y[kept] - offset
        weight = torch.linalg.solve(a.T @ a + penalty * torch.eye(x.shape[1]).double(), a.T @ b)
        error += float((y[out] - (x[out] - centre) @ weight - offset).square().sum())
    return error


def test_what_is_linear_is_rebuilt_and_what_is_not_there_is_not() -> None:
    generator = torch.Generator().manual_seed(1)
    patches, registers = torch.randn(2000, 8, generator=generator), torch.randn(2000, 8, generator=generator)
    noise = torch.randn(2000, 4, generator=generator)
    y = patches[:, :4] + registers[:, :4] + noise  # a third each
    alone, other, both = (cross_fitted(each, y) for each in ([patches], [registers], [patches, registers]))
    assert r2(alone).value == pytest.approx(1 / 3, abs=0.05)
    assert r2(both).value == pytest.approx(2 / 3, abs=0.05)
    unique = r2(both, other)
    assert unique.low < r2(both).value - r2(other).value == pytest.approx(unique.value)
    assert unique.low < 1 / 3 < unique.high
    assert r2(cross_fitted([noise * 0 + 1], y)).value == pytest.approx(0, abs=1e-9)
    assert abs(r2(cross_fitted([torch.randn(2000, 8, generator=generator)], y)).value) < 0.05


def test_the_longest_register_and_its_cosines_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    registers = torch.randn(50, 3, 16, generator=generator)
    registers[:, 1, :2] += torch.tensor([90.0, -90.0])  # the same in every image
    read = F.layer_norm(registers, (16,)) * torch.cat([torch.full((2,), 0.01), torch.ones(14)])
    sums = RegisterSums(3, 16, "cpu")
    for rows in zip(registers.split(7), read.split(7), strict=True):
        sums.add(*rows)
    told = sums.told()
    assert told is not None and told["index"] == 1 and told["largest"] == [0, 1, 0]
    assert told["over_second"] > 10
    for place, each in enumerate((registers, read)):
        for register in range(3):
            units = F.normalize(each[:, register].double(), dim=-1)
            pairs = (units @ units.T)[~torch.eye(50).bool()]
            assert told["cosine"][place][register] == pytest.approx(float(pairs.mean()), abs=1e-9)
    assert told["cosine"][0][1] > 0.99 > 0.8 > told["cosine"][1][1]
    profile = sums.profile()
    torch.testing.assert_close(profile[0, 0], registers[:, 1].square().mean(0).sqrt().max())
    assert told["few"][0] > 0.99 > told["few"][1]
    assert RegisterSums(0, 16, "cpu").told() is None


def test_registers_of_zeros_are_undefined_and_not_infinite() -> None:
    sums = RegisterSums(2, 16, "cpu")
    sums.add(torch.zeros(5, 2, 16), torch.ones(5, 2, 16))
    told = sums.told()
    assert told is not None and told["over_second"] is None
    assert told["few"][0] is None and told["few"][1] == pytest.approx(3 / 16)


def test_clutter_is_measured_from_pixels() -> None:
    flat = torch.full((3, SIZE, SIZE), 100, dtype=torch.uint8)
    stripes = (torch.arange(SIZE) % 2 * 200).to(torch.uint8).expand(3, SIZE, SIZE)
    halves = (torch.arange(SIZE) // (SIZE // 2) * 200).to(torch.uint8).expand(3, SIZE, SIZE)
    edges, entropy = clutter(torch.stack([flat, stripes, halves])).T
    torch.testing.assert_close(edges, torch.tensor([0, 200, 200 / (SIZE - 1)]))
    torch.testing.assert_close(entropy, torch.tensor([0.0, 1.0, 1.0]))


def test_correlations_of_ranks() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, generator=generator)
    y = x + torch.randn(300, generator=generator)
    found = rank_correlation(x, y.exp())
    stats = pytest.importorskip("scipy.stats")
    assert found is not None
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.low < 0.65 < found.high and found.high - found.low < 0.2
    tied = torch.tensor([1.0, 1, 2, 2, 3]), torch.tensor([1.0, 2, 2, 3, 3])
    assert rank_correlation(*tied).value == pytest.approx(stats.spearmanr(*tied).statistic)  # type: ignore[union-attr]
    assert rank_correlation(x, torch.ones(300)) is None


def test_blocks_are_thinned_to_fit_and_the_last_is_kept() -> None:
    one = 8 * DIM**2 * 10
    assert choose_blocks(12, [], 1e9, 4, DIM) == list(range(12))
    assert choose_blocks(12, [], 12 * one, 4, DIM) == [0, 4, 7, 11] or len(choose_blocks(12, [], 12 * one, 4, DIM)) == 4
    assert choose_blocks(12, [], 1, 4, DIM) == [11]
    assert choose_blocks(12, [0, -2], 1, 4, DIM) == [0, 10, 11]
    assert choose_blocks(40, [], 9 * 2**30, 4, 1536) == list(range(40))
    with pytest.raises(IndexError):
        choose_blocks(12, [12], 1, 4, DIM)
