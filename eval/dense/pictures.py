"""Images, truths and predictions as PNG files for the report."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from eval.results import write_atomically

FOLDER = "pictures"
SIDE = 480  # pixels of the long side
GOLDEN = 0.618034  # turns of the colour circle by it never meet, and neighbours in number differ
# Near to far, through which depths are coloured; light is near. Unknown is black.
RAMP = np.array([[253, 231, 150], [247, 140, 80], [196, 60, 105], [105, 35, 125], [35, 20, 75]], dtype=np.float64)


def colour(label: int) -> tuple[int, int, int]:
    """Of a class, always the same; black below 0."""
    if label < 0:
        return 0, 0, 0
    hue, level = (label * GOLDEN) % 1, label % 3
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.75, 0.45, 0.9)[level], (0.95, 0.8, 0.6)[level])
    return round(255 * red), round(255 * green), round(255 * blue)


def paint_labels(labels: Tensor) -> NDArray[np.uint8]:
    """(H, W) -> (H, W, 3)."""
    numbers = labels.cpu().numpy().astype(np.int64)
    table = np.array([colour(label) for label in range(-1, max(0, int(numbers.max())) + 1)], dtype=np.uint8)
    return table[numbers + 1]


def paint_depths(depths: Tensor, low: float, high: float) -> NDArray[np.uint8]:
    """(H, W) in metres -> (H, W, 3): RAMP from low to high, black where unknown (0)."""
    metres = depths.cpu().numpy().astype(np.float64)
    at = np.clip((metres - low) / max(high - low, 1e-9), 0, 1) * (len(RAMP) - 1)
    channels = [np.interp(at, np.arange(len(RAMP)), RAMP[:, channel]) for channel in range(3)]
    return np.where(metres[:, :, None] > 0, np.stack(channels, axis=2), 0).round().astype(np.uint8)


def paint_image(pixels: Tensor) -> NDArray[np.uint8]:
    """uint8 (3, H, W) -> (H, W, 3)."""
    return np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy())


def save(output: Path, number: int, name: str, parts: Mapping[str, NDArray[np.uint8]]) -> dict[str, Any]:
    """One PNG file a part; returns their paths relative to the output folder, and the image's own name."""
    entry: dict[str, Any] = {"name": Path(name).name}
    for part, pixels in parts.items():
        entry[part] = f"{FOLDER}/{number:02d}-{part}.png"
        # The colours of labels and depths are not to be mixed.
        how = Image.Resampling.BILINEAR if part == "image" else Image.Resampling.NEAREST
        _write(output / entry[part], Image.fromarray(pixels), how)
    return entry


def _write(path: Path, picture: Image.Image, how: Image.Resampling) -> None:
    shrink = min(1.0, SIDE / max(picture.size))
    width, height = (max(1, round(side * shrink)) for side in picture.size)
    write_atomically(path, lambda file: picture.resize((width, height), how).save(file, "PNG"))
