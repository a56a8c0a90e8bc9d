"""`nyud-linear`: linear layers on frozen tokens of one and of four blocks say how far away every pixel is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dinoreg.config import ConfigError
from eval.backbone import Backbone
from eval.dense.depths import DepthData, open_depths
from eval.dense.heads import DepthHead
from eval.dense.losses import gradient_loss, log_errors, scale_invariant_loss
from eval.dense.metrics import DEPTH_VALUES, depth_scores, depth_values
from eval.dense.pictures import paint_depths, paint_image, save
from eval.dense.probe import DenseConfig, DenseProbe, Seen, as_rows
from eval.dense.samples import Batch, Stored
from eval.dense.slide import resize_scores
from eval.dense.transforms import DepthAugmentation, resize_image, size_for
from eval.results import Result, Score
from eval.suite import Context

NAME = "nyud-linear"
WORST = 10  # images that are named
# Blocks that DINOv2 takes for four layers, by depth: those of ViT-L are not quite evenly spread.
FOUR = {12: [2, 5, 8, 11], 24: [4, 11, 17, 23], 40: [9, 19, 29, 39]}
FRAME = (480, 640)  # (height, width) of NYU's frames
EIGEN = (slice(45, 471), slice(41, 601))  # rows and columns in which Eigen et al. 2014 compare them


@dataclass
class NyudConfig(DenseConfig):
    """DINOv2's: 38,400 steps on crops of 416 x 544, SigLoss and half of the gradient loss, 256 uniform bins."""

    steps: int = 38400
    rate: float = 1e-4
    weight_decay: float = 0.01
    warmup: int = 12800
    warmup_ratio: float = 1e-3
    clip: float = 35.0  # the largest norm of a head's gradient
    layers: list[int] = field(default_factory=lambda: [1, 4])  # numbers of blocks, a head and scores each: 1 or 4
    short_side: int = 0  # pixels; 0 = images as they are
    crop: tuple[int, int] = (416, 544)  # (height, width) of training crops
    bins: int = 256
    min_depth: float = 1e-3  # metres
    max_depth: float = 10.0  # metres; what is farther does not count in the scores
    upsample: int = 4  # the maps are this many times as large before the depths are computed
    loss_group: int = 2  # images whose loss is computed together, as on one GPU of the published runs
    gradient_weight: float = 0.5
    loss_warmup: int = 100  # steps in which the loss knows the mean error alone
    flip: bool = True  # test images are seen mirrored too, and the depths averaged
    scale: float = 0.0  # stored values a metre, such as 1000; 0 = found
    eigen_crop: Literal["auto", "yes", "no"] = "auto"  # auto: for NYU depth v2 at 480 x 640

    @staticmethod
    def quick() -> list[str]:
        """Whole images of 16 patches without augmentation, each passing through the network once; fewer bins."""
        return [
            "augment=false", "patches=16", "every=4", "flip=false", "bins=64", "upsample=2", "steps=300",
            "batch_size=8", "warmup=30", "rate=1e-2", "loss_warmup=10", "max_train=1000", "max_test=200",
            "save_every=100",
        ]  # fmt: skip

    def check(self) -> None:
        """Raises ConfigError."""
        super().check()
        for key in ("bins", "upsample", "loss_group"):
            if getattr(self, key) < 1:
                raise ConfigError("must be at least 1", key)
        if not self.layers or not set(self.layers) <= {1, 4} or len(set(self.layers)) < len(self.layers):
            raise ConfigError("must be [1], [4] or both", "layers")
        if not 0 < self.min_depth < self.max_depth:
            raise ConfigError(f"must be above min_depth={self.min_depth}, which is above 0", "max_depth")
        for key in ("scale", "short_side", "gradient_weight", "loss_warmup", "clip"):
            if getattr(self, key) < 0:
                raise ConfigError("must not be negative", key)
        if min(self.crop) < 1:
            raise ConfigError("must be at least one pixel", "crop")
        if not self.augment and self.flip:
            raise ConfigError("maps of whole images go with flip=false", "augment")
        if self.augment and (self.short_side or self.patches):
            raise ConfigError("sizes are for augment=false: training crops are cut from images as they are", "patches")


