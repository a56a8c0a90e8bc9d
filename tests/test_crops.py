"""Decoding of every kind of image, and the geometry of crops."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dinoreg.config import ConfigError
from dinoreg.data import images as im
from dinoreg.data.counter import Purpose, generator
from dinoreg.data.crops import CropConfig, allowed_shrink, cut, draw_boxes, resize_box
from dinoreg.data.images import BadImage, open_picture


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture whose four corners differ, so that every turn of it shows."""
    y, x = np.mgrid[:height, :width]
    x, y = x / width, y / height
    rng = np.random.default_rng(seed)
    waves = np.sin(9 * x + rng.uniform(0, 6)) * np.cos(7 * y + rng.uniform(0, 6))
    pixels = np.stack([255 * x, 255 * y, 127 + 120 * waves], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def decode(data: bytes, channels: int = 3, shrink: int = 1) -> np.ndarray:
    """(H, W, C)."""
    return open_picture(data, channels).decode(shrink).permute(1, 2, 0).numpy()


def test_rgb_is_exact_and_interleaved() -> None:
    picture = open_picture(encode(scene(31, 22)))
    pixels = picture.decode()
    assert (picture.width, picture.height, pixels.dtype) == (31, 22, torch.uint8)
    assert pixels.stride() == (1, 93, 3)
    assert np.array_equal(pixels.permute(1, 2, 0), scene(31, 22))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "RGBA", "LA"])
def test_other_modes_come_out_as_pillow_shows_them(mode) -> None:
    image = scene(40, 30).convert(mode)
    kind = {"CMYK": "TIFF", "YCbCr": "TIFF"}.get(mode, "PNG")
    assert np.array_equal(decode(encode(image, kind)), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg() -> None:
    data = encode(scene(40, 30).convert("CMYK"), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode(data), expected)


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (4, 2), (200, 0, 0, 255))
    image.putpixel((0, 0), (200, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 51))  # a fifth
    out = decode(encode(image))
    assert out[0, 0].tolist() == [255, 255, 255]
    assert out[0, 1].tolist() == [204, 204, 204]
    assert out[0, 2].tolist() == [200, 0, 0]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert decode(encode(palette, transparency=0)).tolist() == [[[255] * 3, [40, 50, 60]]]


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    data = encode(Image.fromarray(values))
    assert decode(data)[0, :, 0].tolist() == [0, 1, 100, 255]
    assert decode(data, channels=1).shape == (1, 4, 1)


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (5, 4), colour) for colour in ((9, 9, 9), (200, 0, 0))]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data)[0, 0].tolist() == [9, 9, 9]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shrink", [1, 2])
def test_exif_rotations(orientation, shrink) -> None:
    exif = Image.Exif()
    exif[im.ORIENTATION] = orientation
    data = encode(scene(64, 48), "JPEG", exif=exif, quality=95)
    stored = Image.open(io.BytesIO(data))
    if shrink > 1:
        stored.draft("RGB", (32, 24))
    expected = np.asarray(ImageOps.exif_transpose(stored))
    picture = open_picture(data)
    assert np.array_equal(decode(data, shrink=shrink), expected)
    assert (picture.width // shrink, picture.height // shrink) == (expected.shape[1], expected.shape[0])


@pytest.mark.parametrize("size", [(640, 480), (333, 251), (64, 97)])
@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_a_shrunk_jpeg_is_the_same_picture(size, shrink) -> None:
    data = encode(scene(*size), "JPEG", quality=95)
    small = decode(data, shrink=shrink)
    assert small.shape[:2] == (math.ceil(size[1] / shrink), math.ceil(size[0] / shrink))
    # A pixel stands for shrink x shrink of the image's, the last ones for what the format repeats beyond the border.
    padding = [(0, small.shape[i] * shrink - size[1 - i]) for i in range(2)]
    padded = Image.fromarray(np.pad(np.asarray(scene(*size)), [*padding, (0, 0)], mode="edge"))
    reference = np.asarray(padded.resize(small.shape[1::-1], Image.Resampling.BOX))
    assert np.abs(small.astype(int) - reference).mean() < 2.5


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"restart_marker_blocks": 3}, "grey"]
)
@pytest.mark.parametrize("size", [(300, 200), (61, 39), (9, 17), (1, 1)])
def test_jpegs_are_bit_for_bit_pillows(options, size) -> None:
    picture, options = (scene(*size).convert("L"), {}) if options == "grey" else (scene(*size), options)
    data = encode(picture, "JPEG", quality=80, **options)
    for shrink in (each for each in (1, 2, 4, 8) if each <= min(size)):
        opened = open_picture(data)
        assert im._decode_jpeg(data, opened.content, 3, shrink) is not None
        theirs = Image.open(io.BytesIO(data))
        theirs.draft(theirs.mode, (size[0] // shrink, size[1] // shrink))
        assert np.array_equal(decode(data, shrink=shrink), theirs.convert("RGB"))
        if picture.mode == "L":
            assert np.array_equal(decode(data, 1, shrink)[:, :, 0], theirs)


def test_what_is_odd_about_a_jpeg_is_left_to_pillow(monkeypatch) -> None:
    """Damaged, cut and unusual files: the same pixels or the same reason as without the faster decoder."""
    plain = [encode(scene(60, 40), "JPEG", progressive=progressive) for progressive in (False, True)]
    files = [encode(scene(60, 40).convert("CMYK"), "JPEG"), *plain]
    for number in range(300):
        rng, data = np.random.default_rng(number), bytearray(plain[number % 2])
        data[rng.integers(len(data))] = rng.integers(256)
        files.append(bytes(data[: rng.integers(400, len(data))] if number % 3 else data))

    def outcome(data: bytes) -> tuple[str, bytes]:
        try:
            return "pixels", decode(data).tobytes()
        except BadImage as error:
            return error.reason, b""

    found = [outcome(data) for data in files]
    monkeypatch.setattr(im, "_decode_jpeg", lambda *_: None)
    assert found == [outcome(data) for data in files]
    assert all(kind == "pixels" for kind, _ in found[:3]) and {"pixels", "truncated"} < {kind for kind, _ in found}


def test_the_first_of_several_pictures_in_a_jpeg() -> None:
    """As telephones write them (MPO)."""
    data = encode(scene(64, 48), "MPO", save_all=True, append_images=[scene(64, 48, seed=1)])
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data))))
    assert decode(data, shrink=2).shape == (24, 32, 3)


