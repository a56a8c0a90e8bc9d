"""NYU depth v2 as it is published: one MATLAB file of 1,449 frames, or the folders that most have extracted."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.data.images import BadImage, DataError

MAT = "nyu_depth_v2_labeled.mat"
SPLITS = "splits.mat"  # of the same authors: which 795 frames are for training and which 654 for testing
LISTS = ("nyu_train.txt", "nyu_test.txt")  # a line a frame: the image, its depth map, the focal length


@dataclass(frozen=True)
class MatPairs:
    """Frames of the MATLAB file, which is HDF5: images (n, 3, W, H), depths (n, W, H) in metres."""

    path: str
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.path}: frame {self.rows[index] + 1}"

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        try:
            with _h5py().File(self.path) as file:
                image = file["images"][int(self.rows[index])].transpose(0, 2, 1)
                depth = file["depths"][int(self.rows[index])].T
        except OSError as error:
            raise BadImage("unreadable", str(error)) from error
        return torch.from_numpy(np.ascontiguousarray(image)), torch.from_numpy(np.ascontiguousarray(depth)).float()

    def target(self, index: int) -> Tensor:
        return self.read(index)[1]

    def digest(self) -> str:
        about = f"{Path(self.path).name} {Path(self.path).stat().st_size}"
        return hashlib.sha256(about.encode() + self.rows.tobytes()).hexdigest()

    def changed(self) -> str:
        return str(Path(self.path).stat().st_mtime_ns)

    def subset(self, rows: NDArray[np.int64]) -> MatPairs:
        return replace(self, rows=self.rows[rows])


def open_mat(path: Path) -> tuple[MatPairs, MatPairs]:
    """Training and test frames by the official split. Raises ConfigError, DataError."""
    splits = path.parent / SPLITS
    if not splits.is_file():
        raise ConfigError(f"{splits} is needed beside {path.name}: it says which frames are for testing", "--data")
    try:
        from scipy.io import loadmat  # type: ignore[import-untyped]
    except ImportError:
        raise ConfigError(f"reading {SPLITS} needs the package scipy: pip install 'dinoreg[eval]'", "--data") from None
    try:
        with _h5py().File(path) as file:
            count = len(file["images"])
            if file["images"].shape[2:] != file["depths"].shape[1:]:
                raise DataError(f"{path}: images {file['images'].shape} and depths {file['depths'].shape} differ")
    except (OSError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    content = loadmat(str(splits))
    parts = [np.sort(content[name].ravel().astype(np.int64)) - 1 for name in ("trainNdxs", "testNdxs")]
    if max(rows.max() for rows in parts) >= count:
        raise DataError(f"{splits} names frames beyond the {count} of {path.name}")
    return MatPairs(str(path), parts[0]), MatPairs(str(path), parts[1])


def _h5py() -> Any:
    try:
        import h5py  # type: ignore[import-untyped]
    except ImportError:
        raise ConfigError(f"reading {MAT} needs the package h5py: pip install 'dinoreg[eval]'", "--data") from None
    return h5py


def read_lists(root: Path, name: str) -> list[tuple[Path, Path]]:
    """The pairs that a list names, each as a path below the root. Raises ConfigError where one is not there."""
    pairs = []
    for number, line in enumerate((root / name).read_text().splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) < 2:
            raise ConfigError(f"line {number} names no depth map: {line}", f"{root / name}")
        if words[1] == "None":
            continue  # the lists in use mark so the frames without depth
        files = [_below(root, word) for word in words[:2]]
        pairs.append((files[0], files[1]))
    lacking = [file for pair in pairs for file in pair if not file.is_file()]
    if not pairs or lacking:
        what = f"{len(lacking)} files that it names are not there, the first is {lacking[0]}" if pairs else "is empty"
        raise ConfigError(what, f"{root / name}")
    return pairs


def _below(root: Path, word: str) -> Path:
    """Lists in use begin paths with / or without; test frames lie in a folder of their own in some copies."""
    path = root / word.lstrip("/")
    inside = root / "test" / word.lstrip("/")
    return inside if not path.is_file() and inside.is_file() else path
