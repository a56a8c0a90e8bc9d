"""`imagenet-linear`: linear classifiers on frozen features, all learning rates and sets of features in one training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoreg.config import ConfigError
from eval.backbone import Backbone
from eval.features import Features
from eval.forward import Forward
from eval.heads import FeatureSet, Heads
from eval.images import Part, hold_out
from eval.metrics import accuracy_by_class, accuracy_score
from eval.probe import Probe, ProbeConfig, all_alike
from eval.results import Result
from eval.suite import Context
from eval.training import FromFeatures, FromImages, Schedule, Source, forget, train

NAME = "imagenet-linear"
TOP = 5
ROWS = 8192  # images whose features are on the device at once when classifiers are tried


@dataclass
class LinearConfig(ProbeConfig):
    """DINOv2's: 12,500 steps of SGD without weight decay, 1,024 images each, cosine to 0, 52 classifiers."""

    steps: int = 12500
    batch_size: int = 1024  # images a step, over all ranks
    rates: list[float] = field(
        default_factory=lambda: [a * b for b in (1e-5, 1e-4, 1e-3, 1e-2) for a in (1, 2, 5)] + [0.1]
    )  # learning rates for 256 images; scaled linearly with batch_size
    layers: list[int] = field(default_factory=lambda: [1, 4])  # last blocks whose class tokens are seen
    avgpool: list[bool] = field(default_factory=lambda: [False, True])  # and the mean of the last patch tokens
    augment: bool = True  # random resized crops and flips; false trains on the features of the central crops
    select: Literal["heldout", "val"] = "heldout"  # where the best is chosen: on a part of train, or on the test images
    heldout: float = 0.1  # share of the training images, drawn at random, that are chosen by instead of trained on
    seed: int = 0
    save_every: int = 500  # steps after which a killed run can go on

    @staticmethod
    def quick() -> list[str]:
        """No augmentation, so that every image passes through the network once; fewer of all."""
        return [
            "max_train=10000", "max_test=2000", "augment=false", "steps=600", "batch_size=256",
            "rates=[1e-3, 5e-3, 2e-2, 1e-1]",
        ]  # fmt: skip

    def check(self) -> None:
        """Raises ConfigError."""
        super().check()
        for key in ("steps", "batch_size", "save_every"):
            if getattr(self, key) < 1:
                raise ConfigError("must be at least 1", key)
        for key in ("rates", "layers", "avgpool"):
            if not getattr(self, key) or len(set(getattr(self, key))) < len(getattr(self, key)):
                raise ConfigError("at least one value, and none twice", key)
        if min(self.rates) <= 0 or min(self.layers) < 1:
            raise ConfigError("must be positive", "rates" if min(self.rates) <= 0 else "layers")
        if not 0 < self.heldout < 1:
            raise ConfigError("must be a share, between 0 and 1", "heldout")


def run(backbone: Backbone, cfg: LinearConfig, context: Context) -> Result:
    """Trains all classifiers, chooses one, and reports what it does on the test images."""
    if cfg.batch_size % context.ranks.world:
        raise ConfigError(f"not to be shared equally by {context.ranks.world} processes", "batch_size")
    probe = Probe(backbone, cfg, context)
    sets = feature_sets(cfg, backbone.depth)
    names = list(dict.fromkeys(name for which in sets for name in which.names))
    held, kept = hold_out(len(probe.train), cfg.heldout, cfg.seed)
    if cfg.select == "val":
        held, kept = held[:0], np.arange(len(probe.train))
    dims = {which: backbone.embed_dim * len(which.names) for which in sets}
    rates = [rate * cfg.batch_size / 256 for rate in cfg.rates]
    heads = Heads(dims, rates, probe.num_classes, context.device, cfg.seed)
    stored = None if cfg.augment else probe.features(probe.train, names)
    _train(heads, probe, cfg, names, kept, stored)
    test = guess(heads, probe.test, probe.features(probe.test, names))
    if not len(held):
        chooser = test
    elif stored is not None:
        chooser = guess(heads, probe.train, stored, held)
    else:
        part = probe.train.subset(held)
        chooser = guess(heads, part, probe.features(part, names))
    if not len(chooser.truth):
        raise ConfigError("none of the images held out can be read", "heldout")
    return _result(probe, cfg, test, _trials(cfg, heads, chooser, test), len(chooser.truth))


def feature_sets(cfg: LinearConfig, depth: int) -> list[FeatureSet]:
    """Every number of layers that the network has, with and without pooling. Raises ConfigError where none is left."""
    layers = [count for count in cfg.layers if count <= depth]
    if not layers:
        raise ConfigError(f"the network has only {depth} blocks", "layers")
    return [FeatureSet(count, pooled) for count in layers for pooled in cfg.avgpool]


