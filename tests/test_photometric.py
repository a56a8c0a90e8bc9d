"""Photometric augmentation against Pillow and float64 references, one operation at a time."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dinoreg.config import ConfigError
from dinoreg.data import photometric as ph
from dinoreg.data.batch import Batch
from dinoreg.data.counter import Purpose, generator

LEVEL = 1 / 255
PLAIN = {"mean": [0.0] * 3, "std": [1.0] * 3}


@pytest.fixture(scope="module")
def photo() -> NDArray[np.uint8]:
    """A photo-like image (40, 56, 3) with every grey level, saturated corners and noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :56] / 40
    image = np.stack([127 + 127 * np.sin(3 * x + c) * np.cos(2 * y + c) for c in range(3)], axis=2)
    image[:8, :8] = [255, 0, 0]
    image[-8:, -8:] = [0, 0, 0]
    image[:8, -8:] = [255, 255, 255]
    return np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)


def to_tensor(image: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].contiguous().float() / 255


def from_pillow(image: Image.Image) -> torch.Tensor:
    return to_tensor(np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.37])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ph.brightness, ImageEnhance.Brightness),
        (ph.contrast, ImageEnhance.Contrast),
        (ph.saturation, ImageEnhance.Color),
    ],
)
def test_jitter_agrees_with_pillow(photo, ours, theirs, factor) -> None:
    """Pillow cuts to whole levels (and rounds the grey it blends with), so up to 1.5 levels are its own."""
    out = ours(to_tensor(photo), torch.tensor([factor]))
    expected = from_pillow(theirs(Image.fromarray(photo)).enhance(factor))
    assert (out - expected).abs().max() <= 1.51 * LEVEL
    assert (out - expected).mean().abs() < 0.6 * LEVEL


def test_grey_agrees_with_pillow(photo) -> None:
    expected = from_pillow(ImageOps.grayscale(Image.fromarray(photo)))
    assert (ph.grey(to_tensor(photo), torch.ones(1)) - expected).abs().max() <= 0.51 * LEVEL


def test_solarise_is_pillows(photo) -> None:
    expected = from_pillow(ImageOps.solarize(Image.fromarray(photo), 128))
    torch.testing.assert_close(ph.solarise(to_tensor(photo), torch.ones(1)), expected, rtol=0, atol=1e-6)
    ramp = torch.arange(256).view(1, 1, 1, 256).expand(1, 3, 1, 256) / 255
    inverted = ph.solarise(ramp.clone(), torch.ones(1))[0, 0, 0] != ramp[0, 0, 0]
    assert inverted.nonzero()[0].item() == 128 and inverted[128:].all()


@pytest.mark.parametrize("steps", [-127, -25, 7, 25, 127])
def test_hue_agrees_with_colorsys_and_pillow(photo, steps) -> None:
    shift = steps / 255
    out = ph.hue(to_tensor(photo), torch.tensor([shift], dtype=torch.float32))[0]
    exact = np.empty(photo.shape)
    for place in np.ndindex(photo.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*(photo[place] / 255))
        exact[place] = colorsys.hsv_to_rgb((h + shift) % 1, s, v)
    np.testing.assert_allclose(out.permute(1, 2, 0).numpy(), exact, atol=2e-5)
    # Pillow holds hue and saturation in 8 bits each, which costs it several levels.
    hue, saturation, value = Image.fromarray(photo).convert("HSV").split()
    turned = Image.fromarray((np.asarray(hue).astype(int) + steps).astype(np.uint8))
    difference = (out - from_pillow(Image.merge("HSV", (turned, saturation, value)).convert("RGB"))[0]).abs()
    assert difference.mean() < 1.5 * LEVEL and difference.max() < 12 * LEVEL


