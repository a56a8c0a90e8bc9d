"""Probes and single tokens: what is drawn, what is fitted, against slow references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import GRID, PATCH, as_images, mark, planted_network, planted_pixels

from dinoreg.models.formats import IMAGENET
from dinoreg.parallel.mesh import Ranks
from eval.inside.artifacts.draws import draw_each, draw_some, generator_of
from eval.inside.artifacts.probes import (
    NORMAL,
    OUTLIER,
    TRAINED,
    ProbeTask,
    chance,
    choose_tokens,
    draw_tokens,
    equal_sizes,
    fit_ridge,
    probe_pixels,
    probe_position,
    score_probes,
)
from eval.inside.artifacts.single import Fitting, classify, columns_of, draw_single, tell_column
from eval.inside.artifacts.tally import add_up
from eval.inside.look import Batch

TASK = ProbeTask(layer=3, cutoff=60.0, most=6, mix="natural", normed=True, seed=0)
GRID2 = (GRID, GRID)
HOST = torch.device("cpu")


def batch_of(count: int, rate: float = 0.1) -> tuple[Batch, np.ndarray]:
    marked = mark(count, rate)
    labels = np.arange(count) % 4
    pixels = planted_pixels(marked, 0, labels)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return Batch(images, as_images(pixels), torch.arange(count), torch.from_numpy(labels)), marked


def test_draws_are_of_the_right_kind_and_do_not_depend_on_batches() -> None:
    among = torch.tensor([False, True, True, False, True])
    some = draw_some(among, 10, generator_of(0, 5))
    assert sorted(some.tolist()) == [1, 2, 4]
    each = draw_each(among, 50, generator_of(0, 5))
    assert set(each.tolist()) == {1, 2, 4}
    assert torch.equal(each, draw_each(among, 50, generator_of(0, 5)))
    assert not torch.equal(each, draw_each(among, 50, generator_of(1, 5)))
    assert not torch.equal(each, draw_each(among, 50, generator_of(0, 6)))


def test_even_images_train_and_odd_ones_are_tested_by_kind() -> None:
    outliers = torch.zeros(64, dtype=torch.bool)
    outliers[[3, 9]] = True
    trained = choose_tokens(outliers, 4, TASK)
    assert list(trained) == [TRAINED]
    assert len(trained[TRAINED].unique()) == 6
    tested = choose_tokens(outliers, 5, TASK)
    assert sorted(tested[OUTLIER].tolist()) == [3, 9]
    assert len(tested[NORMAL]) == 6
    assert not set(tested[NORMAL].tolist()) & {3, 9}
    balanced = choose_tokens(outliers, 4, ProbeTask(3, 60.0, 6, "balanced", True, 0))[TRAINED]
    assert set(balanced[:2].tolist()) == {3, 9}
    assert len(balanced) == 5


def test_drawn_tokens_are_the_networks_with_their_own_pixels() -> None:
    model, (batch, marked) = planted_network(), batch_of(6)
    rows = draw_tokens(model, batch, TASK).rows
    features = model.forward_features(batch.images)
    for place, role, position, token, pixels in zip(*rows.values(), strict=True):
        torch.testing.assert_close(token.float(), features.patches[place, position], rtol=2e-3, atol=2e-3)
        row, column = divmod(int(position), GRID)
        square = batch.pixels[place, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
        assert torch.equal(pixels, square.flatten())
        if role != TRAINED:
            assert bool(marked[place].ravel()[position]) == (role == OUTLIER)


def test_the_position_probe_reads_what_is_there_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    position = torch.randint(0, 16, (1200,), generator=generator)
    codes = torch.randn(16, 8, generator=generator)
    role = torch.where(torch.arange(1200) < 800, TRAINED, torch.where(torch.arange(1200) < 1000, NORMAL, OUTLIER))
    tokens = codes[position] + 0.1 * torch.randn(1200, 8, generator=generator)
    tokens[role == OUTLIER] = torch.randn(200, 8, generator=generator)  # which know nothing of where they are
    rows = {"role": role, "position": position, "token": tokens.half(), "place": torch.arange(1200) // 4}
    found = probe_position(rows, (4, 4), 1.0, 200, HOST)
    assert float(found["right"][role == NORMAL].mean()) > 0.97
    assert float(found["right"][role == OUTLIER].mean()) < 0.2
    assert float(found["distance"][role == OUTLIER].mean()) == pytest.approx(chance((4, 4))["distance"], rel=0.2)
    assert (found["distance"][found["right"] == 1] == 0).all()
    found |= {"error": found["distance"], "mean_error": found["distance"]}
    told, scores = score_probes(rows, found)
    assert told["normal"]["tokens"] == told["outlier"]["tokens"] == 200
    assert told["normal"]["images"] == 50
    score = scores["position_top1_outlier"]
    assert score.value == pytest.approx(100 * float(found["right"][role == OUTLIER].mean()))
    assert score.low < score.value < score.high


def test_ridge_is_the_solution_of_the_penalised_least_squares() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 6)), rng.normal(size=(50, 3))
    found = fit_ridge(torch.from_numpy(x), torch.from_numpy(y), 0.3)
    # The penalty as further rows of an ordinary least squares problem.
    rows = np.concatenate([x / np.sqrt(50), np.sqrt(0.3) * np.eye(6)])
    expected = np.linalg.lstsq(rows, np.concatenate([y / np.sqrt(50), np.zeros((6, 3))]), rcond=None)[0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_pixels_that_are_in_the_token_are_read_from_it() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (500, 12), generator=generator).to(torch.uint8)
    role = torch.arange(500) % 3
    token = pixels.float() / 128 - 1
    token[role == OUTLIER] = 0.0
    rows = {"role": role, "token": token.half(), "pixels": pixels}
    found = probe_pixels(rows, IMAGENET[1], 1e-6, HOST)
    assert float(found["error"][role == NORMAL].max()) < 0.05
    assert float(found["mean_error"][role == NORMAL].mean()) > 3
    # A token that is 0 is the mean of the training tokens only within their own scatter.
    assert float(found["error"][role == OUTLIER].mean()) > 3


def test_groups_may_be_tested_on_as_many_tokens() -> None:
    role = torch.tensor([TRAINED] * 3 + [NORMAL] * 10 + [OUTLIER] * 4)
    rows = {"role": role, "place": torch.arange(17)}
    kept = equal_sizes(rows, 0)
    assert torch.bincount(kept["role"]).tolist() == [3, 4, 4]
    assert torch.equal(role[kept["place"]], kept["role"])
    without = {"role": role[:13], "place": torch.arange(13)}
    assert equal_sizes(without, 0) is without


def test_chance_is_what_the_paper_calls_it() -> None:
    assert chance((16, 16)) == pytest.approx({"top1": 0.0039, "distance": 8.3}, rel=0.01)
    assert chance((37, 37)) == pytest.approx({"top1": 0.0007, "distance": 19.3}, rel=0.05)


def test_single_tokens_are_of_the_kinds_they_are_said_to_be() -> None:
    model, (batch, marked) = planted_network(registers=2), batch_of(8, 0.01)
    rows = draw_single(model, batch, 3, 60.0, draws=3, seed=0, normed=False).rows
    features = model.forward_features(batch.images)
    assert rows["has"].tolist() == marked.any((1, 2)).tolist()
    assert 0 < int(rows["has"].sum()) < 8
    torch.testing.assert_close(rows["tokens"][:, :3].float(), features.prenorm[:, :3], rtol=2e-3, atol=2e-3)
    norms = rows["tokens"][:, 3:].float().norm(dim=-1)
    assert (norms[:, :3] < 20).all()
    assert (norms[rows["has"], 3:] > 60).all()
    assert (norms[~rows["has"], 3:] == 0).all()


def test_columns_are_cls_patches_outliers_and_registers() -> None:
    assert [(each.name, list(each.places)) for each in columns_of(2, 2, True)] == [
        ("CLS", [0]), ("normal", [3, 4]), ("outlier", [5, 6]), ("register 0", [1]), ("register 1", [2]),
    ]  # fmt: skip
    assert [each.name for each in columns_of(0, 2, False)] == ["CLS", "normal"]


def known_rows(count: int, seed: int, outliers: float) -> dict[str, torch.Tensor]:
    """CLS and outliers show the class, normal patches do not; 1 register shows it in two of four classes."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % 4
    shown = torch.eye(4)[label]
    tokens = 0.05 * torch.randn(count, 6, 4, generator=generator)
    tokens[:, [0, 4, 5]] += shown[:, None]
    tokens[:, 1] += shown * (label < 2)[:, None]
    has = torch.rand(count, generator=generator) < outliers
    tokens[~has, 4:] = 0
    return {"label": label, "has": has, "tokens": tokens.half(), "place": torch.arange(count)}


