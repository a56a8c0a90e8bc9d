"""Photometric augmentation: parameters drawn on the host, applied to batches on the device.

Every operation follows Pillow's definition (the one torchvision applies to PIL images), in float and with the clamp
that 8-bit storage implies, but without its rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

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
COLOUR_COLUMNS = (BRIGHTNESS, CONTRAST, SATURATION, HUE)
NEUTRAL = {BRIGHTNESS: 1.0, CONTRAST: 1.0, SATURATION: 1.0, HUE: 0.0}
ORDERS = torch.tensor(list(itertools.permutations(COLOUR_COLUMNS)))  # (24, 4)
BLUR_RADIUS = 4  # a kernel of 9 taps
CACHE_BYTES = 8 * 2**20  # of float crops that a CPU works on at a time
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
    images = crops.flatten(0, 1).to(torch.float32)
    values = parameters.flatten(0, 1)
    mean, std = _send(torch.tensor([cfg.mean, cfg.std]), images.device).view(2, -1, 1, 1)
    # A processor is twice as fast on as many crops as its cache holds; a GPU wants them all at once.
    step = len(images) if images.is_cuda else max(1, CACHE_BYTES // max(1, 4 * images[:1].numel()))
    for start in range(0, len(images), max(1, step)):
        some = images[start : start + step].div_(255)
        for operation, rows, chosen in _plan(values[start : start + step], images.device):
            some.index_copy_(0, rows, operation(some.index_select(0, rows), chosen))
        some.sub_(mean).div_(std)
    return images.view(crops.shape)


Operation = Callable[[Tensor, Tensor], Tensor]


def _plan(parameters: Tensor, device: torch.device) -> list[tuple[Operation, Tensor, Tensor]]:
    """The operations in the order of execution, each with its rows and their parameters, on `device`."""
    order = ORDERS[parameters[:, ORDER].long()]  # (n, 4)
    jittered = parameters[:, JITTER] > 0
    stages: list[tuple[Operation, int, Tensor]] = []
    for place in range(len(COLOUR_COLUMNS)):
        for column in COLOUR_COLUMNS:
            here = jittered & (order[:, place] == column) & (parameters[:, column] != NEUTRAL[column])
            stages.append((OPERATIONS[column], column, here))
    for column in (GREY, SIGMA, SOLARISE):
        stages.append((OPERATIONS[column], column, parameters[:, column] > 0))
    chosen = [(operation, column, torch.nonzero(mask)[:, 0]) for operation, column, mask in stages]
    sizes = [len(rows) for _, _, rows in chosen]
    # One transfer for all the rows and one for all the parameters.
    all_rows = _send(torch.cat([rows for _, _, rows in chosen]), device).split(sizes)
    all_values = _send(torch.cat([parameters[rows, column] for _, column, rows in chosen]), device).split(sizes)
    return [(chosen[i][0], all_rows[i], all_values[i]) for i in range(len(chosen)) if sizes[i]]


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """To `device`, from page-locked memory where that lets the copy run behind the host's back."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with black. images (n, C, H, W) in [0, 1], changed in place; factor (n,)."""
    return images.mul_(factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean grey of the image. images (n, C, H, W), changed in place; factor (n,)."""
    weights = factor.view(-1, 1, 1, 1)
    means = images.mean(dim=(2, 3), keepdim=True)
    return images.mul_(weights).add_(luma(means) * (1 - weights)).clamp_(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey image. images (n, 3, H, W), changed in place; factor (n,)."""
    weights = factor.view(-1, 1, 1, 1)
    grey_part = luma(images).mul_(1 - weights)
    return images.mul_(weights).add_(grey_part).clamp_(0, 1)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue of HSV by `shift` (n,), a share of the full circle. images (n, 3, H, W)."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    # Hue in sixths of the circle; a grey pixel keeps any hue, for its chroma is 0.
    inverse = chroma.clamp_min(1e-12).reciprocal_()
    sixths = torch.where(
        value == red,
        (green - blue) * inverse,
        torch.where(value == green, (blue - red) * inverse + 2, (red - green) * inverse + 4),
    )
    sixths = sixths + 6 * shift.view(-1, 1, 1)
    # HSV to RGB without cases: channel = V - chroma * clamp(min(k, 4 - k), 0, 1), k = (n + sixths) mod 6, n = 5, 3, 1.
    offsets = torch.arange(5, 0, -2, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    k = (sixths[:, None] + offsets).remainder_(6)
    distance = torch.minimum(k, 4 - k).clamp_(0, 1)
    return torch.addcmul(value[:, None], distance, chroma[:, None], value=-1)


def grey(images: Tensor, _: Tensor) -> Tensor:
    """Luma in every channel. images (n, 3, H, W)."""
    return luma(images).expand_as(images)


def luma(images: Tensor) -> Tensor:
    """(n, C, H, W) -> (n, 1, H, W): ITU-R 601-2 luma for three channels, the plain mean for any other number."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian of 9 taps, sampled at whole pixels, with reflected borders (torchvision's GaussianBlur).

    images (n, C, H, W); sigma (n,) in pixels. Borders repeat the edge where an image is too small to be reflected.
    """
    taps = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=images.device, dtype=images.dtype)
    kernels = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    kernels = kernels / kernels.sum(1, keepdim=True)  # (n, 9)
    return _filter_rows(_filter_rows(images, kernels, dim=3), kernels, dim=2)


def _filter_rows(images: Tensor, kernels: Tensor, dim: int) -> Tensor:
    """Correlates along `dim` with each image's own symmetric kernel, as a sum of shifted copies."""
    size = images.shape[dim]
    margin = [BLUR_RADIUS, BLUR_RADIUS, 0, 0] if dim == 3 else [0, 0, BLUR_RADIUS, BLUR_RADIUS]
    padded = F.pad(images, margin, mode="reflect" if size > BLUR_RADIUS else "replicate")
    weights = kernels.view(-1, 2 * BLUR_RADIUS + 1, 1, 1, 1)
    out = padded.narrow(dim, BLUR_RADIUS, size) * weights[:, BLUR_RADIUS]
    for shift in range(BLUR_RADIUS):
        pair = padded.narrow(dim, shift, size) + padded.narrow(dim, 2 * BLUR_RADIUS - shift, size)
        out.addcmul_(pair, weights[:, shift])
    return out


def solarise(images: Tensor, _: Tensor) -> Tensor:
    """Inverts what is 128 of 255 or more; the hair's breadth covers the rounding of x / 255."""
    return torch.where(images >= 127.999 / 255, 1 - images, images)


OPERATIONS: dict[int, Operation] = {
    BRIGHTNESS: brightness,
    CONTRAST: contrast,
    SATURATION: saturation,
    HUE: hue,
    GREY: grey,
    SIGMA: blur,
    SOLARISE: solarise,
}
