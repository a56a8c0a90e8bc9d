"""`logreg`: logistic regression on class tokens, its regularisation chosen on images of the training set."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dinoreg.config import ConfigError
from eval.backbone import Backbone
from eval.forward import cls_of
from eval.images import hold_out
from eval.logistic import Linear, fit_logistic
from eval.metrics import accuracy_by_class, accuracy_score
from eval.probe import Probe, ProbeConfig, all_alike, truth_of
from eval.results import Result
from eval.suite import Context

MOST_EXPONENT = 30  # beyond which single precision knows no such C


@dataclass
class LogregConfig(ProbeConfig):
    """DINOv2's: C out of 10^linspace(-6, 5, 45), L-BFGS of at most 1000 iterations in fp64, images resized to 224."""

    zoom: float = 1.0
    c_low: float = -6.0  # exponents of the smallest and the largest C
    c_high: float = 5.0
    c_steps: int = 45
    max_iter: int = 1000
    tol: float = 1e-12
    dtype: Literal["fp64", "fp32"] = "fp64"  # of the regression
    select: Literal["heldout", "val"] = "heldout"  # where C is chosen: on a part of train, or on the test images
    heldout: float = 0.1  # share of the training images, drawn at random
    seed: int = 0  # of that draw

    @staticmethod
    def quick() -> list[str]:
        """Fewer images, values of C and iterations; the view of the other suites, so that features are shared."""
        return [
            "max_train=10000", "max_test=2000", "zoom=1.1428571428571428", "c_low=-4", "c_high=4", "c_steps=9",
            "max_iter=200", "tol=1e-6", "dtype=fp32",
        ]  # fmt: skip

    def check(self) -> None:
        """Raises ConfigError."""
        super().check()
        for key in ("c_steps", "max_iter"):
            if getattr(self, key) < 1:
                raise ConfigError("must be at least 1", key)
        for key in ("c_low", "c_high"):
            if abs(getattr(self, key)) > MOST_EXPONENT:
                raise ConfigError(f"an exponent of 10, between -{MOST_EXPONENT} and {MOST_EXPONENT}", key)
        if self.tol < 0:
            raise ConfigError("cannot be negative", "tol")
        if self.c_low > self.c_high:
            raise ConfigError(f"must be at least c_low={self.c_low}", "c_high")
        if not 0 < self.heldout < 1:
            raise ConfigError("must be a share, between 0 and 1", "heldout")

    def grid(self) -> list[float]:
        """The values of C, increasing."""
        return [float(c) for c in np.logspace(self.c_low, self.c_high, self.c_steps)]


def run(backbone: Backbone, cfg: LogregConfig, context: Context) -> Result:
    """The values of C are dealt out to the ranks; the last fit, on all training images, is the main one's."""
    probe = Probe(backbone, cfg, context)
    name = [cls_of(1)]
    train, test = probe.features(probe.train, name), probe.features(probe.test, name)
    dtype, device = torch.float64 if cfg.dtype == "fp64" else torch.float32, context.device
    known, labels = train.tensor(name).to(device, dtype), truth_of(probe.train, train).to(device)
    asked, truth = test.tensor(name).to(device, dtype), truth_of(probe.test, test).to(device)
    if cfg.select == "val":
        tried = _try(cfg, known, labels, asked, truth, probe.num_classes, context)
    else:
        held, kept = (torch.from_numpy(part) for part in hold_out(len(labels), cfg.heldout, cfg.seed))
        tried = _try(cfg, known[kept], labels[kept], known[held], labels[held], probe.num_classes, context)
    best = max(tried, key=lambda C: (tried[C].top1, -C))  # the simplest of equals
    context.say(f"logreg: C = {best:.3g} is the best of {cfg.c_steps}; the last fit, on all training images")
    predicted = context.ranks.from_main(
        lambda: _fit(cfg, known, labels, best, probe.num_classes).predict(asked).cpu()
    )  # fmt: skip
    where = "the test images" if cfg.select == "val" else f"{len(held)} held-out training image{'s' * (len(held) > 1)}"
    alike = all_alike([trial.top1 for trial in tried.values()])
    truth = truth.cpu()
    return probe.result(
        "logreg",
        {"top1": accuracy_score(predicted, truth)},
        [f"C = {best:.3g} of {cfg.c_steps} values, chosen on {where}", *_at_an_end(cfg, best), *alike],
        C=best,
        grid=[asdict(tried[C]) for C in sorted(tried)],
        by_class=accuracy_by_class(predicted, truth, probe.num_classes),
    )


@dataclass(frozen=True)
class Trial:
    """What one C gave on the images on which it is chosen. iterations: of at most max_iter."""

    C: float
    top1: float
    iterations: int


def _try(
    cfg: LogregConfig, known: Tensor, labels: Tensor, asked: Tensor, truth: Tensor, classes: int, context: Context
) -> dict[float, Trial]:
    """Every C, each rank its share from the smallest on: the solution for one is a good start for the next."""
    mine: list[Trial] = []
    fit: Linear | None = None
    ranks, grid = context.ranks, cfg.grid()
    with context.progress("logreg: values of C", len(grid)) as advance:
        for C in grid[ranks.rank :: ranks.world]:
            fit = _fit(cfg, known, labels, C, classes, fit)
            top1 = float((fit.predict(asked) == truth).double().mean())
            mine.append(Trial(C, round(100 * top1, 4), fit.iterations))
            advance(ranks.world)
    return {trial.C: trial for share in ranks.gather_objects(mine) for trial in share}


def _fit(
    cfg: LogregConfig, known: Tensor, labels: Tensor, C: float, classes: int, start: Linear | None = None
) -> Linear:
    return fit_logistic(known, labels, C, classes, max_iter=cfg.max_iter, tol=cfg.tol, start=start)


def _at_an_end(cfg: LogregConfig, best: float) -> list[str]:
    """The best C may lie outside of the grid where it is the first or the last."""
    grid = cfg.grid()
    return (
        [f"C = {best:.3g} is at the end of the values tried"] if len(grid) > 1 and best in (grid[0], grid[-1]) else []
    )
