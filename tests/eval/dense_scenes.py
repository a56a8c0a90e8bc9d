"""Scenes of coloured areas with their masks or depths, and a backbone whose patches show the colour under them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from evaluating import COLOURS
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinoreg.models.vit import ModelConfig, build_vit
from eval.backbone import Backbone, Tokens

PATCH = 8
SIZE = (45, 60)  # (height, width), which patches of 8 do not tile


def draw_areas(rng: np.random.Generator, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """Four areas, of classes 0 to 3 in some order."""
    down, across = rng.integers(size[0] // 3, 2 * size[0] // 3), rng.integers(size[1] // 3, 2 * size[1] // 3)
    labels = np.zeros(size, dtype=np.uint8)
    order = rng.permutation(4)
    labels[:down, :across], labels[:down, across:] = order[0], order[1]
    labels[down:, :across], labels[down:, across:] = order[2], order[3]
    return labels


def paint(labels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    pixels = np.array(COLOURS)[labels] + rng.normal(0, 5, (*labels.shape, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def write_masks(
    root: Path, train: int = 12, test: int = 4, names: tuple[str, str] = ("train", "val"), add: int = 0
) -> Path:
    """images/ and annotations/; add: what each label is more in the file than the class."""
    rng = np.random.default_rng(0)
    for part, count in zip(names, (train, test), strict=True):
        for folder in ("images", "annotations"):
            (root / folder / part).mkdir(parents=True)
        for number in range(count):
            labels = draw_areas(rng)
            Image.fromarray(paint(labels, rng)).save(root / "images" / part / f"{number:03d}.png")
            Image.fromarray(labels + np.uint8(add)).save(root / "annotations" / part / f"{number:03d}.png")
    return root


def write_depths(root: Path, train: int = 12, test: int = 4, scale: float = 1000, kind: str = "png") -> Path:
    """name.color.png and name.depth.png (or .npy): class k is k + 1 metres away; one row is unknown."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", test)):
        (root / part).mkdir(parents=True)
        for number in range(count):
            labels = draw_areas(rng)
            Image.fromarray(paint(labels, rng)).save(root / part / f"{number:03d}.color.png")
            depth = (labels + 1.0) * scale
            depth[:1] = 0
            if kind == "npy":
                np.save(root / part / f"{number:03d}.npy", depth.astype(np.float32))
            else:
                Image.fromarray(depth.astype(np.uint16)).save(root / part / f"{number:03d}.depth.png")
    return root


def tiny_model(depth: int = 4, seed: int = 0) -> ModelConfig:
    torch.manual_seed(seed)
    return ModelConfig(embed_dim=32, depth=depth, num_heads=2, patch_size=PATCH, image_size=48, layerscale=1.0)


class Seeing(Backbone):
    """Each patch token of the last block shows the mean colour under it, and its square; others show noise."""

    def __init__(self, depth: int = 4) -> None:
        model = build_vit(tiny_model(depth))
        model.init_weights()
        super().__init__(model, "seeing")
        self.images = 0

    def layers(self, images: Tensor, which: Sequence[int], norm: bool = True) -> list[Tokens]:
        self.images += len(images)
        colours = F.avg_pool2d(images.float(), PATCH).flatten(2).transpose(1, 2)  # (B, N, 3)
        patches = F.pad(torch.cat([colours, colours.square()], dim=2), (0, self.embed_dim - 6))
        found = []
        for block in which:
            generator = torch.Generator().manual_seed(block % self.depth)
            noise = torch.randn(patches.shape, generator=generator)
            seen = patches if block % self.depth == self.depth - 1 else noise
            found.append(Tokens(seen.mean(1), seen[:, :0], seen, self.grid(images)))
        return found


class Dying(Seeing):
    """Fails when so many images have passed, as if killed."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def layers(self, *args: Any, **kwargs: Any) -> Any:
        if self.images >= self.after:
            raise KeyboardInterrupt
        return super().layers(*args, **kwargs)
