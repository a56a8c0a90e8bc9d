"""Images that are damaged or made to fill the memory: a named reason, from the header, before anything is decoded."""

from __future__ import annotations

import io
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from dinoreg.data import images as im
from dinoreg.data.images import REASONS, BadImage, open_picture
from dinoreg.data.stored import Folder

SIDE = 100_000  # pixels; 10^10 of them are claimed by files of a few bytes


def reason(data: bytes, channels: int = 3) -> str:
    with pytest.raises(BadImage) as caught:
        open_picture(data, channels).decode()
    assert caught.value.reason in REASONS
    return caught.value.reason


def grown_by(work: Callable[[], object]) -> float:
    """MiB that the process was ever larger during the work than before it; what libraries take in C counts too."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of the memory cannot be set back here")
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def encode(kind: str, **options: object) -> bytearray:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return bytearray(out.getvalue())


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, extra: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def put(data: bytearray, place: int, value: bytes) -> bytes:
    return bytes(data[:place] + value + data[place + len(value) :])


def tiff(**tags: int) -> bytes:
    """A TIFF of one band with some of its header's numbers exchanged."""
    out = io.BytesIO()
    tifffile.imwrite(out, np.zeros((24, 20), dtype=np.uint8), photometric="minisblack", metadata=None)
    data = bytearray(out.getvalue())
    numbers = {"width": 256, "height": 257, "rows": 278}
    start = struct.unpack("<I", data[4:8])[0]
    for place in range(start + 2, start + 2 + 12 * struct.unpack("<H", data[start : start + 2])[0], 12):
        for name, value in tags.items():
            if struct.unpack("<H", data[place : place + 2])[0] == numbers[name]:
                data[place + 2 : place + 12] = struct.pack("<HII", 4, 1, value)
    return bytes(data)


def npy(shape: object, dtype: str = "|u1", data: bytes = b"") -> bytes:
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head + data


@cache
def huge() -> dict[str, tuple[bytes, int, str]]:
    """Name -> (file, channels, expected reason) of small files that would need much more than a gigabyte."""
    gif, jp2, webp, bmp = (encode(kind) for kind in ("GIF", "JPEG2000", "WEBP", "BMP"))
    frame, box, code = gif.index(b",\0\0\0\0"), jp2.index(b"ihdr"), jp2.index(b"\xff\x4f")
    packed = zlib.compress(b"\0" * 2**28)
    return {
        "png": (png(SIDE, SIDE), 3, "too-large"),
        "png text": (png(4, 4, chunk(b"zTXt", b"k\0\0" + packed)), 3, "too-large"),
        "png unicode text": (png(4, 4, chunk(b"iTXt", b"k\0\1\0\0\0" + packed)), 3, "too-large"),
        "png profile": (png(4, 4, chunk(b"iCCP", b"k\0\0" + packed)), 3, "too-large"),
        "png texts": (png(4, 4, chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 900_000)) * 100), 3, "too-large"),
        "gif": (put(gif, 6, b"\xff" * 4), 3, "too-large"),
        "gif frame": (put(gif, frame + 5, b"\xff" * 4), 3, "too-large"),
        "webp": (put(webp, 26, b"\xff\x3f\xff\x3f"), 3, "too-large"),
        "bmp": (put(bmp, 18, struct.pack("<ii", SIDE, SIDE)), 3, "too-large"),
        "ppm": (b"P6 %d %d 255\n" % (SIDE, SIDE), 3, "too-large"),
        "jp2": (put(jp2, box + 4, struct.pack(">II", SIDE, SIDE)), 3, "too-large"),
        "j2k": (put(jp2[code:], 8, struct.pack(">II", SIDE, SIDE)), 3, "too-large"),
        "tiff": (tiff(width=SIDE, height=SIDE), 3, "too-large"),
        "tiff bands": (tiff(width=SIDE, height=SIDE), 5, "too-large"),
        "tiff bomb": (inflated_tiff(), 5, "too-large"),
        "npy": (npy((SIDE, SIDE, 3)), 3, "truncated"),
        "npy bands": (npy((4, SIDE, 4), "<f8"), 4, "truncated"),
    }


def inflated_tiff() -> bytes:
    """64 x 64 pixels whose compressed strip becomes a gigabyte."""
    out, packer = io.BytesIO(), zlib.compressobj()
    tifffile.imwrite(out, np.zeros((64, 64), np.uint8), compression="zlib", metadata=None)
    strip = b"".join(packer.compress(bytes(2**24)) for _ in range(64)) + packer.flush()
    data = bytearray(out.getvalue())
    start = struct.unpack("<I", data[4:8])[0]
    for place in range(start + 2, start + 2 + 12 * struct.unpack("<H", data[start : start + 2])[0], 12):
        tag = struct.unpack("<H", data[place : place + 2])[0]
        if tag in (273, 279):  # where the strip lies, how many bytes it has
            data[place + 2 : place + 12] = struct.pack("<HII", 4, 1, len(data) if tag == 273 else len(strip))
    return bytes(data) + strip


