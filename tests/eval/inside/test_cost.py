"""What registers cost, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluating import run_suite, write_weights

from dinoreg.models.vit import ModelConfig, build_vit
from dinoreg.parallel.mesh import Ranks
from eval.backbone import Backbone, open_backbone
from eval.inside.cost.counting import cost_with, count_parameters, formula_increase
from eval.inside.cost.shown import findings
from eval.inside.finding import Album, Seen
from eval.report.read import read_evaluation
from eval.results import write_result
from eval.suite import Context, Place

LARGE = ModelConfig(arch="vit_large", patch_size=14)


def multiply_adds(tokens: int, dim: int, depth: int, patches: int, patch_size: int) -> int:
    """Each matrix by itself: patch embedding; qkv, projection, two layers four times as wide; q k^T and its use."""
    embedding = patches * 3 * patch_size**2 * dim
    layers = tokens * (dim * 3 * dim + dim * dim + 2 * dim * 4 * dim)
    return embedding + depth * (layers + 2 * tokens * tokens * dim)


@pytest.mark.parametrize("registers", [0, 1, 2, 4, 8, 16])
def test_fvcore_and_the_formula_count_what_is_worked_out_by_hand(registers: int) -> None:
    model = ModelConfig(embed_dim=64, depth=3, num_heads=2, patch_size=8, image_size=32)
    cost = cost_with(model, registers, 48)
    assert cost.counted == cost.formula == 2 * multiply_adds(1 + registers + 36, 64, 3, 36, 8)


@pytest.mark.parametrize(
    "kind",
    [{"ffn": "swiglu"}, {"rope_base": 100.0}, {"pre_norm": True, "activation": "quick_gelu"}, {"pos_offset": 0.1}],
)
def test_fvcore_and_the_formula_agree_for_networks_of_any_kind(kind: dict[str, Any]) -> None:
    model = ModelConfig(embed_dim=64, depth=2, num_heads=2, patch_size=8, image_size=32, **kind)
    for registers, size in ((0, 32), (3, 64)):
        cost = cost_with(model, registers, size)
        assert cost.counted == pytest.approx(cost.formula, rel=1e-12)


@pytest.mark.parametrize(
    ("arch", "ffn", "at_4", "at_16"),
    [("vit_large", "mlp", 1.62, 6.48), ("vit_giant", "swiglu", 1.60, 6.40), ("vit_small", "mlp", 1.70, 6.82)],
)
def test_published_sizes_cost_what_the_analytic_figures_say(arch: str, ffn: str, at_4: float, at_16: float) -> None:
    """The figures of the checklist, section 1.13, for images of 224 pixels; the paper says < 2 % and about 6 %."""
    model = replace(LARGE, arch=arch, ffn=ffn)  # type: ignore[arg-type]
    base, four, sixteen = (cost_with(model, number, 224).counted for number in (0, 4, 16))
    assert round(100 * (four / base - 1), 2) == at_4 and round(100 * (sixteen / base - 1), 2) == at_16


def test_the_formula_gives_the_whole_row_of_the_large_network() -> None:
    increase = [round(100 * more, 2) for more in formula_increase(LARGE, (1, 2, 4, 8, 16), 224)]
    assert increase == [0.40, 0.81, 1.62, 3.24, 6.48]
    assert round(100 * formula_increase(replace(LARGE, patch_size=16), [4], 224)[0], 1) == 2.1


def test_parameters_are_those_of_the_real_modules() -> None:
    for registers in (0, 3):
        model = ModelConfig(embed_dim=64, depth=2, num_heads=2, patch_size=8, image_size=32, num_registers=registers)
        assert count_parameters(model) == sum(each.numel() for each in build_vit(model).parameters())
    four, none = (count_parameters(replace(LARGE, num_registers=number)) for number in (4, 0))
    assert four - none == 4 * 1024 and round(100 * (four / none - 1), 4) in (0.0013, 0.0014)


def measured(folder: Path, registers: int, embed_dim: int = 64) -> Seen:
    model = ModelConfig(embed_dim=embed_dim, depth=2, num_heads=2, patch_size=8, image_size=32, num_registers=registers)
    network = build_vit(model)
    network.init_weights()
    network.found = "built by a test"
    backbone = Backbone(network, f"with {registers}")
    context = Context(Ranks.alone(), Place(), folder / "out", folder / "cache")
    path = write_result(folder, run_suite("cost", backbone, context), backbone, "w", 0.0)
    return Seen(f"{registers} registers, {embed_dim}", read_evaluation(path))


def test_the_network_s_own_number_is_the_score_that_counts(tmp_path: Path) -> None:
    backbone = open_backbone(write_weights(tmp_path / "small.safetensors"))
    result = run_suite("cost", backbone, Context(Ranks.alone(), Place(), tmp_path, tmp_path), "registers=[0,2]")
    first, score = next(iter(result.scores.items()))
    assert first == "flops_with_4" and list(result.scores) == ["flops_with_4", "flops_with_2"]
    expected = 100 * (multiply_adds(21, 64, 4, 16, 8) / multiply_adds(17, 64, 4, 16, 8) - 1)
    assert score.value == score.low == score.high == pytest.approx(expected) and score.better == "lower"
    assert not [note for note in result.notes if "differ" in note]


def test_networks_that_are_alike_share_a_curve_and_others_do_not(tmp_path: Path) -> None:
    seen = [measured(tmp_path / "a", 0), measured(tmp_path / "b", 5), measured(tmp_path / "c", 0, 32)]
    (found,) = findings(seen, Album(tmp_path / "page"))
    assert found.number == "1.13" and (tmp_path / "page" / found.pictures[0].png).is_file()
    assert [row[1] for row in found.rows] == ["0", "1", "2", "4", "5", "8", "16", "0", "1", "2", "4", "8", "16"]
    assert {row[0] for row in found.rows} == {"0 registers, 64 / 5 registers, 64", "0 registers, 32"}
    assert "Both ways of counting agree" in found.seen
