"""Photometric augmentation: parameters drawn on the host, applied to batches on the device.

Every operation follows Pillow's definition (the one torchvision applies to PIL images), in float and with the clamp
that 8-bit storage implies, but without its rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dinoreg.config import ConfigError
from dinoreg.data.batch import Batch, Crops


@dataclass
class PhotometricConfig:
    """DINOv2's colour recipe. Triples are (first global crop, second global crop, local crops)."""

    jitter: float = 0.8  # probability that a crop is jittered at all
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grey: float = 0.2  # probability
    # The released code passed 1 - p to its blur, so what trained the public weights is (0, 0.9, 0.5);
    # the paper's intention was (1.0, 0.1, 0.5).
    blur: tuple[float, float, float] = (0.0, 0.9, 0.5)  # probability
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarise: tuple[float, float, float] = (0.0, 0.2, 0.0)  # probability; inverts values >= 128
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])  # one per channel, in [0, 1]
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])

    def check(self) -> None:
        """Raises ConfigError on a value that no image could be augmented with."""
        for key in ("jitter", "grey", "blur", "solarise"):
            values = np.atleast_1d(getattr(self, key))
            _require(bool(((values >= 0) & (values <= 1)).all()), key, "must be probabilities, between 0 and 1")
        for key in ("brightness", "contrast", "saturation"):
            _require(getattr(self, key) >= 0, key, "must not be negative")
        _require(0 <= self.hue <= 0.5, "hue", "must be a share of the colour circle, between 0 and 0.5")
        _require(0 < self.blur_sigma[0] <= self.blur_sigma[1], "blur_sigma", "must be 0 < low <= high")
        _require(len(self.mean) == len(self.std), "std", "must have as many entries as photometric.mean")
        _require(min(self.std, default=0.0) > 0, "std", "must be positive")


def _require(holds: bool, key: str, message: str) -> None:
    if not holds:
        raise ConfigError(message, key=key)


# Columns of the parameters of one crop. Neutral: no jitter, no grey, sigma 0, no solarisation.
JITTER, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, SIGMA, SOLARISE = range(9)
NUM_PARAMETERS = 9
# The colour operations of a jittered crop come in a random order: column ORDER numbers these permutations.
COLOUR_COLUMNS = np.array([BRIGHTNESS, CONTRAST, SATURATION, HUE])
NEUTRAL = np.array([1.0, 1.0, 1.0, 0.0])
ORDERS = np.array(list(itertools.permutations(COLOUR_COLUMNS)))  # (24, 4)
# What is done to a batch, stage after stage: any of the colour operations at each of four places, then the rest.
LAST_COLUMNS = np.array([GREY, SIGMA, SOLARISE])
STAGES = np.concatenate([COLOUR_COLUMNS] * len(COLOUR_COLUMNS) + [LAST_COLUMNS])  # (19,) columns
BLUR_RADIUS = 4  # a kernel of 9 taps
BLUR_BLOCK = 56  # rows or columns of a blurred image that one matrix product makes
CACHE_BYTES = 1250 * 2**10  # of float crops that a CPU works on at a time: 2 of 224 pixels, 11 of 98
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow's convert("L")


def draw(cfg: PhotometricConfig, rng: np.random.Generator, channels: int, local_count: int) -> NDArray[np.float32]:
    """Parameters (2 + local_count, NUM_PARAMETERS) of one image's crops, global crops first.

    Saturation, hue and grey have a meaning for three channels only; with another number they stay neutral.
    """
    crops = 2 + local_count
    u = rng.random((crops, NUM_PARAMETERS + 1))
    colour = 1.0 if channels == 3 else 0.0
    kind = np.minimum(np.arange(crops), 2)  # first global, second global, local
    out = np.empty((crops, NUM_PARAMETERS), dtype=np.float32)
    out[:, JITTER] = u[:, JITTER] < cfg.jitter
    out[:, ORDER] = np.floor(u[:, ORDER] * len(ORDERS))
    out[:, BRIGHTNESS] = _factor(u[:, BRIGHTNESS], cfg.brightness)
    out[:, CONTRAST] = _factor(u[:, CONTRAST], cfg.contrast)
    out[:, SATURATION] = _factor(u[:, SATURATION], colour * cfg.saturation)
    out[:, HUE] = colour * cfg.hue * (2 * u[:, HUE] - 1)
    out[:, GREY] = u[:, GREY] < colour * cfg.grey
    low, high = cfg.blur_sigma
    blurred = u[:, NUM_PARAMETERS] < np.asarray(cfg.blur)[kind]
    out[:, SIGMA] = np.where(blurred, low + (high - low) * u[:, SIGMA], 0.0)
    out[:, SOLARISE] = u[:, SOLARISE] < np.asarray(cfg.solarise)[kind]
    return out