@pytest.mark.parametrize("block", [1, 16, 56])
@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 2.0])
def test_blur_is_the_nine_tap_gaussian(monkeypatch, photo, sigma, block) -> None:
    monkeypatch.setattr(ph, "BLUR_BLOCK", block)
    kernel = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(photo / 255.0, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    expected = np.zeros(photo.shape)
    for i, j in np.ndindex(9, 9):
        expected += kernel[i] * kernel[j] * padded[i : i + photo.shape[0], j : j + photo.shape[1]]
    out = ph.blur(to_tensor(photo), torch.tensor([sigma]))[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_blur_looks_like_pillows(photo) -> None:
    out = ph.blur(to_tensor(photo), torch.tensor([1.5]))
    expected = from_pillow(Image.fromarray(photo).filter(ImageFilter.GaussianBlur(1.5)))
    assert (out - expected)[..., 6:-6, 6:-6].abs().mean() < 1.5 * LEVEL  # theirs is made of boxes


def test_blur_of_an_image_smaller_than_the_kernel() -> None:
    flat = torch.full((1, 3, 3, 4), 0.25)
    torch.testing.assert_close(ph.blur(flat.clone(), torch.tensor([2.0])), flat)


def make_batch(photometric: torch.Tensor, channels: int = 3, size: int = 24, seed: int = 0) -> Batch:
    count, crops = photometric.shape[:2]
    g = torch.Generator().manual_seed(seed)
    big = torch.randint(0, 256, (count, 2, channels, size, size), generator=g, dtype=torch.uint8)
    small = torch.randint(0, 256, (count, crops - 2, channels, 10, 12), generator=g, dtype=torch.uint8)
    masks = torch.rand(count, 2, 16, generator=g) < 0.3
    return Batch(big, small, photometric, masks, torch.arange(count))


def draw_many(cfg: ph.PhotometricConfig, count: int, channels: int = 3, locals_: int = 3) -> torch.Tensor:
    drawn = [ph.draw(cfg, generator(0, Purpose.PHOTOMETRIC, i), channels, locals_) for i in range(count)]
    return torch.from_numpy(np.stack(drawn))


def one_by_one(crop: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The recipe for one crop (C, H, W), operation after operation."""
    image = crop[None].float() / 255
    if values[ph.JITTER] > 0:
        for column in ph.ORDERS[int(values[ph.ORDER])].tolist():
            image = ph.OPERATIONS[column](image.clone(), values[column].view(1))
    if values[ph.GREY] > 0:
        image = ph.grey(image, torch.ones(1)).clone()
    if values[ph.SIGMA] > 0:
        image = ph.blur(image, values[ph.SIGMA].view(1))
    return (ph.solarise(image, torch.ones(1)) if values[ph.SOLARISE] > 0 else image)[0]


@pytest.mark.parametrize("cache", [1, 8 * 2**20])
def test_develop_gives_each_crop_its_own_parameters(monkeypatch, cache) -> None:
    monkeypatch.setattr(ph, "CACHE_BYTES", cache)
    cfg = ph.PhotometricConfig(**PLAIN, solarise=(0.5, 0.5, 0.5), grey=0.3, blur=(0.5, 0.5, 0.5))
    batch = make_batch(draw_many(cfg, 40))
    crops = ph.develop(batch, cfg)
    for i in range(len(batch)):
        for j in range(2):
            expected = one_by_one(batch.global_crops[i, j], batch.photometric[i, j])
            torch.testing.assert_close(crops.global_crops[i, j], expected, rtol=0, atol=1e-5)
        for j in range(3):
            expected = one_by_one(batch.local_crops[i, j], batch.photometric[i, 2 + j])
            torch.testing.assert_close(crops.local_crops[i, j], expected, rtol=0, atol=1e-5)
    assert torch.equal(crops.masks.flatten().nonzero()[:, 0], crops.masked_index)


def test_develop_normalises_and_keeps_its_input() -> None:
    cfg = ph.PhotometricConfig(jitter=0, grey=0, blur=(0, 0, 0), solarise=(0, 0, 0))
    batch = make_batch(draw_many(cfg, 2))
    before = batch.global_crops.clone()
    out = ph.develop(batch, cfg).global_crops
    mean, std = torch.tensor(cfg.mean).view(3, 1, 1), torch.tensor(cfg.std).view(3, 1, 1)
    torch.testing.assert_close(out, (before / 255 - mean) / std)
    assert torch.equal(batch.global_crops, before)


def test_no_local_crops_develop_to_none() -> None:
    cfg = ph.PhotometricConfig()
    assert ph.develop(make_batch(draw_many(cfg, 2, locals_=0)), cfg).local_crops.shape == (2, 0, 3, 10, 12)


def test_split_batches_develop_to_the_same_crops() -> None:
    cfg = ph.PhotometricConfig()
    batch = make_batch(draw_many(cfg, 8))
    whole, parts = ph.develop(batch, cfg), [ph.develop(part, cfg) for part in batch.split(4)]
    torch.testing.assert_close(torch.cat([part.global_crops for part in parts]), whole.global_crops)
    torch.testing.assert_close(torch.cat([part.local_crops for part in parts]), whole.local_crops)


def test_frequencies_and_ranges_of_the_draws() -> None:
    """4000 images: each probability within four standard deviations."""
    cfg = ph.PhotometricConfig()
    drawn = draw_many(cfg, 4000, locals_=2).numpy()

    def expect(share: float, probability: float, count: int) -> None:
        assert abs(share - probability) <= 4 * np.sqrt(probability * (1 - probability) / count)

    expect(drawn[..., ph.JITTER].mean(), 0.8, 16000)
    expect(drawn[..., ph.GREY].mean(), 0.2, 16000)
    for crop, (blur, solarise) in enumerate([(0.0, 0.0), (0.9, 0.2), (0.5, 0.0), (0.5, 0.0)]):
        expect((drawn[:, crop, ph.SIGMA] > 0).mean(), blur, 4000)
        expect(drawn[:, crop, ph.SOLARISE].mean(), solarise, 4000)
    for column, low, high in ((ph.BRIGHTNESS, 0.6, 1.4), (ph.SATURATION, 0.8, 1.2), (ph.HUE, -0.1, 0.1)):
        values = drawn[..., column]
        assert low <= values.min() < low + 0.01 and high - 0.01 < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 4 * (high - low) / np.sqrt(12 * 16000)
    sigmas = drawn[..., ph.SIGMA][drawn[..., ph.SIGMA] > 0]
    assert 0.1 <= sigmas.min() < 0.11 and 1.99 < sigmas.max() <= 2.0
    assert np.bincount(drawn[..., ph.ORDER].astype(int).ravel(), minlength=24).min() > 500


def test_the_number_of_local_crops_does_not_change_the_global_ones() -> None:
    cfg = ph.PhotometricConfig()
    few, many = draw_many(cfg, 3, locals_=1), draw_many(cfg, 3, locals_=6)
    assert torch.equal(few[:, :2], many[:, :2])


@pytest.mark.parametrize("channels", [1, 5])
def test_other_numbers_of_channels_get_no_colour_operations(channels) -> None:
    cfg = ph.PhotometricConfig(mean=[0.5] * channels, std=[0.25] * channels, grey=1.0)
    drawn = draw_many(cfg, 50, channels)
    assert (drawn[..., ph.SATURATION] == 1).all() and (drawn[..., ph.HUE] == 0).all()
    assert (drawn[..., ph.GREY] == 0).all() and (drawn[..., ph.BRIGHTNESS] != 1).any()
    drawn[..., ph.JITTER] = 0
    assert ph.develop(make_batch(drawn, channels), cfg).global_crops.shape[2] == channels
    with pytest.raises(ValueError, match=f"3 entries, but the images have {channels} channels"):
        ph.develop(make_batch(drawn, channels), ph.PhotometricConfig())


def test_jitter_of_one_channel_does_not_fail() -> None:
    cfg = ph.PhotometricConfig(mean=[0.0], std=[1.0], jitter=1.0, blur=(0, 0, 0), solarise=(0, 0, 0))
    batch = make_batch(draw_many(cfg, 6, channels=1), channels=1)
    out = ph.develop(batch, cfg).global_crops
    assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1
    assert not torch.equal(out, batch.global_crops / 255)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"grey": 1.2}, "grey"),
        ({"blur": (0, 2, 0)}, "blur"),
        ({"hue": 0.6}, "hue"),
        ({"contrast": -0.1}, "contrast"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma"),
        ({"std": [0.2]}, "std"),
        ({"std": [0.2, 0.2, 0.0]}, "std"),
    ],
)
def test_impossible_values_are_refused(change, key) -> None:
    with pytest.raises(ConfigError) as caught:
        ph.PhotometricConfig(**change).check()
    assert caught.value.key == key