@pytest.mark.parametrize("name", huge())
def test_small_files_that_claim_to_be_huge(name) -> None:
    data, channels, expected = huge()[name]
    assert grown_by(lambda: reason(data, channels) == expected or pytest.fail(name)) < 64


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (npy((4, 4, 3), "|O", b"x" * 500), "unreadable"),
        (npy((-4, 4, 3), data=b"x" * 500), "unreadable"),
        (npy((4, 4), "<M8[s]", b"x" * 500), "unreadable"),
        (npy((4, 4), "|V0"), "unreadable"),
        (npy((10**30, 4, 3), data=b"x" * 500), "truncated"),
        (npy((0, 10**12, 3)), "empty"),
        (npy("__import__('os').abort()"), "unreadable"),
        (npy("[" * 60), "unreadable"),
        (b"\x93NUMPY\x09\x00" + b"x" * 300, "unreadable"),
    ],
)
def test_arrays_are_refused_by_their_header(data, expected) -> None:
    found = reason(data)
    assert found == expected or (expected == "unreadable" and found == "truncated" and b"[[" in data)


def test_arrays_are_read_as_numpy_reads_them() -> None:
    for array in (np.arange(60, dtype=np.uint8).reshape(4, 5, 3), np.asfortranarray(np.ones((3, 4, 5), np.float32))):
        out = io.BytesIO()
        np.save(out, array)
        expected = np.moveaxis(array, 0, 2) * 255 if array.shape[0] == 3 else array
        assert np.array_equal(open_picture(out.getvalue()).decode().permute(1, 2, 0), expected)


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"tile": (16, 16)}, {"planarconfig": "separate"}])
def test_bands_and_pages_come_out_as_tifffile_shows_them(options) -> None:
    bands = np.random.default_rng(0).integers(0, 256, (5, 32, 48), dtype=np.uint8)
    out = io.BytesIO()
    tifffile.imwrite(out, bands, photometric="minisblack", **options)
    assert np.array_equal(open_picture(out.getvalue(), 5).decode(), bands)
    assert reason(out.getvalue(), 4) == "wrong-channels"


def test_files_that_would_start_a_program_are_no_images() -> None:
    """Pillow hands PostScript to Ghostscript."""
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n") == "not-an-image"


def test_too_little_memory_is_the_file_s_fault(monkeypatch) -> None:
    def starve(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", starve)
    assert reason(bytes(encode("PNG")), 1) == "too-large"


def test_a_file_of_many_gigabytes_is_not_read(tmp_path) -> None:
    with (tmp_path / "1.jpg").open("wb") as file:
        file.truncate(2**36)
    with pytest.raises(BadImage) as caught:
        Folder(tmp_path).read(0)
    assert caught.value.reason == "too-large"


def test_random_damage_gives_a_reason_or_pixels() -> None:
    bands = io.BytesIO()
    tifffile.imwrite(bands, np.zeros((5, 24, 20), np.uint8), photometric="minisblack", compression="zlib")
    array = io.BytesIO()
    np.save(array, np.zeros((24, 20, 3), np.float32))
    seeds = [(bytes(encode(kind)), 3) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "JPEG2000", "BMP", "PPM")]
    seeds += [
        (tiff(), 5),
        (bands.getvalue(), 5),
        (array.getvalue(), 3),
        (bytes(encode("TIFF", compression="tiff_lzw")), 3),
    ]
    rng, found = np.random.default_rng(0), Counter[str]()
    for turn in range(1200):
        data, channels = seeds[turn % len(seeds)]
        try:
            pixels = open_picture(_damage(data, rng), channels).decode()
            assert pixels.shape[0] == channels and pixels[0].numel() <= im.MAX_PIXELS
            found["pixels"] += 1
        except BadImage as error:
            assert error.reason in REASONS
            found[error.reason] += 1
    assert found["pixels"] > 50 and found["truncated"] > 50 and found["unreadable"] > 50


def _damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Changes a few bytes, more often near the beginning, and sometimes cuts the end off."""
    content = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        reach = min(len(content), 200) if rng.random() < 0.7 else len(content)
        content[int(rng.integers(4, reach))] = rng.choice([0, 1, 0x7F, 0xFF, int(rng.integers(256))])
    return bytes(content[: int(rng.integers(1, len(content)))] if rng.random() < 0.2 else content)
