"""What every suite on labelled images does around its classifier."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.parallel.precision import Precision, resolve_precision
from eval.backbone import Backbone
from eval.features import Features, extract
from eval.images import Part, View, open_parts
from eval.results import Result, Score
from eval.suite import Context

MOST_ZOOM = 16  # which shows the central 256th of an image
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
        if self.zoom > MOST_ZOOM:
            raise ConfigError(f"must be at most {MOST_ZOOM}", "zoom")
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError("must be a share, between 0 and 1", "max_bad_share")


class Probe:
    """The images, the view and the features of one suite.

    Construction and all methods are for all ranks together.
    """

    def __init__(self, backbone: Backbone, cfg: ProbeConfig, context: Context) -> None:
        self.backbone, self.cfg, self.context = backbone, cfg, context
        if (channels := backbone.model.in_channels) != 3:
            raise ConfigError(f"the network takes images of {channels} channels, and these are RGB", "--weights")
        self.train, self.test = open_parts(context.data, cfg.max_train, cfg.max_test)
        self.num_classes = int(self.train.images.labels.max()) + 1
        self.size = choose_size(backbone, cfg.image_size)
        self.view = View(self.size, round(self.size * cfg.zoom))
        self.precision = context.ranks.broadcast_object(resolve_precision(cfg.precision, context.device))
        # By the main process alone, for it asks for the size of every file.
        self.hash = context.ranks.from_main(lambda: f"{self.train.digest()[:16]}-{self.test.digest()[:16]}")
        self.bad: dict[str, str] = {}
        self._lost: dict[int, set[int]] = {id(self.train.images): set(), id(self.test.images): set()}

    def features(self, part: Part, names: Sequence[str]) -> Features:
        """Features of a part, through the view of the suite."""
        cfg = self.cfg
        found = extract(
            self.backbone, part, self.view, names, self.context,
            batch=cfg.batch, precision=self.precision, max_bad_share=cfg.max_bad_share,
            what=f"features of {'training' if part.images is self.train.images else 'test'} images",
        )  # fmt: skip
        self.leave_out(part, np.flatnonzero(~found.good).tolist())
        return found

    def leave_out(self, part: Part, places: Sequence[int]) -> None:
        """Says which images of a part cannot be read, once."""
        rows = [int(part.rows[place]) for place in places]
        self._lost[id(part.images)].update(rows)
        bad = {part.images.name(row): part.images.trouble(row) or "unreadable a moment ago" for row in rows}
        if new := {name: reason for name, reason in bad.items() if name not in self.bad}:
            some = ", ".join(f"{name} ({reason})" for name, reason in list(new.items())[:3])
            self.context.say(f"careful: {len(new)} images cannot be read and are left out: {some}")
        self.bad.update(bad)

    @cached_property
    def changed(self) -> str:
        """Differs where a training image was written anew under its name."""
        return self.context.ranks.from_main(self.train.images.changed)

    def identity(self, suite: str) -> str:
        """Differs where anything does that a training depends on."""
        about = [suite, self.backbone.digest, self.hash, self.changed, str(self.view), self.precision, asdict(self.cfg)]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]

    def result(self, suite: str, scores: dict[str, Score], notes: Sequence[str] = (), **details: Any) -> Result:
        """With all that the suites say alike."""
        chosen = {"image_size": self.size, "view": str(self.view), "precision": self.precision}
        protocol = {**asdict(self.cfg), **chosen}
        said = [*notes]
        if self.size != PROTOCOL_SIZE:
            said.append(f"images of {self.size} pixels; published figures are for {PROTOCOL_SIZE}")
        for part in (self.train, self.test):
            if len(part) < len(part.images):
                said.append(f"{len(part)} of the {len(part.images)} images of {part.images.path}")
        if self.bad:
            said.append(f"{len(self.bad)} images could not be read and were left out")
        said += self._thin_classes()
        return Result(suite, scores, protocol, self._data(), said, details)

    def _thin_classes(self) -> list[str]:
        """What a reader must know of classes without images, which may be lost by drawing a few or be unreadable."""
        said, known = [], self.train.images.labels.unique()
        for part, kind in ((self.train, "training"), (self.test, "test")):
            rows = part.rows[~np.isin(part.rows, list(self._lost[id(part.images)]))]
            if lacking := len(known) - len(part.images.labels[torch.from_numpy(rows)].unique()):
                said.append(f"{lacking} of the {len(known)} classes have no {kind} image among those that count")
        if bool(self.train.images.classes) != bool(self.test.images.classes):
            said.append("one part is folders, the other shards: their numbers are taken for the folders in name order")
        return said

    def _data(self) -> dict[str, Any]:
        return {
            "name": Path(str(self.context.data)).name,
            "path": str(self.context.data),
            "hash": self.hash,
            "train": len(self.train),
            "test": len(self.test),
            "classes": self.num_classes,
            "class_names": self.train.images.classes or _names_beside(self.train.images.path, self.num_classes),
            "test_of_class": torch.bincount(self.test.labels, minlength=self.num_classes).tolist(),
            "bad": self.bad,
        }


def _names_beside(shards: str, count: int) -> list[str]:
    """The lines of classes.txt in the folder of shards, where there is one for each class."""
    path = Path(shards).parent / "classes.txt"
    names = path.read_text(errors="replace").split("\n") if path.is_file() else []
    names = [name.strip() for name in names if name.strip()]
    return names if len(names) == count else []


def choose_size(backbone: Backbone, asked: int) -> int:
    """The image size, a multiple of the patch size. Raises ConfigError where the asked one is none."""
    patch = backbone.patch_size
    if asked:
        if asked % patch:
            raise ConfigError(f"{asked} pixels are not tiled by patches of {patch}", "image_size")
        return asked
    return max(patch, min(PROTOCOL_SIZE, backbone.image_size) // patch * patch)


def all_alike(found: Sequence[float]) -> list[str]:
    """What to say where nothing was chosen in truth, for all that was tried is as good."""
    alike = len(found) > 1 and min(found) == max(found)
    return [f"all {len(found)} are as good on these ({found[0]:g} %): the choice means nothing"] if alike else []


def truth_of(part: Part, features: Features) -> Tensor:
    """Labels (n,) of the images that could be read."""
    return part.labels[torch.from_numpy(features.good)]