def test_twenty_megapixels_are_decoded_small() -> None:
    data = encode(scene(342, 228).resize((5472, 3648)), "JPEG", quality=60)
    picture = open_picture(data)
    boxes = draw_boxes(CropConfig(), generator(0, Purpose.CROP, 0), picture.width, picture.height).boxes
    assert allowed_shrink(CropConfig(), boxes) == 8
    assert picture.decode(8).shape == (3, 456, 684)


def test_reasons() -> None:
    good = encode(scene(200, 150), "JPEG")
    png = encode(scene(200, 150))
    cases = {
        b"": "empty",
        b"this is no image at all": "not-an-image",
        good[: len(good) // 2]: "truncated",
        png[: len(png) // 2]: "truncated",
        png[:20]: "truncated",
    }
    for data, reason in cases.items():
        with pytest.raises(BadImage) as caught:
            open_picture(data).decode()
        assert caught.value.reason == reason and reason in im.REASONS


def test_damage_of_every_kind_has_a_reason() -> None:
    """Random bytes overwritten: either an image or a reason, never another exception."""
    originals = [encode(scene(60, 40), kind) for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP")]
    originals.append(_npy(np.zeros((5, 6, 3), dtype=np.uint8)))
    seen = set()
    for number in range(400):
        rng = np.random.default_rng(number)
        data = bytearray(originals[number % len(originals)])
        for place in rng.integers(0, min(len(data), 300), 4):
            data[place] = rng.integers(256)
        try:
            open_picture(bytes(data)).decode()
        except BadImage as error:
            seen.add(error.reason)
    assert seen <= set(im.REASONS) and len(seen) > 1


def test_a_decompression_bomb_is_refused_by_its_header(monkeypatch) -> None:
    monkeypatch.setattr(im, "MAX_PIXELS", 5000)
    with pytest.raises(BadImage, match="100 x 60") as caught:
        open_picture(encode(scene(100, 60)))
    assert caught.value.reason == "too-large"


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 13])
def test_arrays_of_any_number_of_channels(channels) -> None:
    values = np.random.default_rng(0).integers(0, 256, (9, 14, channels), dtype=np.uint8)
    assert np.array_equal(decode(_npy(values), channels), values)
    assert np.array_equal(decode(_npy(np.moveaxis(values, 2, 0)), channels), values)
    assert np.array_equal(decode(_npy(values.astype(np.uint16) * 257), channels), values)
    assert np.array_equal(decode(_npy(values / np.float32(255)), channels), values)
    with pytest.raises(BadImage) as caught:
        open_picture(_npy(values), 7)
    assert caught.value.reason == "wrong-channels"


def test_a_tiff_of_many_bands() -> None:
    tifffile = pytest.importorskip("tifffile")
    values = np.random.default_rng(0).integers(0, 65536, (6, 9, 11), dtype=np.uint16)
    out = io.BytesIO()
    tifffile.imwrite(out, values, photometric="minisblack")
    assert np.array_equal(decode(out.getvalue(), 6), np.rint(values / 257).transpose(1, 2, 0))


def test_grey_is_pillows_luma_and_rgba_can_be_kept() -> None:
    image = scene(20, 10)
    assert np.array_equal(decode(encode(image), 1)[:, :, 0], np.asarray(image.convert("L")))
    rgba = image.convert("RGBA")
    assert np.array_equal(decode(encode(rgba), 4), np.asarray(rgba))


def reference_box(cfg: CropConfig, u: np.ndarray, scale: tuple[float, float], width: int, height: int) -> list[int]:
    """RandomResizedCrop, try after try, from one crop's uniform numbers."""
    for attempt in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * u[attempt])
        low, high = math.log(cfg.aspect[0]), math.log(cfg.aspect[1])
        aspect = math.exp(low + (high - low) * u[10 + attempt])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(u[20] * (width - w + 1)), int(u[21] * (height - h + 1)), w, h]
    if width / height < cfg.aspect[0]:
        w, h = width, max(1, round(width / cfg.aspect[0]))
    elif width / height > cfg.aspect[1]:
        w, h = max(1, round(height * cfg.aspect[1])), height
    else:
        w, h = width, height
    return [(width - w) // 2, (height - h) // 2, w, h]


@pytest.mark.parametrize("size", [(500, 375), (68, 224), (1, 1), (1, 300), (900, 40), (33, 32)])
def test_boxes_are_random_resized_crops(size) -> None:
    cfg = CropConfig()
    for number in range(100):
        drawn = draw_boxes(cfg, generator(5, Purpose.CROP, number), *size)
        u = generator(5, Purpose.CROP, number).random((10, 23))
        for i in range(10):
            scale = cfg.global_scale if i < 2 else cfg.local_scale
            assert drawn.boxes[i].tolist() == reference_box(cfg, u[i], scale, *size)
            assert drawn.flips[i] == (u[i, 22] < 0.5)
        left, top, w, h = drawn.boxes.T
        assert (w > 0).all() and (h > 0).all() and (left >= 0).all() and (top >= 0).all()
        assert (left + w <= size[0]).all() and (top + h <= size[1]).all()


def test_scales_and_places_are_uniform() -> None:
    cfg = CropConfig()
    drawn = [draw_boxes(cfg, generator(0, Purpose.CROP, i), 1000, 1000) for i in range(2000)]
    boxes = np.stack([d.boxes for d in drawn]).astype(float)
    areas = boxes[..., 2] * boxes[..., 3] / 1e6
    local = areas[:, 2:]
    assert abs(local.mean() - (0.05 + 0.32) / 2) < 4 * 0.27 / math.sqrt(12 * local.size)
    assert local.min() > 0.045 and local.max() < 0.33 and areas[:, :2].max() <= 1.0
    place = boxes[:, 2:, 0] / (1000 - boxes[:, 2:, 2])
    assert abs(place.mean() - 0.5) < 4 / math.sqrt(12 * place.size)
    flips = np.stack([d.flips for d in drawn])
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / math.sqrt(flips.size)


@pytest.mark.parametrize(("box", "size"), [((20, 10, 300, 260), 224), ((5, 7, 120, 130), 98), ((40, 50, 30, 20), 98)])
def test_resizing_agrees_with_pillow(box, size) -> None:
    image = scene(400, 300)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    left, top, width, height = box
    ours = resize_box(pixels, list(box), size).permute(1, 2, 0).numpy().astype(int)
    theirs = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
    assert np.abs(ours - np.asarray(theirs)).max() <= 2
    assert (np.abs(ours - np.asarray(theirs)) > 1).mean() < 1e-3


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(500, 375), (68, 224), (2400, 1800)])
def test_crops_show_their_boxes(kind, size) -> None:
    """Flipped, at whatever scale the image was decoded: each crop is its box of the full image."""
    cfg = CropConfig(global_size=56, local_size=28, local_count=3)
    image = scene(*size)
    global_out = torch.zeros(2, 3, 56, 56, dtype=torch.uint8)
    local_out = torch.zeros(3, 3, 28, 28, dtype=torch.uint8)
    options = {"quality": 95} if kind == "JPEG" else {}
    cut(cfg, open_picture(encode(image, kind, **options)), generator(1, Purpose.CROP, 7), global_out, local_out)
    drawn = draw_boxes(cfg, generator(1, Purpose.CROP, 7), *size)
    for i, out in enumerate((*global_out, *local_out)):
        left, top, w, h = drawn.boxes[i].tolist()
        expected = image.crop((left, top, left + w, top + h)).resize(out.shape[1:], Image.Resampling.BICUBIC)
        expected = ImageOps.mirror(expected) if drawn.flips[i] else expected
        difference = np.abs(out.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected))
        assert difference.mean() < 4 and difference.max() < 60


