"""Features of many images, computed once: cached on disk, shared out over ranks, gone on with after a kill."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.parallel.precision import Precision
from eval.backbone import Backbone
from eval.compute import load
from eval.forward import Forward
from eval.images import Part, View, Viewed
from eval.results import write_json
from eval.suite import Context

VERSION = 1  # of what is stored; another one never reads this one's files
CHUNK = 512  # images that are stored together, and lost together by a kill; whole pages of any network's features
TODO, GOOD, BAD = 0, 1, 2  # states of an image


@dataclass
class Features:
    """Memory-mapped fp16 (n, D) by name. good: bool (n,), False where an image could not be read."""

    arrays: dict[str, NDArray[np.float16]]
    good: NDArray[np.bool_]
    computed: int  # images that passed through the network for it just now, over all ranks

    def tensor(self, names: Sequence[str], rows: NDArray[np.int64] | None = None) -> Tensor:
        """The named features side by side, fp32 (n, sum of D): of all good images, or of the rows given."""
        chosen = np.flatnonzero(self.good) if rows is None else rows
        return torch.cat([torch.from_numpy(self.arrays[name][chosen].astype(np.float32)) for name in names], dim=1)


def extract(
    backbone: Backbone,
    part: Part,
    view: View,
    names: Sequence[str],
    context: Context,
    *,
    batch: int = 256,
    precision: Precision,
    max_bad_share: float = 0.01,
    what: str = "features",
) -> Features:
    """Class tokens of last blocks (`cls_of`) and means of patch tokens (PATCH_MEAN) of a part's images.

    All ranks call it together and must share the folder context.cache. What is there already is not computed again.
    Raises ConfigError where more images than a share of max_bad_share cannot be read, or features are not finite.
    """
    store = context.ranks.from_main(lambda: Store.make(context.cache, backbone, part, view, precision, names))
    store.check_here()
    pending = context.ranks.from_main(lambda: store.pending(part))
    if pending:
        forward = Forward(backbone, names, context, min(batch, CHUNK), precision)
        _Extractor(forward, store, part, view, context, batch).run(pending, what)
        context.ranks.barrier()
    features = store.read(sum(len(store.rows(chunk)) for chunk in pending))
    _demand_readable(features, part, max_bad_share)
    return features


def _demand_readable(features: Features, part: Part, max_share: float) -> None:
    rows = part.rows[np.flatnonzero(~features.good)]
    if len(rows) > max_share * len(part) or len(rows) == len(part):
        first = int(rows[0])
        raise ConfigError(
            f"{len(rows)} of {len(part)} images cannot be read, more than max_bad_share={max_share}; the first is "
            f"{part.images.name(first)} ({part.images.trouble(first)})",
            "--data",
        )


@dataclass(frozen=True)
class Store:
    """Files of one folder: NAME.f16 with the rows of all images, and NAME.state with a byte for each.

    Rows are on the disk before their bytes say so; hence what a killed process leaves is right as far as it says it is.
    """

    folder: Path
    count: int
    dim: int
    names: tuple[str, ...]

    @staticmethod
    def make(cache: Path, backbone: Backbone, part: Part, view: View, precision: str, names: Sequence[str]) -> Store:
        """Opens the folder that belongs to these weights, images and this view, with room for the features."""
        about = {
            "version": VERSION,
            "weights": backbone.digest,
            "images": part.digest(),
            "changed": part.images.changed(),
            "view": str(view),
            "normalisation": [list(map(float, each)) for each in backbone.normalisation],
            "precision": precision,
        }
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        store = Store(cache / key[:24], len(part), backbone.embed_dim, tuple(names))
        store.folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            _reserve(store.folder / f"{name}.f16", store.count * store.dim * 2)
            _reserve(store.folder / f"{name}.state", store.count)
        write_json(store.folder / "about.json", {**about, "backbone": backbone.found, "path": part.images.path})
        return store

    def check_here(self) -> None:
        """Raises ConfigError on a rank that sees another cache than the main one."""
        if not (self.folder / "about.json").is_file():
            raise ConfigError(f"{self.folder} is not seen by all processes: give a folder that they share", "--cache")

    def rows(self, chunk: int) -> range:
        """The images of a chunk."""
        return range(chunk * CHUNK, min(self.count, (chunk + 1) * CHUNK))

    def pending(self, part: Part) -> list[int]:
        """Chunks in which some image lacks some feature; also where it could not be read before, and can be now."""
        states = np.stack([self._states(name) for name in self.names])
        todo = (states == TODO).any(0)
        for row in np.flatnonzero((states == BAD).any(0)):
            todo[row] |= part.images.trouble(int(part.rows[row])) is None
        return sorted({int(row) // CHUNK for row in np.flatnonzero(todo)})

    def write(self, chunk: int, features: dict[str, Tensor], good: Tensor) -> None:
        """Rows (n, D) of a chunk's images, and which of them could be read."""
        first = self.rows(chunk).start
        states = np.where(good.numpy(), GOOD, BAD).astype(np.uint8)
        for name in self.names:
            _write_at(self.folder / f"{name}.f16", features[name].numpy().tobytes(), first * self.dim * 2)
            _write_at(self.folder / f"{name}.state", states.tobytes(), first)

    def read(self, computed: int) -> Features:
        """What is stored, all of which must be done."""
        shape = (self.count, self.dim)
        arrays = {
            name: np.memmap(self.folder / f"{name}.f16", dtype=np.float16, mode="r", shape=shape) for name in self.names
        }
        good = np.ones(self.count, dtype=bool)
        for name in self.names:
            good &= self._states(name) == GOOD
        return Features(dict(arrays), good, computed)

    def _states(self, name: str) -> NDArray[np.uint8]:
        return np.fromfile(self.folder / f"{name}.state", dtype=np.uint8)


