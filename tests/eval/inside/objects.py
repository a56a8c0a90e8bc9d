"""Features, networks and images with an object whose place is known, for tests of what looks for objects."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinoreg.models.layers import Attention
from dinoreg.models.vit import ModelConfig, VisionTransformer, build_vit

PATCH = 4
THING, GROUND = (220, 40, 40), (40, 40, 220)  # colours of objects and of what is behind them


def toy_features(
    count: int, side: int = 28, dim: int = 64, offset: float = 0.0, seed: int = 0
) -> tuple[Tensor, NDArray[np.int64]]:
    """Patches (count, side * side, dim), fp64, and the boxes (count, 4) of the one square object in each, in patches.

    Patches of the object have one direction, the others the opposite one, and all the same offset of this length on
    top, at a right angle to both.
    """
    rng = np.random.default_rng(seed)
    features, boxes = rng.normal(0, 0.2, (count, side, side, dim)), []
    for image in features:
        size = int(rng.integers(6, 14))
        top, left = rng.integers(0, side - size, 2)
        inside = np.zeros((side, side), dtype=bool)
        inside[top : top + size, left : left + size] = True
        image[..., 0] += np.where(inside, 4.0, -3.0)
        image[..., 1] += offset
        boxes.append([left, top, left + size, top + size])
    return torch.from_numpy(features).flatten(1, 2), np.array(boxes)


def object_network(registers: int = 0, offset: float = 0.0, depth: int = 2, image_size: int = 32) -> VisionTransformer:
    """A network whose queries, keys and values say how red a patch is, each in a channel of its own, in every block.

    offset: what all keys have in common, in a channel of its own, as biases. The class token and the registers are
    redder than anything, and would be the object if they were taken for patches.
    """
    cfg = ModelConfig(
        embed_dim=64, depth=depth, num_heads=2, patch_size=PATCH, image_size=image_size, num_registers=registers,
        layerscale=1.0,
    )  # fmt: skip
    model = build_vit(cfg)
    torch.manual_seed(0)
    model.init_weights()
    with torch.no_grad():
        _write_colours(model)
        for block in model.blocks:
            assert isinstance(block.attn, Attention)
            block.attn.proj.weight.zero_()  # tokens stay what they are
            block.mlp.fc2.weight.zero_()  # type: ignore[union-attr]
            block.attn.qkv.weight.zero_()
            for part in range(3):
                block.attn.qkv.weight[64 * part + part, 0] = 1.0
            block.attn.qkv.bias[64 + 40] = offset  # of the keys, in the other head
    return model.eval().requires_grad_(False)


def _write_colours(model: VisionTransformer) -> None:
    """Channel 0 is red less blue, 1 the opposite, so that LayerNorm takes nothing away; 2 and 3 are constant."""
    assert model.pos_embed is not None and model.patch_embed.proj.bias is not None
    weight = model.patch_embed.proj.weight
    weight.zero_(), model.patch_embed.proj.bias.zero_(), model.pos_embed.zero_(), model.cls_token.zero_()
    for channel, sign in ((0, 1.0), (1, -1.0)):
        weight[channel, 0], weight[channel, 2] = sign / PATCH**2, -sign / PATCH**2
    model.patch_embed.proj.bias[2], model.patch_embed.proj.bias[3] = 1.0, -1.0
    model.cls_token[..., 0] = 9.0
    if model.register_tokens is not None:
        model.register_tokens.zero_()
        model.register_tokens[..., 0] = 9.0


def write_objects(folder: Path, count: int, layout: str = "voc", sizes: tuple[tuple[int, int], ...] = ((64, 48),),
                  seed: int = 0) -> Path:  # fmt: skip
    """Images (width, height) with a red rectangle before blue, on the grid of patches. layout: voc or coco."""
    rng = np.random.default_rng(seed)
    images = folder / ("JPEGImages" if layout == "voc" else "train2014")
    images.mkdir(parents=True)
    found = []
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        pixels = np.empty((height, width, 3), dtype=np.float64)
        pixels[:] = GROUND
        wide, high = (PATCH * int(rng.integers(3, 3 + side // PATCH // 3)) for side in (width, height))
        left, top = (
            PATCH * int(rng.integers(0, (side - size) // PATCH)) for side, size in ((width, wide), (height, high))
        )
        pixels[top : top + high, left : left + wide] = THING
        noisy = np.clip(pixels + rng.normal(0, 10, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(images / f"{number:06d}.jpg", quality=95)
        found.append((f"{number:06d}", (width, height), [left, top, left + wide, top + high]))
    write_voc(folder, found) if layout == "voc" else write_coco(folder, found)
    return folder


Entry = tuple[str, tuple[int, int], list[int]]


def write_voc(folder: Path, entries: list[Entry]) -> None:
    """An annotation of one object for each."""
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    for name, (width, height), (left, top, right, bottom) in entries:
        box = f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
        (folder / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>{width}</width><height>{height}</height></size>"
            f"<object><name>thing</name><truncated>0</truncated><difficult>0</difficult><bndbox>{box}</bndbox></object>"
            "</annotation>"
        )


def write_coco(folder: Path, entries: list[Entry]) -> None:
    """instances_train2014.json with one object for each."""
    images = [
        {"id": number, "file_name": f"{name}.jpg", "width": width, "height": height}
        for number, (name, (width, height), _) in enumerate(entries)
    ]
    notes = [
        {"image_id": number, "bbox": [left, top, right - left, bottom - top], "iscrowd": 0, "category_id": 1}
        for number, (_, _, (left, top, right, bottom)) in enumerate(entries)
    ]
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": notes, "categories": []}
    (folder / "annotations" / "instances_train2014.json").write_text(json.dumps(content))
