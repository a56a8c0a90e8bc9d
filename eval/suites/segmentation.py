"""`ade20k-linear` and `ade20k-ms`: a linear layer on frozen patch tokens says the class of every pixel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dinoreg.config import ConfigError
from eval.backbone import Backbone
from eval.dense.heads import MaskHead
from eval.dense.losses import mask_loss
from eval.dense.masks import Labels, open_masks
from eval.dense.metrics import IGNORED, areas, class_table, mask_scores
from eval.dense.pictures import paint_image, paint_labels, save
from eval.dense.probe import DenseConfig, DenseProbe, Seen, as_rows, last_blocks
from eval.dense.samples import Batch, Stored
from eval.dense.slide import classify, resize_scores, slide
from eval.dense.transforms import MaskAugmentation, resize_image, size_for
from eval.results import Result
from eval.suite import Context

STORED = 4  # blocks whose maps are kept, so that both suites find them


@dataclass
class AdeLinearConfig(DenseConfig):
    """DINOv2's: batch normalisation and a linear layer on the last block's patches, 40,000 steps, windows of 512."""

    layers: int = 1  # last blocks, after the final norm, side by side
    short_side: int = 512  # pixels
    ratio: tuple[float, float] = (0.5, 2.0)  # by which the short side of training images is multiplied, at random
    crop: int = 512  # pixels, of training crops and of test windows; windows of 0 see all of an image
    stride: int = 341  # pixels from one test window to the next
    whole: bool = False  # test images pass as one window
    cat_max_ratio: float = 0.75  # of a training crop that one class may fill, if ten tries are enough
    scales: list[float] = field(default_factory=lambda: [1.0])  # sizes at which test images are seen
    flip: bool = False  # and mirrored, the probabilities of all averaged
    classes: int = 0  # 0 = 150 for ADE20k, else found in the masks or a classes.txt
    ignore: list[int] = field(default_factory=lambda: [255])  # numbers in masks that do not count
    reduce_zero_label: Literal["auto", "yes", "no"] = "auto"  # 0 is no class; auto: in ADE20k's layout

    @staticmethod
    def quick() -> list[str]:
        """Whole images of 16 patches without augmentation, each of which passes through the network once."""
        return [
            "augment=false", "patches=16", "every=4", "whole=true", "steps=400", "warmup=20", "rate=1e-2",
            "max_train=1000", "max_test=200", "save_every=200",
        ]  # fmt: skip

    def check(self) -> None:
        """Raises ConfigError."""
        super().check()
        for key in ("layers", "short_side", "crop", "stride"):
            if getattr(self, key) < 1:
                raise ConfigError("must be at least 1", key)
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ConfigError("must be 0 < low <= high", "ratio")
        if not self.scales or min(self.scales) <= 0:
            raise ConfigError("positive numbers, at least one", "scales")
        if not self.augment and not (self.whole and self.scales == [1.0] and not self.flip):
            raise ConfigError("maps of whole images go with whole=true, scales=[1.0] and flip=false", "augment")
        if self.classes < 0:
            raise ConfigError("must not be negative", "classes")


@dataclass
class AdeMsConfig(AdeLinearConfig):
    """DINOv2's +ms: four blocks, crops and windows of 640, test images at five sizes and mirrored."""

    layers: int = 4
    short_side: int = 640
    ratio: tuple[float, float] = (1.0, 3.0)
    crop: int = 640
    stride: int = 320
    scales: list[float] = field(default_factory=lambda: [1.0, 1.32, 1.73, 2.28, 3.0])
    flip: bool = True

    @staticmethod
    def quick() -> list[str]:
        """As the linear one; several sizes would take most of the time."""
        return [*AdeLinearConfig.quick(), "scales=[1.0]", "flip=false"]


def run(backbone: Backbone, cfg: AdeLinearConfig, context: Context) -> Result:
    """Trains the head and says how well it labels the test images, at their own sizes."""
    suite = "ade20k-ms" if isinstance(cfg, AdeMsConfig) else "ade20k-linear"
    train, test, labels = open_masks(context.data, context, cfg.classes, cfg.ignore, cfg.reduce_zero_label)
    context.say(f"{suite}: {labels.describe()}, ignored are {list(labels.ignore)}")
    blocks = last_blocks(cfg.layers if cfg.augment else max(STORED, cfg.layers), backbone.depth)
    layers = min(cfg.layers, backbone.depth)
    probe = DenseProbe(suite, backbone, cfg, context, (train, test), blocks, norm=True, short=cfg.short_side)
    head = MaskHead(backbone.embed_dim, layers, labels.classes, context.ranks, cfg.seed)
    change = MaskAugmentation(probe.short, cfg.ratio, cfg.crop, cfg.cat_max_ratio)
    probe.learn(nn.ModuleDict({"head": head}), Loss(cfg.every), change, "linear")
    stored = None
    if not cfg.augment:
        stored = probe.stored(probe.test, "maps of test images")
        stored.make(cfg.max_bad_share)
    seen = probe.look(Judge(probe, head, labels.classes, stored))
    return _result(probe, cfg, labels, seen, layers)


