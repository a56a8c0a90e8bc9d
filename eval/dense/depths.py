"""Depth maps: their unit, and where they lie."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.data.images import BadImage, DataError, open_picture
from eval.dense.nyu import LISTS, MAT, open_mat, read_lists
from eval.dense.pairs import (
    TEST_FOLDERS,
    TRAIN_FOLDERS,
    FilePairs,
    Pairs,
    find_part,
    pair_depths,
    read_bytes,
    two_places,
)
from eval.suite import Place

LOOKED_AT = 16  # maps by which the unit is found
FARTHEST = 100.0  # metres that the middle one of a room's or a street's pixels is never away
NEAREST = 0.02
MILLIMETRES = 1000.0


@dataclass(frozen=True)
class DepthData:
    """Training and test images with depths in metres, 0 = unknown. official: it is NYU depth v2 as published.

    scales: values a metre in the files of train and test; found: what was found out about them, for people.
    """

    train: Pairs
    test: Pairs
    official: bool
    scales: tuple[float, float]
    found: str


def read_raw(path: Path) -> NDArray[np.generic]:
    """The values in a depth map (H, W) as they are stored. Raises BadImage; DataError for colours."""
    data = read_bytes(path)
    try:
        if data[:6] == b"\x93NUMPY":
            values = np.load(io.BytesIO(data), allow_pickle=False).squeeze()
        else:
            content = open_picture(data, 1).content
            values = np.asarray(content)
    except BadImage:
        raise
    except Exception as error:  # decoders raise anything on broken input
        raise BadImage("unreadable", f"{path.name}: {error}") from error
    if values.ndim != 2 or values.dtype == np.uint8:
        raise DataError(
            f"{path} is no depth map: {values.dtype} of shape {values.shape}, not one channel of 16 bits or of floats"
        )
    return values


def read_depth(path: Path, scale: float) -> Tensor:
    """float32 (H, W) in metres, 0 where unknown (0, negative, infinite, no number). Raises BadImage, DataError."""
    metres = read_raw(path).astype(np.float32) / np.float32(scale)
    metres[~np.isfinite(metres) | (metres < 0)] = 0
    return torch.from_numpy(metres)


def middle(maps: Sequence[Path]) -> float:
    """The median of the known values of some of the maps, as stored. Raises DataError where there are none."""
    values = []
    for place in np.unique(np.linspace(0, len(maps) - 1, LOOKED_AT).astype(int)):
        try:
            raw = read_raw(maps[place]).astype(np.float64)
        except BadImage:
            continue
        values.append(raw[np.isfinite(raw) & (raw > 0)][::97])
    known = np.concatenate(values) if values else np.zeros(0)
    if not len(known):
        raise DataError(f"{maps[0].parent}: the depth maps that were looked at hold no depth above 0")
    return float(np.median(known))


def find_scale(maps: Sequence[Path], asked: float) -> tuple[float, str]:
    """Values a metre, and how that is known. asked: as the user said, 0 = to be found. Raises ConfigError."""
    typical = middle(maps)
    scale = asked or (MILLIMETRES if typical > FARTHEST else 1.0)
    metres, where = typical / scale, f"half of the depths in {maps[0].parent} would be"
    if metres > FARTHEST:
        raise ConfigError(
            f"{where} beyond {metres:.4g} m: these are millimetres taken for metres; scale={MILLIMETRES:g} is right "
            "for them, scale=0 finds it",
            "scale",
        )
    if metres < NEAREST:
        raise ConfigError(
            f"{where} below {metres:.2g} m: scale says how many of the values make a metre, 1 where they are metres",
            "scale",
        )
    if asked:
        return scale, f"{scale:g} a metre, as given (the middle value is {metres:.3g} m)"
    unit = "millimetres" if scale == MILLIMETRES else "metres"
    return scale, f"{unit} (the middle value is {typical:.4g}, so {metres:.3g} m)"


def open_depths(place: Place, scale: float = 0) -> DepthData:
    """NYU depth v2 as its .mat or as extracted with its lists, or any folders of RGB images with depth maps.

    scale: values a metre; 0 = found. Raises ConfigError, DataError.
    """
    root = place.root
    mat = root if root is not None and root.suffix == ".mat" else root and root / MAT
    if mat and mat.is_file():
        return DepthData(*open_mat(mat), True, (1.0, 1.0), "metres, as NYU's file has them")
    official = root is not None and all((root / name).is_file() for name in LISTS)
    if official and root is not None:
        files = [read_lists(root, name) for name in LISTS]
        paths = [root / name for name in LISTS]
    else:
        paths = list(two_places(place) or _parts_of(root or Path()))
        files = [pair_depths(path) for path in paths]
    scales, said = zip(*(find_scale([depth for _, depth in pairs], scale) for pairs in files), strict=True)
    train, test = (
        FilePairs(str(path), pairs, partial(read_depth, scale=each), f"{each:g} a metre")
        for path, pairs, each in zip(paths, files, scales, strict=True)
    )
    return DepthData(train, test, official, scales, f"{said[0]} for training, {said[1]} for testing")


def _parts_of(root: Path) -> tuple[Path, Path]:
    train, test = find_part(root, TRAIN_FOLDERS), find_part(root, TEST_FOLDERS)
    if train is None or test is None:
        raise ConfigError(
            f"{root} is no NYU depth v2 ({MAT}, or {' and '.join(LISTS)}) and holds no folders train and val: give one "
            "of these, or train=DIR and test=DIR",
            "--data",
        )
    return train, test