def test_columns_are_as_good_as_what_they_know() -> None:
    fitting = Fitting([0.1, 10.0], 100, 1e-5, 0.2, 0)
    train, test = known_rows(400, 0, 0.7), known_rows(200, 1, 0.7)
    told, scores = classify(train, test, 1, 2, fitting, Ranks.alone())
    kept = int(test["has"].sum())
    assert (told["test"], told["skipped_test"]) == (kept, 200 - kept)
    top1 = {name: column["top1"] for name, column in told["columns"].items()}
    assert top1["CLS"] == top1["outlier"] == 100
    assert top1["normal"] < 45
    assert 60 < top1["register 0"] < 90
    assert set(scores) == {f"single_{name}_top1" for name in ("cls", "normal", "outlier", "register_0")}
    assert scores["single_cls_top1"].low < 100  # not certain, though all were right
    assert told["columns"]["CLS"]["std"] is None
    assert told["columns"]["normal"]["std"] is not None


def test_without_outliers_their_column_is_left_out_and_all_images_count() -> None:
    fitting = Fitting([1.0], 50, 1e-4, 0.2, 0)
    told, scores = classify(known_rows(80, 0, 0.0), known_rows(40, 1, 0.0), 1, 2, fitting, Ranks.alone())
    assert (told["train"], told["test"], told["skipped_test"]) == (80, 40, 0)
    assert "outlier" not in told["columns"]
    assert "single_outlier_top1" not in scores


def test_the_mean_of_classes_counts_each_class_once() -> None:
    right = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    told = tell_column(right, torch.tensor([0, 0, 0, 1]), 1.0)
    assert (told["top1"], told["mean_per_class"], told["std"]) == (75, 50, 0)


def test_rows_of_all_batches_lie_in_the_order_of_their_images() -> None:
    model, (batch, _) = planted_network(), batch_of(6)
    whole = add_up([draw_tokens(model, batch, TASK)], Ranks.alone()).rows
    pieces = add_up([draw_tokens(model, piece, TASK) for piece in reversed(batch.split(2))], Ranks.alone()).rows
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name])
