"""From the bytes of one file to uint8 pixels, whatever the format, and a named reason where that is impossible."""

from __future__ import annotations

import io
import logging
import lzma
import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

REASONS = (
    "empty", "not-an-image", "truncated", "too-large", "wrong-channels", "missing", "changed", "unreachable",
    "unsafe-path", "unreadable",
)  # fmt: skip
EXTENSIONS = frozenset(["jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jp2", "npy"])
MAX_PIXELS = 2**27  # by the header, before anything is decoded: 134 megapixels, half a gigabyte as RGBX
MAX_BYTES = 2**31 - 8192  # of one encoded image: what a single read gives on Linux
MAX_INFLATED = 2**28  # bytes that a part of a TIFF may grow to without being looked at first
# Pillow knows more, but some of those start programs (EPS runs Ghostscript) and none of them holds photographs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
JPEGS = ("JPEG", "MPO")  # by Pillow's names; an MPO is a JPEG that is followed by others, as telephones write them
ORIENTATION = 0x0112  # the EXIF tag
TRANSPOSED = frozenset((5, 6, 7, 8))  # its values that exchange width and height


class DataError(RuntimeError):
    """The data cannot be trained on; the message is one line for people."""


class BadImage(Exception):
    """An image that cannot be used. `reason` is one of REASONS."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass
class Picture:
    """An image whose header has been read and whose pixels have not (arrays excepted). Sizes as people see it."""

    width: int
    height: int
    channels: int
    content: Image.Image | NDArray[np.uint8]  # an array is (H, W, C)
    orientation: int = 1
    encoded: bytes = b""  # the file that an image was opened from

    def decode(self, shrink: int = 1) -> Tensor:
        """uint8 (C, H, W), interleaved in memory (as the fast resize kernels want it).

        shrink 2, 4 or 8 lets a JPEG be decoded at that fraction of its size, at a fraction of the time; sizes are
        rounded up. Other formats ignore it. Raises BadImage.
        """
        if isinstance(self.content, np.ndarray):
            return torch.from_numpy(self.content).permute(2, 0, 1)
        with _named_reasons():
            pixels = _decode_jpeg(self.encoded, self.content, self.channels, shrink)
            if pixels is None:
                if shrink > 1 and self.content.format in JPEGS:
                    _draft(self.content, shrink)
                pixels = _to_channels(self.content, self.channels)
        return torch.from_numpy(_orient(pixels, self.orientation)).permute(2, 0, 1)


def open_picture(data: bytes, channels: int = 3) -> Picture:
    """Reads the header. Raises BadImage.

    One or three channels: any image, converted to grey or RGB; transparency is laid on white, the first frame of an
    animation counts. Other numbers: a NumPy file, a TIFF of that many bands or pages, an image that has just as many
    (RGBA for 4). 16-bit values are taken as the full range 0..65535 and reduced to 8 bits; floats as 0..1.
    """
    if not data:
        raise BadImage("empty")
    if len(data) > MAX_BYTES:
        raise BadImage("too-large", f"{len(data)} bytes")
    with _named_reasons():
        if data[:6] == b"\x93NUMPY":
            return _open_array(_read_npy(data), channels)
        if channels not in (1, 3) and data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _open_array(_read_tiff(data, channels), channels)
        image = Image.open(io.BytesIO(data), formats=_formats())
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImage("too-large", f"{width} x {height} pixels")
        orientation = image.getexif().get(ORIENTATION, 1)
        if orientation in TRANSPOSED:
            width, height = height, width
        return Picture(width, height, channels, image, orientation, data)


@cache
def _formats() -> list[str]:
    """FORMATS as far as this Pillow was built with them."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextmanager
def _named_reasons() -> Iterator[None]:
    """Turns whatever the decoders raise into BadImage."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata and of sizes below our own limit; neither concerns the pixels.
            warnings.simplefilter("ignore")
            yield
    except (BadImage, ImportError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage("not-an-image") from error
    except Image.DecompressionBombError as error:
        raise BadImage("too-large", str(error)) from error
    except MemoryError as error:  # one file must not end a run; where memory is short in truth, many will be bad
        raise BadImage("too-large", f"not enough memory. {error}") from error
    except (EOFError, struct.error) as error:
        raise BadImage("truncated", str(error)) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, IndexError, ... on broken input
        raise BadImage(_reason_in(str(error).lower()), str(error)) from error


def _reason_in(message: str) -> str:
    if any(words in message for words in ("too large", "too much memory")):
        return "too-large"
    short = any(words in message for words in ("truncated", "unexpected end", "cannot reshape", "eof"))
    return "truncated" if short else "unreadable"


def _decode_jpeg(data: bytes, image: Image.Image, channels: int, shrink: int) -> NDArray[np.uint8] | None:
    """Pixels (H, W, channels) of an ordinary JPEG: bit for bit Pillow's, in half of its time.

    None where Pillow is to judge: other formats, a change of colours, and whatever is odd about the file.
    """
    colours = {("RGB", 3): "RGB", ("L", 3): "RGB", ("L", 1): "GRAY"}.get((image.mode, channels))
    if image.format not in JPEGS or colours is None:
        return None
    width, height = (-(-side // shrink) for side in image.size)
    try:
        pixels = simplejpeg.decode_jpeg(data, colours, min_height=height, min_width=width)
    except ValueError:  # at the first irregularity, many of which Pillow forgives
        return None
    return pixels if pixels.shape[:2] == (height, width) else None


def _draft(image: Image.Image, shrink: int) -> None:
    """Asks the JPEG decoder for 1 / shrink of the size, without a change of mode."""
    image.draft(image.mode, (image.width // shrink, image.height // shrink))


def _to_channels(image: Image.Image, channels: int) -> NDArray[np.uint8]:
    """Pixels (H, W, channels)."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I", "F"):
        return _match_channels(_to_bytes(np.asarray(image))[:, :, None], channels)
    if channels not in (1, 3):
        return _match_channels(np.atleast_3d(np.array(image)), channels)
    mode = "RGB" if channels == 3 else "L"
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    if image.mode != mode:
        image = image.convert(mode)
    return np.array(image).reshape(image.height, image.width, channels)