def _reserve(path: Path, size: int) -> None:
    """A file of zeros, or the one that is there: two processes may do this at once."""
    with path.open("ab") as file:
        file.truncate(size)


def _write_at(path: Path, data: bytes, offset: int) -> None:
    try:
        with path.open("r+b", buffering=0) as file:
            file.seek(offset)
            while data:
                data = data[file.write(data) :]
            os.fdatasync(file.fileno())
    except OSError as error:  # which names no file when a disk is full
        raise OSError(error.errno, error.strerror, str(path)) from error


class _Extractor:
    """Puts images through the network."""

    def __init__(self, forward: Forward, store: Store, part: Part, view: View, context: Context, batch: int) -> None:
        self.forward, self.store, self.part, self.view, self.context = forward, store, part, view, context
        self.batch = min(batch, CHUNK)

    def run(self, pending: Sequence[int], what: str) -> None:
        """This rank's share of the chunks."""
        ranks, store = self.context.ranks, self.store
        mine = pending[ranks.rank :: ranks.world]
        todo = sum(len(store.rows(chunk)) for chunk in pending)
        batches = [
            store.rows(chunk)[start : start + self.batch]
            for chunk in mine
            for start in range(0, len(store.rows(chunk)), self.batch)
        ]
        loaded = load(Viewed(self.part, self.view), batches, self.context, 3 * self.view.size**2)
        with self.context.progress(what, store.count, store.count - todo) as advance:
            for chunk in mine:
                parts: list[dict[str, Tensor]] = []
                goods: list[Tensor] = []
                for _ in range(0, len(store.rows(chunk)), self.batch):
                    pixels, good = next(loaded)
                    parts.append({name: value.half().cpu() for name, value in self.forward(pixels).items()})
                    goods.append(good)
                    advance(len(good) * ranks.world)  # the others are about as far
                features = {name: torch.cat([part[name] for part in parts]) for name in store.names}
                self._demand_finite(chunk, features)
                store.write(chunk, features, torch.cat(goods))

    def _demand_finite(self, chunk: int, features: dict[str, Tensor]) -> None:
        for values in features.values():
            if not (finite := values.isfinite().all(1)).all():
                row = int(self.part.rows[self.store.rows(chunk)[int(finite.int().argmin())]])
                raise ConfigError(f"the features of {self.part.images.name(row)} are not finite", "--weights")
