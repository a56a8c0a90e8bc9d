"""The images that a network is looked at with, put through it in bounded memory by all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.parallel.precision import Precision, resolve_precision
from eval.backbone import Backbone
from eval.compute import Fitting, autocast, load, normalise
from eval.images import Images, Part, View, Viewed, draw_evenly, find_parts, open_parts
from eval.probe import MOST_ZOOM, choose_size
from eval.results import Result, Score
from eval.suite import Context, Place

R = TypeVar("R")
PHOTOS = 6  # images whose maps are shown


@dataclass
class LookConfig:
    """Options of all experiments that look at images without boxes."""

    image_size: int = 0  # pixels that the network sees; 0 = 224, or what it was trained at where that is less
    zoom: float = 256 / 224  # the short side is resized to this many times the image size before the central crop
    images: int = 1000  # test images that are looked at, drawn evenly over the classes; 0 = all
    train_images: int = 10000  # where something is learnt from labelled images, drawn alike; 0 = all
    photos: int = PHOTOS  # of the images, whose maps are drawn
    batch: int = 32  # images that pass through the network together; halves itself for want of memory
    precision: Precision = "fp32"  # of the network; bf16 is faster, and rounds norms to three digits
    max_bad_share: float = 0.01  # of the images may be unreadable; they are counted, named and left out

    def check(self) -> None:
        """Raises ConfigError."""
        for key, least in (
            ("image_size", 0),
            ("images", 0),
            ("train_images", 0),
            ("photos", 0),
            ("batch", 1),
            ("zoom", 1),
        ):
            if getattr(self, key) < least:
                raise ConfigError(f"must be at least {least}", key)
        if self.zoom > MOST_ZOOM:
            raise ConfigError(f"must be at most {MOST_ZOOM}", "zoom")
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError("must be a share, between 0 and 1", "max_bad_share")


@dataclass(frozen=True)
class Batch:
    """Images on the device. pixels: uint8 (B, 3, S, S); images: the same, normalised; places: int64 (B,), on the host.

    places count within the part that is looked through, so that what is drawn at random for an image does not depend
    on batches and ranks. labels: int64 (B,), on the host; zeros where the images have none.
    """

    pixels: Tensor
    images: Tensor
    places: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def split(self, most: int) -> list[Batch]:
        """In pieces of at most so many images."""
        fields = (self.pixels, self.images, self.places, self.labels)
        return [Batch(*piece) for piece in zip(*(field.split(most) for field in fields), strict=True)]


class Look:
    """The images and the view of one experiment. Construction and all methods are for all ranks together.

    part: the images that are looked at. train: labelled ones to learn from, None where the data have no labels.
    """

    def __init__(self, backbone: Backbone, cfg: LookConfig, context: Context) -> None:
        self.backbone, self.cfg, self.context = backbone, cfg, context
        if (channels := backbone.model.in_channels) != 3:
            raise ConfigError(f"the network takes images of {channels} channels, and these are RGB", "--weights")
        self.train, self.part = open_looked_at(context.data, cfg)
        self.size = choose_size(backbone, cfg.image_size)
        self.view = View(self.size, round(self.size * cfg.zoom))
        self.grid = (self.size // backbone.patch_size,) * 2
        self.precision: Precision = context.ranks.broadcast_object(resolve_precision(cfg.precision, context.device))
        self.bad: dict[str, str] = {}
        self._fitting = Fitting(cfg.batch, context.say)

    @property
    def labelled(self) -> bool:
        """Whether images have classes and some are there to learn from."""
        return self.train is not None

    @property
    def num_classes(self) -> int:
        return int(self.part.images.labels.max()) + 1

    def through(self, measure: Callable[[Batch], R], what: str, part: Part | None = None) -> Iterator[R]:
        """What `measure` finds in each batch of this rank's share of the images, in order; nothing is kept.

        measure: a pure function, called again on pieces where memory is short, without gradients and in the precision
        of cfg. what: for the progress bar. part: other images than `self.part`. Raises ConfigError where too many
        images cannot be read; ranks meet once, at the end.
        """
        part = part or self.part
        ranks, cfg = self.context.ranks, self.cfg
        mine = range(ranks.rank, len(part), ranks.world)
        batches: Sequence[Sequence[int]] = [mine[at : at + cfg.batch] for at in range(0, len(mine), cfg.batch)]
        lost: list[int] = []
        loaded = load(Viewed(part, self.view), batches, self.context, 3 * self.size**2)
        with self.context.progress(what, len(part)) as advance:
            for places, (pixels, good) in zip(batches, loaded, strict=True):
                lost += [place for place, fine in zip(places, good.tolist(), strict=True) if not fine]
                batch = self._batch(part, torch.tensor(list(places))[good], pixels[good])
                if len(batch):
                    yield from self._fitting(self._measuring(measure), batch)
                advance(len(places) * ranks.world)  # the others are about as far
        self._leave_out(part, lost)

    def photos(self, size: int = 0) -> tuple[Tensor, list[str]]:
        """A few of the images, evenly spaced among those looked at, for maps: uint8 (n, 3, S, S), and their names.

        The same for all networks that are shown the same images. Those that cannot be read are passed over. size:
        pixels, where maps are wanted in a higher resolution than that of the measurements.
        """
        view = View(size, round(size * self.cfg.zoom)) if size else self.view
        count = min(self.cfg.photos, len(self.part))
        places = [round(at) for at in torch.linspace(0, len(self.part) - 1, count).tolist()]
        seen = [(*Viewed(self.part, view)[place], place) for place in dict.fromkeys(places)]
        names = [self.part.images.name(int(self.part.rows[place])) for _, good, place in seen if good]
        pixels = [pixels for pixels, good, _ in seen if good]
        return (torch.stack(pixels) if pixels else torch.empty(0, 3, view.size, view.size, dtype=torch.uint8)), names

    def prepare(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) as the network wants it, on the device."""
        return normalise(pixels.to(self.context.device, non_blocking=True), self.backbone)

    def result(
        self, suite: str, scores: dict[str, Score], notes: Sequence[str] = (), arrays: dict[str, Any] | None = None,
        **details: Any,
    ) -> Result:  # fmt: skip
        """With all that the experiments say alike. arrays: tensors or numpy arrays, from which figures are drawn."""
        cfg, part = self.cfg, self.part
        chosen = {"image_size": self.size, "view": str(self.view), "precision": self.precision}
        model = self.backbone.model.config
        resampled = {"pos_antialias": model.pos_antialias, "pos_offset": model.pos_offset, "grid": list(self.grid)}
        said = list(notes)
        if len(part) < len(part.images):
            said.append(f"{len(part):,} of the {len(part.images):,} images of {part.images.path}")
        if self.bad:
            said.append(f"{len(self.bad)} images could not be read and were left out")
        protocol = {**asdict(cfg), **chosen, **resampled}
        kept = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in (arrays or {}).items()}
        return Result(suite, scores, protocol, self._data(), said, details, arrays=kept)

    def _batch(self, part: Part, places: Tensor, pixels: Tensor) -> Batch:
        labels = part.labels[places]
        pixels = pixels.to(self.context.device, non_blocking=True)
        return Batch(pixels, normalise(pixels, self.backbone), places, labels)

    def _measuring(self, measure: Callable[[Batch], R]) -> Callable[[Batch], R]:
        @torch.no_grad()
        def measured(batch: Batch) -> R:
            with autocast(self.context.device, self.precision):
                return measure(batch)

        return measured

    def _leave_out(self, part: Part, lost: Sequence[int]) -> None:
        """Judges and names the images of all ranks that cannot be read."""
        places = [place for share in self.context.ranks.gather_objects(list(lost)) for place in share]
        rows = sorted(int(part.rows[place]) for place in places)
        bad = {part.images.name(row): part.images.trouble(row) or "unreadable a moment ago" for row in rows}
        # A few of the images, drawn for one step of an experiment, hold no more than all may.
        whole = self.part if part.images is self.part.images else part
        if len(bad) > self.cfg.max_bad_share * max(len(whole), len(part)) or len(bad) == len(part):
            name, reason = next(iter(bad.items()))
            raise ConfigError(
                f"{len(bad)} of {len(part)} images cannot be read, more than max_bad_share={self.cfg.max_bad_share}; "
                f"the first is {name} ({reason})",
                "--data",
            )
        if new := {name: reason for name, reason in bad.items() if name not in self.bad}:
            some = ", ".join(f"{name} ({reason})" for name, reason in list(new.items())[:3])
            self.context.say(f"careful: {len(new)} images cannot be read and are left out: {some}")
        self.bad.update(bad)

    def _data(self) -> dict[str, Any]:
        train, part = self.train, self.part
        digests = self.context.ranks.from_main(lambda: [each.digest()[:16] for each in (train, part) if each])
        return {
            "name": Path(str(self.context.data)).name,
            "path": str(self.context.data),
            "hash": "-".join(digests),
            "train": len(train) if train else 0,
            "test": len(part),
            "classes": self.num_classes if train else 0,
            "bad": self.bad,
        }


def open_looked_at(place: Place, cfg: LookConfig) -> tuple[Part | None, Part]:
    """Labelled training images where there are some, and the images that are looked at.

    A folder with train/CLASS and val/CLASS (or shards) has both; any other folder of images, or images=FOLDER, has
    no labels. Raises ConfigError.
    """
    try:
        find_parts(place)
    except ConfigError:
        path = place.parts.get("images") or place.parts.get("test") or (str(place.root) if place.root else "")
        if not path or "train" in place.parts:
            raise
    else:
        return open_parts(place, cfg.train_images, cfg.images)
    try:
        images = Images(path, labelled=False)
    except ValueError as error:
        raise ConfigError(str(error), "--data") from error
    return None, Part(images, draw_evenly(images.labels, cfg.images))