def test_no_crop_is_enlarged_by_a_small_decoding() -> None:
    cfg = CropConfig(global_size=100, local_size=50, local_count=1)
    assert allowed_shrink(cfg, np.array([[0, 0, 400, 400], [0, 0, 400, 500], [0, 0, 200, 200]])) == 4
    assert allowed_shrink(cfg, np.array([[0, 0, 400, 400], [0, 0, 400, 500], [0, 0, 199, 200]])) == 2
    assert allowed_shrink(cfg, np.array([[0, 0, 9, 9], [0, 0, 400, 500], [0, 0, 199, 200]])) == 1


def test_real_images_of_every_sort(shared_data) -> None:
    """One image a class of ImageNet: grey ones and one 68 pixels wide among them."""
    cfg = CropConfig(global_size=32, local_size=16, local_count=2)
    files = sorted((shared_data / "pretrain_imagenet1k_1perclass").rglob("*.*"))
    narrow = 0
    for number, file in enumerate(files):
        if file.suffix.lower() not in (".jpg", ".jpeg"):
            continue
        picture = open_picture(file.read_bytes())
        narrow += picture.width == 68
        out = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
        cut(cfg, picture, generator(0, Purpose.CROP, number), *out)
        assert out[0].float().std() > 0
    assert narrow == 1


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"global_size": 0}, "global_size"),
        ({"local_scale": (0.5, 0.2)}, "local_scale"),
        ({"global_scale": (0.0, 1.0)}, "global_scale"),
        ({"local_count": -1}, "local_count"),
        ({"aspect": (2.0, 1.0)}, "aspect"),
        ({"flip": 1.1}, "flip"),
    ],
)
def test_impossible_values_are_refused(change, key) -> None:
    with pytest.raises(ConfigError) as caught:
        CropConfig(**change).check()
    assert caught.value.key == key
