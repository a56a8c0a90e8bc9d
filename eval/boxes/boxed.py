"""Images with boxes, whatever the layout they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.data.images import EXTENSIONS, BadImage, open_picture
from eval.dense.pairs import read_bytes


@dataclass(frozen=True)
class Boxed:
    """One image. boxes: (n, 4) left, top, right, bottom in pixels, the last two just outside of the box.

    size: (height, width) as the annotation says, which need not be true; None where it says nothing.
    """

    file: Path
    boxes: NDArray[np.float32]
    size: tuple[int, int] | None


@dataclass(frozen=True)
class BoxedImages:
    """The images of a set, in its order. path: where they were found; layout: in words."""

    path: str
    layout: str
    entries: Sequence[Boxed]

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, place: int) -> str:
        """Of an image, for messages."""
        return str(self.entries[place].file)

    def read(self, place: int) -> Tensor:
        """Pixels, uint8 (3, H, W). Raises BadImage."""
        return open_picture(read_bytes(self.entries[place].file), 3).decode()

    def trouble(self, place: int) -> str | None:
        """Why an image cannot be read; None where it can."""
        try:
            self.read(place)
        except BadImage as error:
            return error.reason
        return None

    def digest(self) -> str:
        """Differs where there are other images, by names and sizes, or other boxes; moving them changes nothing."""
        found = hashlib.sha256()
        for entry in self.entries:
            size = entry.file.stat().st_size if entry.file.exists() else -1
            found.update(f"{entry.file.name} {size}\n".encode())
            found.update(np.ascontiguousarray(entry.boxes).tobytes())
        return found.hexdigest()

    def subset(self, places: Iterable[int]) -> BoxedImages:
        """Those at these places."""
        return replace(self, entries=[self.entries[int(place)] for place in places])

    def named(self, file: Path) -> BoxedImages:
        """Those that a text file lists, one name a line, with or without folder and ending. Raises ConfigError."""
        try:
            names = [Path(line.strip()).stem for line in file.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot be read: {error}", "names") from error
        by_name = {entry.file.stem: entry for entry in self.entries}
        lacking = [name for name in names if name not in by_name]
        if lacking or not names:
            said = f"{len(lacking)} of {len(names)} names are not in {self.path}; the first is {lacking[0]}"
            raise ConfigError(said if names else f"{file} names no image", "names")
        return replace(self, entries=[by_name[name] for name in dict.fromkeys(names)])


def as_boxes(rows: Sequence[Sequence[float]]) -> NDArray[np.float32]:
    """(n, 4), also of none."""
    return np.array(rows, dtype=np.float32).reshape(-1, 4)


def images_by_stem(folder: Path) -> dict[str, Path]:
    """The images right in a folder by their names without endings."""
    return {file.stem: file for file in sorted(folder.iterdir()) if file.suffix[1:].lower() in EXTENSIONS}