def run(backbone: Backbone, cfg: NyudConfig, context: Context) -> Result:
    """Trains a head for each number of blocks, all on the same batches, and says how far off their depths are."""
    if cfg.batch_size // context.ranks.world % cfg.loss_group:
        raise ConfigError(f"each process's share of batch_size={cfg.batch_size} is no multiple of it", "loss_group")
    data = open_depths(context.data, cfg.scale)
    context.say(f"{NAME}: depths are {data.found}")
    blocks = four_blocks(backbone.depth) if 4 in cfg.layers else [backbone.depth - 1]
    probe = DenseProbe(
        NAME, backbone, cfg, context, (data.train, data.test), blocks, norm=False, short=cfg.short_side
    )  # fmt: skip
    heads = {f"lin{count}": _head(backbone, cfg, min(count, len(blocks))) for count in cfg.layers}
    change = DepthAugmentation(cfg.crop, edges=data.official)
    probe.learn(nn.ModuleDict(heads), Loss(cfg), change, "cosine", cfg.clip)
    stored = None
    if not cfg.augment:
        stored = probe.stored(probe.test, "maps of test images")
        stored.make(cfg.max_bad_share)
    eigen = cfg.eigen_crop == "yes" or (cfg.eigen_crop == "auto" and data.official)
    seen = probe.look(Judge(probe, heads, stored, eigen))
    return _result(probe, cfg, data, seen, eigen)


def four_blocks(depth: int) -> list[int]:
    """The published ones where the depth is one of theirs, else evenly spread; all of a network with fewer."""
    return FOUR.get(depth) or sorted({max(0, round(part * depth / 4) - 1) for part in (1, 2, 3, 4)})


def _head(backbone: Backbone, cfg: NyudConfig, layers: int) -> DepthHead:
    return DepthHead(backbone.embed_dim, layers, cfg.bins, cfg.min_depth, cfg.max_depth, cfg.upsample, cfg.seed)


@dataclass(frozen=True)
class Loss:
    """SigLoss and the gradient loss of each group of images, averaged over groups."""

    cfg: NyudConfig

    def __call__(self, head: nn.Module, batch: Batch, step: int) -> Tensor:
        found = head([maps for maps, _ in batch])
        predicted = [
            depth
            for (maps, _), some in zip(batch, found, strict=True)
            for depth in maps.frame.cut(some, self.cfg.every)[:, 0]
        ]
        truth = [depth[:: self.cfg.every, :: self.cfg.every] for _, target in batch for depth in target]
        starts = range(0, len(truth), self.cfg.loss_group)
        groups = [slice(start, start + self.cfg.loss_group) for start in starts]
        return torch.stack([self._group(predicted[group], truth[group], step) for group in groups]).mean()

    def _group(self, predicted: list[Tensor], truth: list[Tensor], step: int) -> Tensor:
        errors = log_errors(predicted, truth)
        loss = scale_invariant_loss(errors, truth, warming_up=step < self.cfg.loss_warmup)
        return loss + self.cfg.gradient_weight * gradient_loss(errors, truth) if self.cfg.gradient_weight else loss


