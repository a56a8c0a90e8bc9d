"""Images, networks and surroundings for tests of suites, small enough to be made anew in each."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinoreg.config import load
from dinoreg.models.vit import ModelConfig, build_vit
from dinoreg.models.weights import load_backbone, save_backbone
from dinoreg.parallel.mesh import Ranks
from eval.backbone import Backbone, Tokens
from eval.results import Result
from eval.suite import Context, Place
from eval.suites import SUITES

COLOURS = [(220, 40, 40), (40, 220, 40), (40, 40, 220), (220, 220, 40)]  # of the classes


def write_classes(folder: Path, each: int, *, wrong: int = 0, seed: int = 0, size: int = 32) -> None:
    """`each` noisy images of its colour in the folder of each class, of which `wrong` have the next class's colour."""
    rng = np.random.default_rng(seed)
    for number in range(len(COLOURS)):
        (folder / f"class{number}").mkdir(parents=True)
        for place in range(each):
            colour = COLOURS[(number + (place < wrong)) % len(COLOURS)]
            pixels = np.clip(rng.normal(colour, 20, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{number}" / f"{place:03d}.png")


def write_data(folder: Path, train: int = 30, test: int = 10, wrong: int = 0) -> Path:
    """Training and test images of four classes."""
    write_classes(folder / "train", train)
    write_classes(folder / "val", test, wrong=wrong, seed=1)
    return folder


def write_weights(path: Path, seed: int = 0, step: int | None = None) -> Path:
    """A network of width 64 and 4 blocks for images of 32 pixels, with random weights; step: where a run made it."""
    torch.manual_seed(seed)
    config = ModelConfig(embed_dim=64, depth=4, num_heads=2, patch_size=8, image_size=32, layerscale=1.0)
    model = build_vit(config)
    model.init_weights()
    save_backbone(path, model.state_dict(), config, {} if step is None else {"step": str(step)})
    return path


class Counting(Backbone):
    """Counts the images that pass through it."""

    def __init__(self, path: Path, die_after: int = -1) -> None:
        super().__init__(load_backbone(path), path.name)
        self.images = 0
        self.die_after = die_after

    def layers(self, images: Tensor, which: Sequence[int], norm: bool = True) -> list[Tokens]:
        """die_after: as if the machine were switched off when so many images have passed."""
        if 0 <= self.die_after <= self.images:
            os.kill(os.getpid(), signal.SIGKILL)
        self.images += len(images)
        return super().layers(images, which, norm)


class Planted(Backbone):
    """Shows the mean colour of an image at one place alone, noise everywhere else.

    where: `cls-1` ... `cls-4`, the class token after that block from the end, or `patches`.
    """

    def __init__(self, path: Path, where: str) -> None:
        super().__init__(load_backbone(path), path.name)
        self.where = where

    @property
    def digest(self) -> str:  # type: ignore[override]
        return f"planted-{self.where}"

    def layers(self, images: Tensor, which: Sequence[int], norm: bool = True) -> list[Tokens]:
        colour = torch.nn.functional.pad(images.mean((2, 3)), (0, self.embed_dim - 3))
        return [self._told(colour, index % self.depth) for index in which]

    def _told(self, colour: Tensor, block: int) -> Tokens:
        generator = torch.Generator().manual_seed(block)
        shape = len(colour), 16, self.embed_dim
        noise = 0.2 * torch.randn(shape, generator=generator)
        cls = colour if self.where == f"cls-{self.depth - block}" else noise[:, 0]
        patches = colour[:, None].expand(shape) if self.where == "patches" else noise
        return Tokens(cls, patches[:, :0], patches, (4, 4))


def surroundings(folder: Path, data: Path | str, ranks: Ranks | None = None) -> Context:
    """The context of one suite, with its cache and output in the folder."""
    return Context(ranks or Ranks.alone(), Place.of([str(data)]), folder / "out", folder / "cache")


def run_suite(name: str, backbone: Backbone, context: Context, *words: str) -> Result:
    """A suite with its quick preset and these options on top."""
    schema: Any = SUITES[name].schema()
    return SUITES[name].runner()(backbone, load(schema, None, [*schema.quick(), *words]), context)
