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
from dinoreg.data.images import EXTENSIONS, TRANSPOSED, BadImage, open_picture
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
        """Pixels, uint8 (3, H, W), in the orientation that the boxes are of. Raises BadImage."""
        entry = self.entries[place]
        picture = open_picture(read_bytes(entry.file), 3)
        # Who drew boxes on a photo without turning it as its EXIF says, has noted the size that it has unturned.
        unturned = picture.orientation in TRANSPOSED and entry.size == (picture.width, picture.height)
        if unturned and picture.width != picture.height:
            picture.orientation = 1
        return picture.decode()

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
        """Those that a text file lists, one name a line, with or without folder and ending.

        Folders count only where images in several have the same name. Raises ConfigError.
        """
        try:
            names = [_bare(Path(line.strip())) for line in file.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot be read: {error}", "names") from error
        by_name: dict[str, list[int]] = {}
        for place, entry in enumerate(self.entries):
            by_name.setdefault(_bare(entry.file).name, []).append(place)
        lacking = [name.name for name in names if name.name not in by_name]
        if lacking or not names:
            said = f"{len(lacking)} of {len(names)} names are not in {self.path}; the first is {lacking[0]}"
            raise ConfigError(said if names else f"{file} names no image", "names")
        return self.subset(dict.fromkeys(self._of_name(name, by_name[name.name]) for name in names))

    def _of_name(self, name: Path, places: Sequence[int]) -> int:
        """The one of these that is meant. Raises ConfigError."""
        ends = [place for place in places if _bare(self.entries[place].file).parts[-len(name.parts) :] == name.parts]
        if len(places) > 1 and len(ends) != 1:
            raise ConfigError(f"{name} may be any of {len(places)} images: say its folder too", "names")
        return ends[0] if ends else places[0]


def _bare(file: Path) -> Path:
    """Without the ending of an image; names may have points in them."""
    return file.with_suffix("") if file.suffix[1:].lower() in EXTENSIONS else file


def as_boxes(rows: Sequence[Sequence[float]]) -> NDArray[np.float32]:
    """(n, 4), also of none."""
    return np.array(rows, dtype=np.float32).reshape(-1, 4)


def images_by_stem(folder: Path) -> dict[str, Path]:
    """The images right in a folder by their names without endings."""
    return {file.stem: file for file in sorted(folder.iterdir()) if file.suffix[1:].lower() in EXTENSIONS}
