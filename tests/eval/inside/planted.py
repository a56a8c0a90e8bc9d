"""Networks whose inside is known because it was written by hand, and images that make them show it.

A real VisionTransformer with a residual stream whose channels each have one meaning. A patch of the marker's colour
sets one channel; one neuron of one block's feed-forward layer listens to that channel alone and, when it fires, makes
the token tens of times as long as its neighbours. So it is known which token becomes an outlier, in which block, by
which neuron, in which direction, and how long it is.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from evaluating import COLOURS
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinoreg.models.formats import IMAGENET
from dinoreg.models.layers import Attention, Mlp
from dinoreg.models.vit import ModelConfig, VisionTransformer, build_vit

MARKER = (255, 0, 255)  # the colour of patches that become outliers; hardly a photo has it
SIZE, PATCH, DIM = 32, 4, 64  # a grid of 8 x 8
GRID = SIZE // PATCH

# What the channels of the residual stream mean.
COLOUR = slice(0, 3)  # mean colour of the patch
MARK = 3  # how much like the marker
IS_CLS = 4
GATHERED = slice(6, 9)  # mean colour of the image, in tokens that gather
LOUD = slice(10, 12)  # where an outlier is long
TEXTURE = slice(16, 32)  # random projections of the pixels
PLACE = slice(32, 64)  # +-2, random, another code for each position; it keeps all LayerNorms near one scale

MARKED = 4.0  # of a patch that is all marker, in MARK
CODE = 2.0


def planted_network(
    *,
    block: int = 1,
    neuron: int = 3,
    strength: float = 120.0,
    home: str = "patches",
    registers: int = 0,
    gather: int | None = None,
    depth: int = 4,
    image_size: int = SIZE,
    seed: int = 0,
) -> VisionTransformer:
    """A network in which the feed-forward layer of a block makes marked tokens about `strength` long, others are 12.

    home: who is marked: "patches" of the marker's colour, the first of the "registers" in every image, or "nowhere".
    gather: a later block in which marked tokens and CLS take in the mean colour of all tokens, and no other token does;
    attention adds nothing else then. Everything else is random and small.
    """
    cfg = ModelConfig(
        embed_dim=DIM, depth=depth, num_heads=2, patch_size=PATCH, image_size=image_size, num_registers=registers,
        layerscale=1.0,
    )  # fmt: skip
    model = build_vit(cfg)
    torch.manual_seed(seed)
    model.init_weights()
    with torch.no_grad():
        _write_embedding(model, home)
        _write_neuron(model, block, neuron, strength)
        if gather is not None:
            _write_gathering(model, gather)
    return model.eval().requires_grad_(False)


def striped_network() -> VisionTransformer:
    """The learnt positions themselves are marked in every second column, and unmarked as much in the others.

    Resampled from the native 16 x 16 to a smaller grid, they cancel. Without antialiasing they do not, and a few
    columns are outliers in every image.
    """
    model = planted_network(image_size=16 * PATCH)
    with torch.no_grad():
        assert model.pos_embed is not None
        sign = 1 - 2 * (torch.arange(256) % 16 % 2)
        model.pos_embed[0, 1:, MARK] = MARKED * sign
    return model


def planted_pixels(
    marked: NDArray[np.bool_], seed: int = 0, colours: NDArray[np.int64] | None = None, coloured: int = 12
) -> NDArray[np.uint8]:
    """Grey noise (n, H, W, 3) of patches, the marked ones (n, h, w) in the marker's colour.

    colours: (n,), of each image: `coloured` of its other patches have that one of `evaluating.COLOURS`.
    """
    rng = np.random.default_rng(seed)
    count, high, wide = marked.shape
    patches = rng.normal(128, 20, (count, high * wide, 1, 1, 3)) + rng.normal(
        0, 20, (count, high * wide, PATCH, PATCH, 3)
    )
    for image, each in enumerate(patches):
        if colours is not None:
            free = np.flatnonzero(~marked[image])
            each[rng.permutation(free)[:coloured]] += np.array(COLOURS[colours[image]]) - 128.0
        each[marked[image].ravel()] = MARKER
    pixels = patches.reshape(count, high, wide, PATCH, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return np.clip(pixels, 0, 255).astype(np.uint8).reshape(count, high * PATCH, wide * PATCH, 3)


def mark(count: int, rate: float, seed: int = 0, grid: int = GRID) -> NDArray[np.bool_]:
    """Which patches are marked, each with this probability: (count, grid, grid)."""
    return np.random.default_rng(seed).random((count, grid, grid)) < rate


def as_images(pixels: NDArray[np.uint8]) -> Tensor:
    """As the network takes them: (n, 3, H, W), normalised."""
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in IMAGENET)
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std


def write_planted(folder: Path, marked: NDArray[np.bool_], seed: int = 0) -> Path:
    """Those images as files, in the order of `marked`; shown unchanged with the option zoom=1."""
    folder.mkdir(parents=True)
    for number, pixels in enumerate(planted_pixels(marked, seed)):
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")
    return folder


def write_planted_classes(
    folder: Path, train: int = 24, test: int = 12, rate: float = 0.05, coloured: int = 12
) -> Path:
    """Images of four classes in train/CLASS and val/CLASS: a few patches of an image have its class's colour."""
    for part, each, seed in (("train", train, 1), ("val", test, 2)):
        labels = np.repeat(np.arange(len(COLOURS)), each)
        pixels = planted_pixels(mark(len(labels), rate, seed), seed, labels, coloured)
        for number, (label, image) in enumerate(zip(labels, pixels, strict=True)):
            place = folder / part / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{number:04d}.png")
    return folder