def _train(
    heads: Heads,
    probe: Probe,
    cfg: LinearConfig,
    names: Sequence[str],
    kept: NDArray[np.int64],
    stored: Features | None,
) -> None:
    """On all training images that are not held out: on their stored features, or through the network in crops."""
    schedule = Schedule(cfg.steps, cfg.batch_size, cfg.seed, cfg.save_every)
    context = probe.context
    source: Source
    if stored is not None:
        source = FromFeatures(stored, probe.train.labels, kept, schedule, context)
        train(heads, source, schedule, context, probe.identity(NAME))
        return
    part = probe.train.subset(kept)
    forward = Forward(probe.backbone, names, context, cfg.batch, probe.precision)
    source = FromImages(part, probe.size, forward, schedule, context, cfg.max_bad_share)
    train(heads, source, schedule, context, probe.identity(NAME))
    probe.leave_out(part, sorted(set().union(*context.ranks.gather_objects(source.bad))))


@dataclass(frozen=True)
class Guesses:
    """classes: int64 (n, L, k) by feature set, best first; truth: int64 (n,)."""

    classes: dict[FeatureSet, Tensor]
    truth: Tensor

    def top1(self, which: FeatureSet, row: int) -> float:
        """Percent right of the classifier with the row-th learning rate."""
        return round(float(100 * (self.classes[which][:, row, 0] == self.truth).double().mean()), 4)


def guess(heads: Heads, part: Part, features: Features, rows: NDArray[np.int64] | None = None) -> Guesses:
    """What all classifiers say about a part's readable images, or those of its rows."""
    rows = np.arange(len(part)) if rows is None else rows
    rows = rows[features.good[rows]]
    count = min(TOP, heads.classes)
    found: dict[FeatureSet, list[Tensor]] = {which: [] for which in heads.weights}
    for some in np.split(rows, range(ROWS, len(rows), ROWS)):
        values = {name: features.tensor([name], some).to(heads.rates.device) for name in features.arrays}
        for which, parts in found.items():
            parts.append(heads.guesses(which, which.of(values), count).cpu())
    classes = {which: torch.cat(parts) for which, parts in found.items()}
    return Guesses(classes, part.labels[torch.from_numpy(rows)])


@dataclass(frozen=True)
class Trial:
    """One classifier. chosen_by, test: top-1 accuracy in percent on the images it is chosen by, and on the test's.

    finite: False where its learning rate was too much for it, and all its guesses are one and the same class.
    """

    rate: float
    layers: int
    avgpool: bool
    chosen_by: float
    test: float
    finite: bool = True


def _trials(cfg: LinearConfig, heads: Heads, chooser: Guesses, test: Guesses) -> list[Trial]:
    return [
        Trial(rate, which.layers, which.avgpool, chooser.top1(which, row), test.top1(which, row), finite)
        for which in test.classes
        for row, (rate, finite) in enumerate(zip(cfg.rates, heads.finite(which), strict=True))
    ]


def _result(probe: Probe, cfg: LinearConfig, test: Guesses, trials: list[Trial], choosing: int) -> Result:
    """choosing: the number of images by which the best was chosen."""
    if not (sound := [trial for trial in trials if trial.finite]):
        raise ConfigError("all classifiers diverged: lower learning rates are needed", "rates")
    best = max(sound, key=lambda trial: trial.chosen_by)
    which = FeatureSet(best.layers, best.avgpool)
    top = test.classes[which][:, cfg.rates.index(best.rate)]
    where = (
        "the test images, as published"
        if cfg.select == "val"
        else f"{choosing} held-out training image{'s' * (choosing > 1)}"
    )
    notes = [f"learning rate {best.rate:g} on {which}: the best of {len(trials)}, chosen on {where}"]
    if len(cfg.rates) > 1 and best.rate in (min(cfg.rates), max(cfg.rates)):
        notes.append(f"{best.rate:g} is at the end of the learning rates tried")
    if lost := len(trials) - len(sound):
        notes.append(f"{lost} of {len(trials)} classifiers diverged, whose learning rates are too high for them")
    notes += all_alike([trial.chosen_by for trial in sound])
    if not cfg.augment:
        notes.append("trained on central crops, without augmentation")
    if skipped := [count for count in cfg.layers if count > probe.backbone.depth]:
        notes.append(f"layers={skipped} left out: the network has {probe.backbone.depth} blocks")
    forget(probe.context, probe.identity(NAME))
    return probe.result(
        NAME,
        {"top1": accuracy_score(top[:, 0], test.truth), f"top{top.shape[1]}": accuracy_score(top, test.truth)},
        notes,
        chosen=asdict(best),
        grid=[asdict(trial) for trial in trials],
        by_class=accuracy_by_class(top[:, 0], test.truth, probe.num_classes),
    )