def _to_bytes(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Any numeric array to 0..255: integers by the range of 16 bits (8 where they are uint8), floats by 0..1."""
    if values.dtype == np.uint8:
        return values.astype(np.uint8)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if np.issubdtype(values.dtype, np.integer):
        return np.rint(np.clip(values, 0, 65535) / 257.0).astype(np.uint8)
    if np.issubdtype(values.dtype, np.floating):
        return np.rint(np.clip(np.nan_to_num(values), 0, 1) * 255).astype(np.uint8)
    raise BadImage("unreadable", f"values of type {values.dtype}")


def _open_array(array: NDArray[np.generic], channels: int) -> Picture:
    """An array (H, W), (H, W, C) or (C, H, W); the last axis is the channels' where both could be."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3:
        raise BadImage("wrong-channels", f"an array of shape {array.shape}")
    if array.shape[2] != channels and array.shape[0] in (1, channels):
        array = np.moveaxis(array, 0, 2)
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise BadImage("too-large", f"an array of shape {array.shape}")
    if array.size == 0:
        raise BadImage("empty")
    pixels = np.ascontiguousarray(_match_channels(_to_bytes(array), channels))
    return Picture(pixels.shape[1], pixels.shape[0], channels, pixels)


def _match_channels(pixels: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """Repeats one channel where several are wanted; any other disagreement is an error."""
    if pixels.shape[2] == channels:
        return pixels
    if pixels.shape[2] == 1 and channels == 3:
        return pixels.repeat(3, axis=2)
    raise BadImage("wrong-channels", f"{pixels.shape[2]} channels, not {channels}")


def _read_npy(data: bytes) -> NDArray[np.generic]:
    """The array of a NumPy file; np.load would first take the memory that the header asks for."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise BadImage("unreadable", f"a NumPy file of version {version}")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, columns_first, dtype = read_header(file)
    if dtype.kind not in "biuf" or min(shape, default=0) < 0:
        raise BadImage("unreadable", f"values of type {dtype}, shape {shape}")
    count = math.prod(shape)
    if count * dtype.itemsize > len(data) - file.tell():
        raise BadImage("truncated", f"{count} values of {dtype.itemsize} bytes in {len(data) - file.tell()}")
    if count == 0:
        raise BadImage("empty")
    values: NDArray[np.generic] = np.frombuffer(data, dtype, count, file.tell())
    return values.reshape(shape, order="F" if columns_first else "C")


def _read_tiff(data: bytes, channels: int) -> NDArray[np.generic]:
    """The first page of a TIFF, with all those after it that are alike: (H, W), (H, W, C), (C, H, W)."""
    try:
        import tifffile
    except ImportError:
        raise ImportError(
            "reading TIFF files of several bands needs the package tifffile: pip install tifffile"
        ) from None
    # It tells of each oddity on the terminal, which is one line an image; what matters is raised.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        first = file.pages.first
        pages: list[Any] = []
        for page in file.pages:
            if (page.shape, page.dtype) == (first.shape, first.dtype):
                _check_page(page, data, channels)
                pages.append(page)
            if len(pages) > channels:
                raise BadImage("wrong-channels", f"more than {channels} pages")
        arrays = [page.asarray(maxworkers=1) for page in pages]
    return arrays[0] if len(arrays) == 1 else np.stack(arrays)


def _check_page(page: Any, data: bytes, channels: int) -> None:
    """Raises BadImage where decoding would take more memory than an image of the largest allowed size does."""
    values = max(math.prod(page.shape), math.prod(page.chunks))
    if values > MAX_PIXELS * channels:
        raise BadImage("too-large", f"a page of shape {page.shape} in parts of {page.chunks}")
    inflators: dict[int, Any] = {8: zlib.decompressobj, 32946: zlib.decompressobj, 34925: lzma.LZMADecompressor}
    inflator = inflators.get(int(page.compression))
    ratio = 1100 if inflator is zlib.decompressobj else 10_000  # the most that either makes of a byte, and some more
    most = 2 * math.prod(page.chunks) * page.dtype.itemsize + 2**20  # a part may be padded
    for start, size in zip(page.dataoffsets, page.databytecounts, strict=False):
        part = data[start : start + size]
        if inflator and len(part) * ratio > MAX_INFLATED and len(inflator().decompress(part, most + 1)) > most:
            raise BadImage("too-large", f"{size} bytes of a page of shape {page.shape} hold more than {most}")


def _orient(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undoes the camera's rotation (H, W, C), by the eight cases of EXIF."""
    if orientation in TRANSPOSED:
        pixels = pixels.swapaxes(0, 1)
    # What is left after the transposition: 5 nothing, 6 the columns, 7 both, 8 the rows.
    rows = orientation in (3, 4, 7, 8)
    columns = orientation in (2, 3, 6, 7)
    if rows or columns:
        pixels = pixels[:: -1 if rows else 1, :: -1 if columns else 1]
    return np.ascontiguousarray(pixels)
