"""What every suite on labelled images does around its classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinoreg.config import ConfigError
from eval.backbone import Backbone
from eval.compute import Precision, resolve_precision
from eval.features import Features, bad_images, extract
from eval.images import Part, View, open_parts
from eval.metrics import accuracy_by_class, accuracy_score
from eval.results import Result, Score
from eval.suite import Context

PROTOCOL_SIZE = 224  # pixels at which ImageNet figures are published


@dataclass
class ProbeConfig:
    """Options of all suites on labelled images."""

    image_size: int = 0  # pixels that the network sees; 0 = 224, or what it was trained at where that is less
    zoom: float = 256 / 224  # the short side is resized to this many times the image size before the central crop
    batch: int = 256  # images that are read, and pass through the network, together; halves itself for want of memory
    precision: Precision = "auto"  # of the network; auto = bf16 on GPUs and on processors with bf16, else fp32
    max_train: int = 0  # images, drawn evenly over the classes; 0 = all
    max_test: int = 0  # images, drawn evenly over the classes; 0 = all
    max_bad_share: float = 0.01  # of the images may be unreadable; they are counted, named and left out

    def check(self) -> None:
        """Raises ConfigError."""
        for key, least in (("image_size", 0), ("batch", 1), ("max_train", 0), ("max_test", 0), ("zoom", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"must be at least {least}", key)
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError("must be a share, between 0 and 1", "max_bad_share")


class Probe:
    """The images, the view and the features of one suite.

    Construction and all methods are for all ranks together.
    """

    def __init__(self, backbone: Backbone, cfg: ProbeConfig, context: Context) -> None:
        self.backbone, self.cfg, self.context = backbone, cfg, context
        self.train, self.test = open_parts(context.data, cfg.max_train, cfg.max_test)
        self.num_classes = int(self.train.images.labels.max()) + 1
        self.size = choose_size(backbone, cfg.image_size)
        self.view = View(self.size, round(self.size * cfg.zoom))
        self.bad: dict[str, str] = {}

    def features(self, part: Part, names: Sequence[str]) -> Features:
        """Features of a part, through the view of the suite."""
        cfg = self.cfg
        found = extract(
            self.backbone, part, self.view, names, self.context,
            batch=cfg.batch, precision=cfg.precision, max_bad_share=cfg.max_bad_share,
            what=f"features of {part.images.path}",
        )  # fmt: skip
        bad = bad_images(found, part, cfg.max_bad_share)
        if bad and not bad.keys() <= self.bad.keys():
            some = ", ".join(f"{name} ({reason})" for name, reason in list(bad.items())[:3])
            self.context.say(f"careful: {len(bad)} images cannot be read and are left out: {some}")
        self.bad.update(bad)
        return found

    def result(self, suite: str, scores: dict[str, Score], notes: Sequence[str] = (), **details: Any) -> Result:
        """With all that the suites say alike."""
        protocol = {
            **asdict(self.cfg), "image_size": self.size, "view": str(self.view),
            "precision": resolve_precision(self.cfg.precision, self.context.device),
        }  # fmt: skip
        said = [*notes]
        if self.size != PROTOCOL_SIZE:
            said.append(f"images of {self.size} pixels; published figures are for {PROTOCOL_SIZE}")
        for part in (self.train, self.test):
            if len(part) < len(part.images):
                said.append(f"{len(part)} of the {len(part.images)} images of {part.images.path}")
        if self.bad:
            said.append(f"{len(self.bad)} images could not be read and were left out")
        return Result(suite, scores, protocol, self._data(), said, details)

    def _data(self) -> dict[str, Any]:
        return {
            "name": Path(str(self.context.data)).name,
            "path": str(self.context.data),
            "hash": f"{self.train.digest()[:16]}-{self.test.digest()[:16]}",
            "train": len(self.train),
            "test": len(self.test),
            "classes": self.num_classes,
            "class_names": self.train.images.classes,
            "bad": self.bad,
        }


def choose_size(backbone: Backbone, asked: int) -> int:
    """The image size, a multiple of the patch size. Raises ConfigError where the asked one is none."""
    patch = backbone.patch_size
    if asked:
        if asked % patch:
            raise ConfigError(f"{asked} pixels are not tiled by patches of {patch}", "image_size")
        return asked
    return max(patch, min(PROTOCOL_SIZE, backbone.image_size) // patch * patch)


def truth_of(part: Part, features: Features) -> Tensor:
    """Labels (n,) of the images that could be read."""
    return part.labels[torch.from_numpy(features.good)]


def score_both(predicted: Tensor, truth: Tensor, num_classes: int) -> tuple[Score, list[float]]:
    """Top-1 accuracy, and that of each class."""
    return accuracy_score(predicted, truth), accuracy_by_class(predicted, truth, num_classes)