@dataclass(frozen=True)
class Loss:
    """Cross entropy at every so-manyth pixel."""

    every: int

    def __call__(self, head: nn.Module, batch: Batch, step: int) -> Tensor:
        logits = head([maps for maps, _ in batch])
        sized = [maps.frame.cut(some, self.every) for (maps, _), some in zip(batch, logits, strict=True)]
        return mask_loss(sized, [target[:, :: self.every, :: self.every] for _, target in batch])


class Judge:
    """Labels a test image and compares."""

    def __init__(self, probe: DenseProbe, head: MaskHead, classes: int, stored: Stored | None) -> None:
        self.probe, self.head, self.classes, self.stored = probe, head, classes, stored
        cfg = probe.cfg
        assert isinstance(cfg, AdeLinearConfig)
        self.cfg = cfg

    @torch.no_grad()
    def __call__(self, place: int, pixels: Tensor, truth: Tensor, number: int | None) -> Seen:
        found = self.label(place, pixels)
        truth = truth.to(found.device)
        picture = None
        if number is not None:
            parts = {
                "image": paint_image(pixels),
                "truth": paint_labels(truth),
                "prediction": paint_labels(found.masked_fill(truth == IGNORED, IGNORED)),
            }
            picture = save(self.probe.context.output, number, self.probe.test.name(place), parts)
        return Seen(place, areas(found, truth, self.classes), picture)

    def label(self, place: int, pixels: Tensor) -> Tensor:
        """int64 (H, W)."""
        size = (pixels.shape[1], pixels.shape[2])
        if self.stored is not None:
            maps = self.stored.maps(place)
            return classify(maps.frame.cut(self.head([maps])[0])[0], size)
        views = [(scale, flip) for scale in self.cfg.scales for flip in ([False, True] if self.cfg.flip else [False])]
        if len(views) == 1:
            return classify(self._scores(pixels, *views[0]), size)
        total = torch.zeros((), device=self.probe.context.device)
        for scale, flip in views:
            total = total + resize_scores(self._scores(pixels, scale, flip), size).softmax(0)
        return total.argmax(0)

    def _scores(self, pixels: Tensor, scale: float, flip: bool) -> Tensor:
        """Logits (K, h, w) of a view, as the unflipped image lies."""
        view = resize_image(pixels, size_for(pixels.shape[1], pixels.shape[2], int(self.probe.short * scale)))
        view = view.flip(-1) if flip else view
        scores = slide(view, 0 if self.cfg.whole else self.cfg.crop, self.cfg.stride, self._predict)
        return scores.flip(-1) if flip else scores

    def _predict(self, windows: Tensor) -> Tensor:
        maps = self.probe.mapper(windows)
        return maps.frame.cut(self.head([maps])[0])


def _result(probe: DenseProbe, cfg: AdeLinearConfig, labels: Labels, seen: list[Seen], layers: int) -> Result:
    per_image = as_rows(seen)
    table = class_table(per_image, labels.names)
    absent = [row["class"] for row in table if not row["pixels"]]
    notes = [f"{labels.describe()}; the labels {list(labels.ignore)} are ignored"]
    if absent:
        some = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
        notes.append(
            f"{len(absent)} classes have no pixel in the test images ({some}): not in the means, unless predicted"
        )
    if layers < cfg.layers:
        notes.append(f"{layers} blocks instead of {cfg.layers}: the network has no more")
    protocol: dict[str, Any] = {
        "labels": labels.describe(),
        "loss": "cross entropy, summed over pixels that count, divided by the number of all (avg_non_ignore=False)",
        "tested": "whole images" if cfg.whole else f"windows of {cfg.crop}, every {cfg.stride} pixels, logits averaged",
        "miou": "from areas summed over all test images, at the masks' own sizes",
    }
    data = {"classes": labels.classes, "class_names": list(labels.names), "ignore": list(labels.ignore)}
    return probe.result(mask_scores(per_image), seen, protocol, data, notes, by_class=table)
