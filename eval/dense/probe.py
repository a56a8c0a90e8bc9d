"""What every suite on whole images of labels or depths does around its head."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dinoreg.config import ConfigError
from dinoreg.parallel.precision import Precision, resolve_precision
from eval.backbone import Backbone
from eval.compute import load
from eval.dense.frame import Mapper
from eval.dense.pairs import Pairs, reason_of, take
from eval.dense.samples import (
    Augmentation,
    Augmented,
    FromImages,
    FromStored,
    Source,
    Stored,
    Whole,
    good_ones,
    too_many,
)
from eval.dense.training import Loss, Schedule, Training
from eval.results import Result, Score
from eval.suite import Context

PADDING = (
    "centred zeros up to a multiple of the patch size, cut off from predictions again; DINOv2's code stretches the "
    "padded prediction over the image instead"
)


@dataclass
class DenseConfig:
    """Options of all suites on whole images."""

    steps: int = 40000
    batch_size: int = 16  # images a step, over all ranks
    rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup: int = 1500  # steps
    warmup_ratio: float = 1e-6  # where the warm-up begins, as a share of the rate
    augment: bool = True  # false trains on maps of whole images, each of which passes through the network once
    every: int = 1  # of training targets, every so-manyth pixel counts, down and across
    patches: int = 0  # where > 0, the short side is resized to so many patches, whatever the suite's own size
    batch: int = 16  # images that pass through the network together; halves itself for want of memory
    precision: Precision = "auto"  # of the network; auto = bf16 on GPUs and on processors with bf16, else fp32
    max_train: int = 0  # images, drawn at random; 0 = all
    max_test: int = 0  # images, drawn at random; 0 = all
    max_bad_share: float = 0.01  # of the images may be unreadable; they are counted, named and left out
    seed: int = 0
    save_every: int = 1000  # steps after which a killed run can go on
    pictures: int = 6  # test images that are shown in the report with truth and prediction

    def check(self) -> None:
        """Raises ConfigError."""
        for key in ("steps", "batch_size", "every", "batch", "save_every"):
            if getattr(self, key) < 1:
                raise ConfigError("must be at least 1", key)
        for key in ("warmup", "patches", "max_train", "max_test", "pictures", "weight_decay", "warmup_ratio"):
            if getattr(self, key) < 0:
                raise ConfigError("must not be negative", key)
        if self.rate <= 0:
            raise ConfigError("must be positive", "rate")
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError("must be a share, between 0 and 1", "max_bad_share")


@dataclass
class Seen:
    """What one test image gave. values: for the scores; picture: its entry in the report, if it is shown."""

    place: int
    values: Any
    picture: dict[str, Any] | None = None


class DenseProbe:
    """The images, the network and its maps for one suite. Construction and methods are for all ranks together."""

    def __init__(
        self,
        suite: str,
        backbone: Backbone,
        cfg: DenseConfig,
        context: Context,
        parts: tuple[Pairs, Pairs],
        blocks: Sequence[int],
        *,
        norm: bool,
        short: int,
    ) -> None:
        if cfg.batch_size % context.ranks.world:
            raise ConfigError(f"not to be shared equally by {context.ranks.world} processes", "batch_size")
        self.suite, self.backbone, self.cfg, self.context = suite, backbone, cfg, context
        self.train, self.test = take(parts[0], cfg.max_train), take(parts[1], cfg.max_test)
        self.short = cfg.patches * backbone.patch_size or short
        self.precision = context.ranks.broadcast_object(resolve_precision(cfg.precision, context.device))
        self.mapper = Mapper(backbone, list(blocks), context, norm=norm, most=cfg.batch, precision=self.precision)
        self.bad: dict[str, str] = {}
        self._training: Training | None = None

    def learn(
        self,
        heads: nn.ModuleDict,
        loss: Loss,
        augmentation: Augmentation,
        shape: Literal["linear", "cosine"],
        clip: float = 0.0,
    ) -> None:
        """Trains the heads, from where a killed run of the same kind last saved."""
        cfg = self.cfg
        schedule = Schedule(
            cfg.steps, cfg.rate, cfg.weight_decay, cfg.warmup, cfg.warmup_ratio, shape, clip, cfg.save_every
        )
        self._training = Training(heads.to(self.context.device), schedule, self.context, self._identity())
        source: Source
        if cfg.augment:
            images = Augmented(self.train, augmentation, cfg.seed)
            source = FromImages(images, self.mapper, cfg.steps, cfg.batch_size, self.context, cfg.max_bad_share)
            self._training.run(source, loss)
            self._leave_out(self.train, sorted(set().union(*self.context.ranks.gather_objects(source.bad))))
        else:
            stored = self.stored(self.train, "maps of training images")
            good = stored.make(cfg.max_bad_share)
            self._leave_out(self.train, sorted(set(range(len(self.train))) - set(good)))
            self._training.run(FromStored(stored, good, cfg.steps, cfg.batch_size, cfg.seed), loss)

    def stored(self, pairs: Pairs, what: str) -> Stored:
        """The maps of a part's whole images."""
        return Stored(pairs, self.short, self.mapper, self.context, what)

    def look(self, see: Callable[[int, Tensor, Tensor, int | None], Seen]) -> list[Seen]:
        """What `see` says of every readable test image, in their order, each rank asking about its share.

        see(place, pixels uint8 (3, H, W), target (H, W), number of its picture or None).
        """
        ranks, count = self.context.ranks, len(self.test)
        shown = {int(p): n for n, p in enumerate(np.unique(np.linspace(0, count - 1, self.cfg.pictures).astype(int)))}
        found: list[Seen] = []
        bad: list[int] = []
        with self.context.progress("testing", count) as advance:
            for place, pixels, target, good in self._mine(range(ranks.rank, count, ranks.world)):
                if good:
                    found.append(see(place, pixels, target, shown.get(place)))
                else:
                    bad.append(place)
                advance(ranks.world)
        lost = sorted(place for share in ranks.gather_objects(bad) for place in share)
        if len(lost) > self.cfg.max_bad_share * count or len(lost) == count:
            raise too_many(self.test, lost, len(lost), count, self.cfg.max_bad_share)
        self._leave_out(self.test, lost)
        everything = [seen for share in ranks.gather_objects(found) for seen in share]
        return sorted(everything, key=lambda seen: seen.place)

    def _mine(self, places: range) -> Iterator[tuple[int, Tensor, Tensor, bool]]:
        batches = [[place] for place in places]
        loaded = load(Whole(self.test, 0), batches, self.context, 2**24)
        for place, (pixels, target, troubles) in zip(places, loaded, strict=True):
            yield place, pixels[0], target[0], good_ones(troubles)[0]

    def _leave_out(self, pairs: Pairs, places: Sequence[int]) -> None:
        """Says which images cannot be read, once."""
        new = {pairs.name(place): reason_of(pairs, place) for place in places if pairs.name(place) not in self.bad}
        if new:
            some = ", ".join(f"{name} ({reason})" for name, reason in list(new.items())[:3])
            self.context.say(f"careful: {len(new)} images or targets cannot be read and are left out: {some}")
        self.bad.update(new)

    def _identity(self) -> str:
        """Differs where anything does that a training depends on."""
        about = [
            self.suite, self.backbone.digest, self.train.digest(), self.short, self.mapper.blocks, self.precision,
            asdict(self.cfg),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]

    def result(
        self,
        scores: dict[str, Score],
        seen: Sequence[Seen],
        protocol: dict[str, Any],
        data: dict[str, Any],
        notes: Sequence[str],
        **details: Any,
    ) -> Result:
        """With all that the suites say alike."""
        pictures = [one.picture for one in seen if one.picture is not None]
        files = {Path(path).stem: path for entry in pictures for path in entry.values() if str(path).endswith(".png")}
        cfg, said = self.cfg, list(notes)
        if not cfg.augment:
            said.append(f"trained on whole images without augmentation, {cfg.steps} steps of {cfg.batch_size}")
        if self.bad:
            said.append(f"{len(self.bad)} images could not be read and were left out")
        chosen = {
            **asdict(cfg), "precision": self.precision, "blocks": self.mapper.blocks, "padding": PADDING,
            "resized": f"short side to {self.short} pixels, bilinear" if self.short else "not at all", **protocol,
        }  # fmt: skip
        if self._training is not None:
            self._training.forget()
        return Result(self.suite, scores, chosen, self._data() | data, said, {**details, "pictures": pictures}, files)

    def _data(self) -> dict[str, Any]:
        return {
            "name": Path(str(self.context.data)).name,
            "path": str(self.context.data),
            "hash": f"{self.train.digest()[:16]}-{self.test.digest()[:16]}",
            "train": len(self.train),
            "test": len(self.test),
            "bad": self.bad,
        }


def last_blocks(count: int, depth: int) -> list[int]:
    """The last blocks, increasing; all of a network that has fewer."""
    return list(range(max(0, depth - count), depth))


def as_rows(seen: Sequence[Seen]) -> Tensor:
    """The values of all images, (n, ...)."""
    return torch.stack([one.values for one in seen])