def _factor(u: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
    """Uniform in [max(0, 1 - strength), 1 + strength], as torchvision's ColorJitter."""
    low = max(0.0, 1.0 - strength)
    return low + (1.0 + strength - low) * u


def develop(batch: Batch, cfg: PhotometricConfig) -> Crops:
    """Jitter, grey, blur, solarise, normalise: a batch of uint8 crops to float crops, on the crops' device.

    Raises ValueError when cfg.mean does not have one entry per channel. Never waits for the device.
    """
    channels = batch.global_crops.shape[2]
    if len(cfg.mean) != channels:
        raise ValueError(
            f"photometric.mean and .std have {len(cfg.mean)} entries, but the images have {channels} channels"
        )
    global_crops = _augment(batch.global_crops, batch.photometric[:, :2], cfg)
    local_crops = _augment(batch.local_crops, batch.photometric[:, 2:], cfg)
    device = global_crops.device
    masked_index = batch.masks.flatten().nonzero()[:, 0]
    return Crops(global_crops, local_crops, _send(batch.masks, device), _send(masked_index, device))


def _augment(crops: Tensor, parameters: Tensor, cfg: PhotometricConfig) -> Tensor:
    """(b, n, C, H, W) uint8 and (b, n, P) on the host -> (b, n, C, H, W) float32, normalised."""
    values, device = parameters.flatten(0, 1).numpy(), crops.device
    images = crops.permute(0, 1, 3, 4, 2).flatten(0, 1)  # interleaved, as they lie in memory
    out = torch.empty(crops.flatten(0, 1).shape, dtype=torch.float32, device=device)
    mean, scale = _send(torch.tensor([cfg.mean, [1 / std for std in cfg.std]]), device).view(2, -1, 1, 1)
    # Crops that go through the same operations lie side by side: a slice of them is changed in place, without copies.
    sequence = np.lexsort((_order(values), values[:, SIGMA] > 0))
    values, rows = values[sequence], _send(torch.from_numpy(sequence), device)
    active = _active(values)
    # A processor is faster on as many crops as its cache holds; a GPU wants them all at once.
    step = len(images) if images.is_cuda else CACHE_BYTES // max(1, 4 * images[:1].numel())
    for start in range(0, len(images), max(1, step)):
        chunk = slice(start, start + max(1, step))
        some = images.index_select(0, rows[chunk]).permute(0, 3, 1, 2).contiguous().to(torch.float32).mul_(1 / 255)
        for operation, where, chosen in _plan(active[chunk], values[chunk], device):
            if isinstance(where, slice):
                operation(some[where], chosen)
            else:
                some.index_copy_(0, where, operation(some.index_select(0, where), chosen))
        out.index_copy_(0, rows[chunk], some.sub_(mean).mul_(scale))
    return out.view(crops.shape)


def _order(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Which of ORDERS each crop has, -1 without jitter. (n, P) -> (n,)."""
    return np.where(values[:, JITTER] > 0, values[:, ORDER], -1).astype(np.int64)


def _active(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether each of STAGES changes each crop. (n, P) -> (n, 19)."""
    order = _order(values)
    changed = (order >= 0)[:, None] & (values[:, COLOUR_COLUMNS] != NEUTRAL)
    jitter = (ORDERS[order][:, :, None] == COLOUR_COLUMNS) & changed[:, None]  # (n, 4 places, 4 operations)
    return np.concatenate([jitter.reshape(-1, len(COLOUR_COLUMNS) ** 2), values[:, LAST_COLUMNS] > 0], axis=1)


Operation = Callable[[Tensor, Tensor], Tensor]
Step = tuple[Operation, slice | Tensor, Tensor]


def _plan(active: NDArray[np.bool_], values: NDArray[np.float32], device: torch.device) -> list[Step]:
    """The operations of some crops in the order of execution, each with its rows and their parameters on `device`.

    active (n, 19); values (n, P). Rows are on `device` as well, unless they lie side by side: then they are a slice.
    """
    stages, rows = np.nonzero(active.T)
    columns = STAGES[stages]
    # One transfer for all the rows and one for all the parameters.
    all_rows, all_chosen = _send(torch.from_numpy(rows), device), _send(torch.from_numpy(values[rows, columns]), device)
    starts = np.flatnonzero(np.diff(stages, prepend=-1)).tolist()
    steps: list[Step] = []
    for start, stop in itertools.pairwise([*starts, len(rows)]):
        first, last = int(rows[start]), int(rows[stop - 1])
        together = last - first < stop - start
        where = slice(first, last + 1) if together else all_rows[start:stop]
        steps.append((OPERATIONS[int(columns[start])], where, all_chosen[start:stop]))
    return steps


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """To `device`, from page-locked memory where that lets the copy run behind the host's back."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


# The operations change float images (n, C, H, W) of [0, 1] in place, each by its own value (n,), and return them.


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with black."""
    return images.mul_(factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with the mean grey of the image."""
    weights = factor.view(-1, 1, 1, 1)
    means = images.mean(dim=(2, 3), keepdim=True)
    return images.mul_(weights).add_(luma(means) * (1 - weights)).clamp_(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blends with the grey image. Three channels."""
    return images.lerp_(luma(images), 1 - factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue of HSV by `shift`, a share of the full circle between -0.5 and 0.5. Three channels.

    Angles are in sixths of the circle, between -3 and 3. There are no cases, which would cost most on a processor.
    """
    red, green, blue = images.unbind(1)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue).sub_(low)
    # From red it is 1 + (G + B - R - low) / chroma to the hue, towards green or towards blue. A grey pixel has any hue.
    distance = (green - red).add_(blue).sub_(low).div_(chroma.clamp_min(1e-12)).add_(1)
    angle = distance.copysign_(green - blue)
    # A channel is full within one sixth of its own colour and empty beyond two; the turn is counted from that colour.
    colours = torch.arange(0, 6, 2, device=images.device)
    turn = (6 * shift[:, None] - colours + 3).remainder_(6).sub_(3)
    share = torch.add(angle[:, None], turn[:, :, None, None], out=images).abs_().sub_(3).abs_().clamp_(1, 2)  # plus 1
    return share.mul_(chroma[:, None]).add_(low.sub_(chroma)[:, None])


def grey(images: Tensor, _: Tensor) -> Tensor:
    """Luma in every channel. Three channels."""
    return images.copy_(luma(images))


def luma(images: Tensor) -> Tensor:
    """(n, C, H, W) -> (n, 1, H, W): ITU-R 601-2 luma for three channels, the plain mean for any other number."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian of 9 taps, sampled at whole pixels, with reflected borders (torchvision's GaussianBlur).

    sigma in pixels. Borders repeat the edge where an image is too small to be reflected. Both directions are products
    with a band matrix, block by block of the band: half the time of sums over shifted images.
    """
    n, channels, height, width = images.shape
    kernels = torch.softmax(-0.5 * (_taps(images.device) / sigma[:, None]) ** 2, dim=1)  # (n, 9)
    kernels = F.threshold(kernels, 1e-12, 0)  # a processor takes a hundred times as long for denormal numbers
    vertical = _band(kernels, height)
    horizontal = vertical if width == height else _band(kernels, width)
    columns = torch.empty_like(images)
    for block, reach in _blocks(height):
        for channel in range(channels):  # a batch of all would need the matrices once for each of them
            torch.bmm(vertical[:, block, reach], images[:, channel, reach], out=columns[:, channel, block])
    rows, out = columns.view(n, -1, width), images.view(n, -1, width)
    for block, reach in _blocks(width):
        torch.bmm(rows[:, :, reach], horizontal.mT[:, reach, block], out=out[:, :, block])
    return images


def _blocks(size: int) -> list[tuple[slice, slice]]:
    """Blocks of a line of `size` pixels, each with the pixels that its blur looks at."""
    starts = range(0, size, BLUR_BLOCK)
    blocks = [slice(start, min(start + BLUR_BLOCK, size)) for start in starts]
    return [(b, slice(max(0, b.start - BLUR_RADIUS), min(b.stop + BLUR_RADIUS, size))) for b in blocks]


def _band(kernels: Tensor, size: int) -> Tensor:
    """(n, 9) -> (n, size, size): what of each pixel of a line goes into each pixel of the blurred line."""
    seen = _seen(size, kernels.device).expand(len(kernels), -1, -1)
    return kernels.new_zeros(len(kernels), size, size).scatter_add_(2, seen, kernels[:, None].expand(seen.shape))


def _taps(device: torch.device) -> Tensor:
    """(9,) distances from the middle of the kernel, in pixels."""
    return torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=device)


@lru_cache(maxsize=8)
def _seen(size: int, device: torch.device) -> Tensor:
    """(size, 9): the pixels of a line under the kernel at each of them; beyond its ends the reflected ones."""
    places = torch.arange(size, device=device)[:, None] + _taps(device)
    last = size - 1
    return last - (last - places.abs()).abs() if size > BLUR_RADIUS else places.clamp(0, last)


def solarise(images: Tensor, _: Tensor) -> Tensor:
    """Inverts what is 128 of 255 or more; the hair's breadth covers the rounding of x / 255."""
    return images.copy_(torch.where(images >= 127.999 / 255, 1 - images, images))


OPERATIONS: dict[int, Operation] = {
    BRIGHTNESS: brightness,
    CONTRAST: contrast,
    SATURATION: saturation,
    HUE: hue,
    GREY: grey,
    SIGMA: blur,
    SOLARISE: solarise,
}
