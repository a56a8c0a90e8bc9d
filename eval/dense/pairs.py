"""Images with a map of labels or depths each: which file belongs to which, and reading both."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.data.images import EXTENSIONS, BadImage, DataError, open_picture
from eval.images import draw_evenly
from eval.suite import Place

TEST_FOLDERS = ("val", "validation", "test", "testing")
TRAIN_FOLDERS = ("train", "training")
# Words in names that say what a file is, not of which scene; the longest first.
WHAT = re.compile(r"sync_depth|depths?|colou?rs?|rgb|images?|img", re.IGNORECASE)


class Pairs(Protocol):
    """Images with targets, by number. Those methods that read raise BadImage for what is no image, or damaged."""

    @property
    def path(self) -> str: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Of the image, for messages."""
        ...

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """uint8 (3, H, W) and its target (H, W). Raises DataError where the target is not one of such images."""
        ...

    def target(self, index: int) -> Tensor:
        """The target alone."""
        ...

    def digest(self) -> str:
        """Differs where there are other images or targets, by names and sizes."""
        ...

    def changed(self) -> str:
        """A digest of when they were written last."""
        ...

    def subset(self, rows: NDArray[np.int64]) -> Pairs: ...


@dataclass(frozen=True)
class FilePairs:
    """Pairs of files. read_target: from a file to (H, W); meaning: what else decides how targets are read."""

    path: str
    files: Sequence[tuple[Path, Path]]
    read_target: Callable[[Path], Tensor]
    meaning: str = ""

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index][0])

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        image, target = open_picture(read_bytes(self.files[index][0]), 3).decode(), self.target(index)
        if image.shape[1:] != target.shape:
            (height, width), (rows, columns) = image.shape[1:], target.shape
            raise DataError(
                f"{self.files[index][1]} is {columns} x {rows}, but its image {self.files[index][0].name} is "
                f"{width} x {height} pixels"
            )
        return image, target

    def target(self, index: int) -> Tensor:
        return self.read_target(self.files[index][1])

    def digest(self) -> str:
        found = hashlib.sha256(self.meaning.encode())
        for pair in self.files:
            for file in pair:
                found.update(f"{file.parent.name}/{file.name} {_size(file)}\n".encode())
        return found.hexdigest()

    def changed(self) -> str:
        times = [file.stat().st_mtime_ns if file.exists() else 0 for pair in self.files for file in pair]
        return hashlib.sha256(np.array(times, dtype=np.int64).tobytes()).hexdigest()

    def subset(self, rows: NDArray[np.int64]) -> FilePairs:
        return replace(self, files=[self.files[int(row)] for row in rows])


def take(pairs: Pairs, most: int) -> Pairs:
    """At most so many, drawn at random but always the same; 0 = all."""
    return pairs.subset(draw_evenly(torch.zeros(len(pairs), dtype=torch.int64), most)) if most else pairs


def reason_of(pairs: Pairs, index: int) -> str:
    """Why a pair cannot be read."""
    try:
        pairs.read(index)
    except BadImage as error:
        return str(error)
    return "unreadable a moment ago"


def read_bytes(path: Path) -> bytes:
    """A whole file. Raises BadImage."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadImage("missing", str(path)) from error
    except OSError as error:
        raise BadImage("unreadable", str(error)) from error


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else -1


def files_below(folder: Path) -> list[Path]:
    """All files that could be images or arrays, sorted."""
    found = (file for file in folder.rglob("*") if file.suffix[1:].lower() in EXTENSIONS and file.is_file())
    return sorted(file for file in found if not file.name.startswith("."))


def find_part(root: Path, names: Sequence[str]) -> Path | None:
    """The first of the folders that is there."""
    return next((root / name for name in names if (root / name).is_dir()), None)


def two_places(place: Place) -> tuple[Path, Path] | None:
    """The folders of train=DIR and test=DIR (or val=DIR); None where --data was one folder. Raises ConfigError."""
    if place.root is not None:
        return None
    test = next((place.parts[name] for name in ("test", "val") if name in place.parts), None)
    if "train" not in place.parts or test is None:
        raise ConfigError("both parts are needed: train=DIR and test=DIR", "--data")
    for path in (place.parts["train"], test):
        if not Path(path).is_dir():
            raise ConfigError(f"{path} is no folder", "--data")
    return Path(place.parts["train"]), Path(test)


def pair_masks(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Every image with the mask of the same name below the other folder. Raises ConfigError where one has none."""
    by_name = {file.relative_to(masks).with_suffix(""): file for file in files_below(masks)}
    found = files_below(images)
    if not found:
        raise ConfigError(f"{images} holds no images", "--data")
    lacking = [file for file in found if file.relative_to(images).with_suffix("") not in by_name]
    if lacking:
        raise ConfigError(
            f"{len(lacking)} of {len(found)} images in {images} have no mask in {masks}; the first is "
            f"{lacking[0].name}",
            "--data",
        )
    return [(file, by_name[file.relative_to(images).with_suffix("")]) for file in found]


def pair_depths(folder: Path) -> list[tuple[Path, Path]]:
    """Every RGB image with the depth map that has the same name but for words such as color, rgb, depth.

    Depth maps are arrays (.npy), and files with "depth" in their name or that of a folder. Raises ConfigError.
    """
    images, depths = _by_scene(folder)
    if not images:
        raise ConfigError(f"{folder} holds no images", "--data")
    lacking = [file for key, file in images.items() if key not in depths]
    if len(lacking) == len(images):
        raise ConfigError(
            f"{folder} holds no depth maps with the names of its {len(images)} images: name.color.jpg and "
            "name.depth.png, or rgb/name.jpg and depth/name.npy",
            "--data",
        )
    if lacking:
        raise ConfigError(
            f"{len(lacking)} of {len(images)} images in {folder} have no depth map; the first is {lacking[0].name}",
            "--data",
        )
    return [(file, depths[key]) for key, file in images.items()]


def _by_scene(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images and depth maps by what their names say of the scene. Raises ConfigError where two say the same."""
    images: dict[str, Path] = {}
    depths: dict[str, Path] = {}
    for file in files_below(folder):
        inside = file.relative_to(folder)
        kind = depths if file.suffix == ".npy" or "depth" in str(inside).lower() else images
        scene = re.sub(r"[\W_]+", " ", WHAT.sub("", str(inside.with_suffix("")))).strip()
        if scene in kind:
            raise ConfigError(f"{inside} and {kind[scene].relative_to(folder)} would be the same scene", "--data")
        kind[scene] = file
    return images, depths
