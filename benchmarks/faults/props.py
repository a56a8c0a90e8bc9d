"""What faults are played with: images, shards, small disks."""

from __future__ import annotations

import contextlib
import io
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES, SHARDS = 24, 3


def draw_images(folder: Path, count: int = IMAGES, seed: int = 0) -> None:
    """Images of smooth noise, in two sizes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        size = (48, 64) if number % 2 else (80, 56)
        noise = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        noise.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:02d}.jpg", quality=95)


def write_shards(images: Path, folder: Path, count: int = SHARDS) -> None:
    """The images of a folder in `count` tars."""
    folder.mkdir(parents=True)
    files = sorted(images.iterdir())
    for number in range(count):
        write_tar(folder / f"shard-{number}.tar", {file.name: file.read_bytes() for file in files[number::count]})


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    """A tar of these members, whatever their names."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own on a folder. Raises OSError where this is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def resize_disk(folder: Path, size: str) -> None:
    """Another size for a file system of `small_disk`."""
    _mount("-o", f"remount,size={size}", str(folder))


def mounting(command: str) -> list[str]:
    """A prefix for commands, which run where `command` has mounted something that nobody else sees.

    Raises OSError where this is not allowed.
    """
    prefix = ["unshare", "-m", "sh", "-c", f'{command} && exec "$@"', "sh"]
    try:
        tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise OSError("there is no unshare command") from None
    if tried.returncode:
        raise OSError(f"mounting is not allowed: {tried.stderr.strip()}")
    return prefix


def _mount(*words: str) -> None:
    try:
        done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise OSError("there is no mount command") from None
    if done.returncode:
        raise OSError(f"mounting is not allowed: {done.stderr.strip()}")
