"""`knn`: weighted nearest neighbours of class tokens (Wu et al. 2018), as DINO and DINOv2 report it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.models.knn import knn_classify
from eval.backbone import Backbone
from eval.forward import cls_of
from eval.metrics import accuracy_by_class, accuracy_score
from eval.probe import Probe, ProbeConfig, truth_of
from eval.results import Result
from eval.suite import Context


@dataclass
class KnnConfig(ProbeConfig):
    """The class token after the final norm, resize 256, crop 224; no choice is made on the test images."""

    k: list[int] = field(default_factory=lambda: [10, 20, 100, 200])  # neighbours; each is reported
    main_k: int = 20  # of these, the one that is called top1
    temperature: float = 0.07

    @staticmethod
    def quick() -> list[str]:
        return ["max_train=10000", "max_test=2000"]

    def check(self) -> None:
        """Raises ConfigError."""
        super().check()
        if not self.k or min(self.k) < 1:
            raise ConfigError("numbers of neighbours, at least 1 each", "k")
        if self.main_k not in self.k:
            raise ConfigError(f"must be one of k={self.k}", "main_k")
        if self.temperature <= 0:
            raise ConfigError("must be positive", "temperature")


def run(backbone: Backbone, cfg: KnnConfig, context: Context) -> Result:
    """Every rank asks about its share of the test images."""
    probe = Probe(backbone, cfg, context)
    name = [cls_of(1)]
    train, test = probe.features(probe.train, name), probe.features(probe.test, name)
    known, labels = train.tensor(name).to(context.device), truth_of(probe.train, train).to(context.device)
    asked, truth = test.tensor(name), truth_of(probe.test, test)
    predicted = {}
    for k in cfg.k:
        mine = asked[context.ranks.rank :: context.ranks.world].to(context.device)
        found = knn_classify(
            known, labels, mine, k=k, temperature=cfg.temperature, num_classes=probe.num_classes
        )  # fmt: skip
        predicted[k] = interleave(context.ranks.gather_objects(found.cpu()), len(truth))
    scores = {"top1": accuracy_score(predicted[cfg.main_k], truth)}
    scores |= {f"top1_k{k}": accuracy_score(predicted[k], truth) for k in cfg.k}
    by_class = accuracy_by_class(predicted[cfg.main_k], truth, probe.num_classes)
    few = [f"only {len(known)} training images: k={k} means all of them" for k in cfg.k if k > len(known)]
    return probe.result("knn", scores, few, by_class=by_class)


def interleave(shares: list[Tensor], count: int) -> Tensor:
    """One tensor (n, ...) of the shares that were dealt out as [rank::world]."""
    out = torch.empty(count, *shares[0].shape[1:], dtype=shares[0].dtype)
    for rank, share in enumerate(shares):
        out[rank :: len(shares)] = share
    return out
