"""The suites by name. A new one is a module beside this file and a line in SUITES."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.backbone import Backbone
    from eval.inside.finding import Album, Finding, Seen
    from eval.results import Result
    from eval.suite import Context


@dataclass(frozen=True)
class Suite:
    """One protocol. Its module holds the dataclass `config`, whose defaults are the protocol's exact values, and `run`.

    The dataclass has a static method `quick() -> list[str]`: the key=value words that make the protocol short.
    data: the kind of data it wants, which is what `dinoreg-eval all --data-KIND` says; empty where it wants none.
    findings: for an experiment, the module whose `findings(seen, album)` tells what was seen.
    """

    name: str
    title: str
    data: str
    module: str
    config: str
    run: str = "run"
    findings: str = ""

    def schema(self) -> Any:
        """The dataclass of its options."""
        return getattr(importlib.import_module(self.module), self.config)

    def runner(self) -> Callable[[Backbone, Any, Context], Result]:
        """run(backbone, config, context) -> Result, called on every rank; the result of the main one counts."""
        return getattr(importlib.import_module(self.module), self.run)

    def teller(self) -> Callable[[Sequence[Seen], Album], list[Finding]]:
        """findings(seen, album): `seen` are the results of this experiment, one a checkpoint."""
        return getattr(importlib.import_module(self.findings), "findings")  # noqa: B009


# In the order in which `all` runs them: who wants most of a data set comes first, and the others find its features.
_SCORES = [
    Suite(
        "imagenet-linear", "linear classifiers, all settings at once", "imagenet", "eval.suites.linear", "LinearConfig"
    ),
    Suite("knn", "k nearest neighbours of class tokens", "imagenet", "eval.suites.knn", "KnnConfig"),
    Suite("logreg", "logistic regression on class tokens", "imagenet", "eval.suites.logreg", "LogregConfig"),
    Suite("ade20k-linear", "one linear layer labels pixels", "ade20k", "eval.suites.segmentation", "AdeLinearConfig"),
    Suite("ade20k-ms", "four blocks, images at many sizes", "ade20k", "eval.suites.segmentation", "AdeMsConfig"),
    Suite("nyud-linear", "linear layers on one and four blocks tell depths", "nyud", "eval.suites.depth", "NyudConfig"),
]
_EXPERIMENTS: list[Suite] = [
    Suite(
        "artifacts",
        "tokens that stand out: which, where, since when, what is in them",
        "images",
        "eval.suites.artifacts",
        "ArtifactsConfig",
        findings="eval.inside.artifacts.shown",
    ),
    Suite(
        "attention",
        "where the class token and the registers look",
        "images",
        "eval.suites.attention",
        "AttentionConfig",
        findings="eval.inside.attention.shown",
    ),
    Suite(
        "features",
        "what tells patches apart, as maps",
        "images",
        "eval.suites.features",
        "FeaturesConfig",
        findings="eval.inside.features.shown",
    ),
    Suite("cost", "what registers cost", "", "eval.suites.cost", "CostConfig", findings="eval.inside.cost.shown"),
    Suite(
        "discovery",
        "LOST finds one object an image without labels, right or not",
        "boxes",
        "eval.suites.discovery",
        "DiscoveryConfig",
        findings="eval.inside.discovery.shown",
    ),
    Suite(
        "decoupling",
        "what the class token is made of",
        "images",
        "eval.suites.decoupling",
        "DecouplingConfig",
        findings="eval.inside.decoupling.shown",
    ),
    Suite(
        "knockout",
        "what CLS depends on, found by taking it away",
        "images",
        "eval.suites.knockout",
        "KnockoutConfig",
        findings="eval.inside.knockout.shown",
    ),
    Suite(
        "test-time-registers",
        "registers added to a network that was trained without",
        "images",
        "eval.suites.test_time_registers",
        "AddedRegistersConfig",
        findings="eval.inside.testtime.shown",
    ),
]
SUITES = {suite.name: suite for suite in [*_SCORES, *_EXPERIMENTS]}
SCORES = {suite.name: suite for suite in _SCORES}  # how good is it?
EXPERIMENTS = {suite.name: suite for suite in _EXPERIMENTS}  # what is inside?