class Judge:
    """Measures a test image and compares. Values are (heads, 6), NaN where no pixel counts."""

    def __init__(self, probe: DenseProbe, heads: dict[str, DepthHead], stored: Stored | None, eigen: bool) -> None:
        self.probe, self.heads, self.stored, self.eigen = probe, heads, stored, eigen
        assert isinstance(probe.cfg, NyudConfig)
        self.cfg = probe.cfg

    @torch.no_grad()
    def __call__(self, place: int, pixels: Tensor, truth: Tensor, number: int | None) -> Seen:
        found = self.measure(place, pixels)
        truth = truth.to(found[0].device)
        counted = self.counted(truth)
        nothing = torch.full((len(DEPTH_VALUES),), float("nan"), dtype=torch.float64)
        values = [depth_values(each[counted], truth[counted]) if counted.any() else nothing for each in found]
        picture = None if number is None else self._show(place, number, pixels, truth, found)
        return Seen(place, torch.stack(values), picture)

    def counted(self, truth: Tensor) -> Tensor:
        """bool (H, W)."""
        counted = (truth > self.cfg.min_depth) & (truth < self.cfg.max_depth)
        if self.eigen and tuple(truth.shape) == FRAME:
            inside = torch.zeros_like(counted)
            inside[EIGEN] = True
            counted &= inside
        return counted

    def measure(self, place: int, pixels: Tensor) -> list[Tensor]:
        """Depths (H, W) in metres by each head."""
        size = (pixels.shape[1], pixels.shape[2])
        if self.stored is not None:
            maps = self.stored.maps(place)
        else:
            view = resize_image(pixels, size_for(*size, self.probe.short)) if self.probe.short else pixels
            maps = self.probe.mapper(torch.stack([view, view.flip(-1)] if self.cfg.flip else [view]))
        found = []
        for head in self.heads.values():
            depths = maps.frame.cut(head([maps])[0].clamp(self.cfg.min_depth, self.cfg.max_depth))[:, 0]
            mean = (depths[0] + depths[1].flip(-1)) / 2 if len(depths) == 2 else depths[0]
            found.append(resize_scores(mean[None], size)[0])
        return found

    def _show(self, place: int, number: int, pixels: Tensor, truth: Tensor, found: list[Tensor]) -> dict[str, Any]:
        """One scale of colours for truth and predictions: that of the truth."""
        known = truth[(truth > 0) & (truth <= self.cfg.max_depth)]
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, self.cfg.max_depth)
        parts = {"image": paint_image(pixels), "truth": paint_depths(truth, low, high)}
        last = dict(zip(self.heads, found, strict=True))
        parts |= {
            "prediction" if len(last) == 1 else f"prediction_{name}": paint_depths(depth, low, high)
            for name, depth in last.items()
        }
        entry = save(self.probe.context.output, number, self.probe.test.name(place), parts)
        return entry | {"low_m": round(low, 3), "high_m": round(high, 3)}


def _result(probe: DenseProbe, cfg: NyudConfig, data: DepthData, seen: list[Seen], eigen: bool) -> Result:
    per_image = as_rows(seen)  # (n, heads, 6)
    known = ~per_image.isnan().flatten(1).any(1)
    if not known.any():
        raise ConfigError(f"no test image has a depth between {cfg.min_depth} and {cfg.max_depth} m", "max_depth")
    scores: dict[str, Score] = {}
    for row, count in enumerate(cfg.layers):
        scores |= depth_scores(per_image[known][:, row], f"_lin{count}")
    places = [one.place for one, good in zip(seen, known.tolist(), strict=True) if good]
    rmse = per_image[known][:, :, 0]
    worst = [
        {"image": probe.test.name(places[row]).rpartition("/")[2], "rmse": [round(m, 4) for m in rmse[row].tolist()]}
        for row in rmse[:, 0].argsort(descending=True)[:WORST].tolist()
    ]
    about = {"unit": data.found, "values_a_metre": list(data.scales), "official": data.official}
    notes = _notes(cfg, data, probe.mapper.blocks, int((~known).sum()), eigen)
    return probe.result(scores, seen, _protocol(cfg, data, eigen), about, notes, worst_rmse=worst)


def _notes(cfg: NyudConfig, data: DepthData, blocks: list[int], lost: int, eigen: bool) -> list[str]:
    four = f"; lin4: blocks {blocks}" if len(blocks) > 1 else ""
    notes = [f"depths are {data.found}", f"lin1: block {blocks[-1]}{four}"]
    if not eigen:
        notes.append("compared over whole images: Eigen's crop is for NYU depth v2")
    if lost:
        notes.append(f"{lost} test images have no depth in range and do not count")
    if 4 in cfg.layers and len(blocks) < 4:
        notes.append(f"{len(blocks)} blocks instead of 4: the network has no more")
    return notes


def _protocol(cfg: NyudConfig, data: DepthData, eigen: bool) -> dict[str, Any]:
    return {
        "features": "as they stand in the residual stream, without the final norm, the class token beside each patch",
        "loss": "the published gradient loss counts axes from the batch on, where it is 0 for 2 images a GPU; here it "
        "looks down and across (gradient_weight=0 is what that code computed)",
        "tested": "whole images" + (" and mirrored ones, averaged" if cfg.flip else ""),
        "compared": "Eigen's crop, rows 45:471 and columns 41:601 of 480 x 640" if eigen else "whole images",
        "unit": data.found,
        "values_a_metre": list(data.scales),
    }