def _write_embedding(model: VisionTransformer, home: str) -> None:
    """Colours, texture and marks of patches; places; what CLS and registers are."""
    assert model.pos_embed is not None
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    assert bias is not None
    texture = 0.05 * torch.randn_like(weight[TEXTURE])
    weight.zero_(), bias.zero_()
    mean, std = (torch.tensor(each) for each in IMAGENET)
    for channel in range(3):
        weight[channel, channel] = 1 / PATCH**2
    weight[TEXTURE] = texture
    if home == "patches":
        likeness = MARKED * torch.tensor([0.5, -1.0, 0.5])  # 1 for the marker, 0 for grey
        weight[MARK] = (likeness * std / PATCH**2).view(3, 1, 1)
        bias[MARK] = likeness @ mean
    model.pos_embed.zero_()
    model.pos_embed[..., PLACE] = CODE * torch.randn_like(model.pos_embed[..., PLACE]).sign()
    model.cls_token.zero_()
    model.cls_token[..., IS_CLS] = MARKED
    if model.register_tokens is not None:
        model.register_tokens.zero_()
        model.register_tokens[..., PLACE] = CODE * torch.randn_like(model.register_tokens[..., PLACE]).sign()
        if home == "registers":
            model.register_tokens[:, 0, MARK] = MARKED


def _write_neuron(model: VisionTransformer, block: int, neuron: int, strength: float) -> None:
    """fires = gelu(10 (normed MARK - 1.8)), about 6 for a marked token and 0 for all others."""
    mlp = model.blocks[block].mlp
    assert isinstance(mlp, Mlp)
    mlp.fc1.weight[neuron] = 0
    mlp.fc1.weight[neuron, MARK] = 10.0
    mlp.fc1.bias[neuron] = -18.0
    mlp.fc2.weight[:, neuron] = 0
    mlp.fc2.weight[LOUD, neuron] = torch.tensor([0.8, -0.6]) * strength / 6


def _write_gathering(model: VisionTransformer, block: int) -> None:
    """The first head: tokens look at CLS alone, which says nothing; marked ones and CLS look at all others alike."""
    attention = model.blocks[block].attn
    assert isinstance(attention, Attention)
    width = DIM // 2
    query, key, value = (slice(at * DIM, at * DIM + width) for at in range(3))
    for each in model.blocks:
        each.attn.proj.weight.zero_()  # or all tokens would know a little of the image
    attention.qkv.weight[query] = attention.qkv.weight[key] = attention.qkv.weight[value] = 0
    # A marked token is long by now, so that the norm leaves only its LOUD channels, 6.4 and -4.8; CLS has IS_CLS, 2.7.
    attention.qkv.bias[0] = 20.0
    attention.qkv.weight[0, LOUD] = 2.5 * torch.tensor([-0.8, 0.6])
    attention.qkv.weight[0, IS_CLS] = -7.5
    attention.qkv.weight[DIM, IS_CLS] = 1.2
    for channel in range(3):
        attention.qkv.weight[2 * DIM + channel, channel] = 1.0
        attention.proj.weight[GATHERED.start + channel, channel] = 90.0
