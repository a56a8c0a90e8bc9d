"""Logistic regression against scikit-learn, and the choice of C."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluating import Planted, run_suite, surroundings, write_data, write_weights

from dinoreg.config import ConfigError, load
from eval.logistic import Linear, fit_logistic
from eval.suites.logreg import LogregConfig


def clouds(count: int, classes: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around overlapping centres, far from the origin and of unequal scales, as features are."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    centres = rng.normal(size=(classes, dim))
    points = (centres[labels] + rng.normal(size=(count, dim))) * np.linspace(0.5, 3, dim) + 4
    return torch.from_numpy(points), torch.from_numpy(labels)


@pytest.mark.parametrize("C", [1e-6, 1e-2, 1.0, 10.0])
def test_solutions_are_those_of_scikit_learn(C: float) -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    features, labels = clouds(300, 5, 12, seed=0)
    mine = fit_logistic(features, labels, C, 5, max_iter=10000)
    theirs = sklearn.LogisticRegression(C=C, tol=1e-14, max_iter=20000, solver="newton-cg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such a tolerance is beyond reach
        theirs.fit(features.numpy(), labels.numpy())
    np.testing.assert_allclose(mine.weight, theirs.coef_, atol=1e-6 * np.abs(theirs.coef_).max())
    # Biases are free up to a constant.
    theirs_bias = theirs.intercept_ - theirs.intercept_.mean()
    np.testing.assert_allclose(mine.bias - mine.bias.mean(), theirs_bias, atol=1e-6 * max(1, np.abs(theirs_bias).max()))
    np.testing.assert_array_equal(mine.predict(features), theirs.predict(features.numpy()))


def test_the_gradient_vanishes_at_the_solution_by_autograd() -> None:
    features, labels = clouds(200, 3, 6, seed=1)
    fit = fit_logistic(features, labels, 0.3, 3)
    weight, bias = fit.weight.clone().requires_grad_(), fit.bias.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(features @ weight.T + bias, labels, reduction="sum")
    (loss + weight.square().sum() / 0.6).backward()
    assert weight.grad is not None and bias.grad is not None
    assert max(float(weight.grad.abs().max()), float(bias.grad.abs().max())) < 1e-5


def test_a_start_from_another_C_ends_at_the_same_place_sooner() -> None:
    features, labels = clouds(300, 4, 10, seed=2)
    near = fit_logistic(features, labels, 1.0, 4, tol=1e-7)
    cold, warm = (fit_logistic(features, labels, 1.2, 4, tol=1e-7, start=start) for start in (None, near))
    torch.testing.assert_close(warm.weight, cold.weight, rtol=1e-5, atol=1e-5)
    assert warm.iterations < cold.iterations


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clouds(100, 3, 5, seed=3)
    whole = fit_logistic(features, labels, 1.0, 3)
    monkeypatch.setattr("eval.logistic.ROWS", 21)
    parts = fit_logistic(features, labels, 1.0, 3)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(parts.predict(features), whole.predict(features))


def test_single_precision_is_close_to_double() -> None:
    features, labels = clouds(300, 4, 10, seed=4)
    double, single = (fit_logistic(x, labels, 0.1, 4, tol=1e-8) for x in (features, features.float()))
    assert isinstance(single, Linear)
    assert single.weight.dtype == torch.float32
    torch.testing.assert_close(single.weight.double(), double.weight, rtol=1e-2, atol=1e-3)


def test_a_known_answer_is_found(tmp_path: Path) -> None:
    """A quarter of the test images show another class's colour, and the network sees nothing but colours."""
    data, weights = write_data(tmp_path / "data", 30, 20, wrong=5), write_weights(tmp_path / "small.safetensors")
    result = run_suite("logreg", Planted(weights, "cls-1"), surroundings(tmp_path, data))
    assert result.scores["top1"].value == 75
    grid = {trial["C"]: trial["top1"] for trial in result.details["grid"]}
    assert len(grid) == 9
    assert grid[result.details["C"]] == max(grid.values()) == 100  # training images are all as they should be
    assert result.details["C"] == min(C for C, top1 in grid.items() if top1 == 100)


def test_where_C_is_chosen_is_said(tmp_path: Path) -> None:
    data, weights = write_data(tmp_path / "data", 8, 4), write_weights(tmp_path / "small.safetensors")
    backbone, context = Planted(weights, "cls-1"), surroundings(tmp_path, data)
    assert "chosen on 3 held-out training images" in run_suite("logreg", backbone, context).notes[0]
    assert "chosen on the test images" in run_suite("logreg", backbone, context, "select=val").notes[0]


def test_the_published_grid() -> None:
    grid = load(LogregConfig, None).grid()
    np.testing.assert_allclose(grid, 10 ** np.linspace(-6, 5, 45))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["c_steps=0"], "c_steps"),
        (["c_low=6"], "c_high"),
        (["heldout=0"], "heldout"),
        (["dtype=fp16"], "dtype"),
        (["c_low=-400"], "c_low: an exponent of 10"),
        (["c_high=400"], "c_high"),
        (["tol=-1"], "tol"),
    ],
)
def test_options_that_make_no_sense_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(LogregConfig, None, words)
