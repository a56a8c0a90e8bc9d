"""Images a second of the host pipeline on one core, against the same augmentation written with Pillow.

    python -m benchmarks.data [--images DIR] [--count 64] [--rounds 5] [--out FILE.json]

Both sides get the same encoded images, held in memory, and make 2 global crops of 224 and 8 local ones of 98 pixels.
The Pillow side does all of DINOv2's recipe, one crop after another, as torchvision does it on PIL images (its Gaussian
is replaced by Pillow's own, which is faster, so the comparison is on the safe side). dinoreg's side stops at uint8
crops, for the rest happens on the device in batches; the second figure counts that too, on this same core. Both run in
this process, which keeps freed memory as the trainer and its workers do; Pillow gains by that as far as it can.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from PIL import __version__ as pillow_version

from benchmarks.machine import describe_machine
from dinoreg.allocator import keep_freed_memory
from dinoreg.data import photometric as ph
from dinoreg.data.batch import Batch
from dinoreg.data.counter import Purpose, generator
from dinoreg.data.crops import CropConfig, allowed_shrink, cut, draw_boxes, resize_box
from dinoreg.data.images import EXTENSIONS, open_picture
from dinoreg.data.loader import empty_crops
from dinoreg.data.masks import MaskConfig, draw_masks
from dinoreg.parallel.mesh import Ranks

CROPS, PHOTOMETRIC, MASKS = CropConfig(), ph.PhotometricConfig(), MaskConfig()
GRID = (16, 16)


def find_images(folder: str | None, count: int) -> list[bytes]:
    """Encoded images of a folder, or photo-like JPEGs of 500 x 375 cut from bundled photographs."""
    if folder is not None:
        paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower()[1:] in EXTENSIONS)
        if not paths:
            raise SystemExit(f"no images in {folder}")
        return [paths[i % len(paths)].read_bytes() for i in range(count)]
    from skimage import data
    from sklearn.datasets import load_sample_images

    photos = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), *load_sample_images().images]
    return [_photo(photos[i % len(photos)], generator(0, Purpose.CROP, i)) for i in range(count)]


def _photo(pixels: NDArray[np.uint8], rng: np.random.Generator) -> bytes:
    image = Image.fromarray(pixels)
    width = int(image.width * rng.uniform(0.6, 1.0))
    height = min(image.height, int(width * 0.75))
    left, top = (int(rng.integers(room + 1)) for room in (image.width - width, image.height - height))
    out = io.BytesIO()
    image.crop((left, top, left + width, top + height)).resize((500, 375), Image.Resampling.LANCZOS).save(
        out, "JPEG", quality=92
    )
    return out.getvalue()


def with_pillow(data: bytes, number: int) -> list[NDArray[np.float32]]:
    """All crops of one image, normalised, by Pillow alone, with the very parameters that dinoreg draws."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    drawn = draw_boxes(CROPS, generator(0, Purpose.CROP, number), *image.size)
    values = ph.draw(PHOTOMETRIC, generator(0, Purpose.PHOTOMETRIC, number), 3, CROPS.local_count)
    mean, std = np.array([PHOTOMETRIC.mean, PHOTOMETRIC.std], dtype=np.float32)
    crops = []
    for i, ((left, top, width, height), flip) in enumerate(zip(drawn.boxes.tolist(), drawn.flips, strict=True)):
        size = CROPS.global_size if i < 2 else CROPS.local_size
        box = (left, top, left + width, top + height)
        crop = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
        crop = _augment(ImageOps.mirror(crop) if flip else crop, values[i])
        crops.append(((np.asarray(crop, dtype=np.float32) / 255 - mean) / std).transpose(2, 0, 1).copy())
    return crops


def _augment(crop: Image.Image, values: NDArray[np.float32]) -> Image.Image:
    if values[ph.JITTER]:
        for column in ph.ORDERS[int(values[ph.ORDER])].tolist():
            crop = PILLOW_JITTER[column](crop, float(values[column]))
    if values[ph.GREY]:
        crop = crop.convert("L").convert("RGB")
    if values[ph.SIGMA]:
        crop = crop.filter(ImageFilter.GaussianBlur(float(values[ph.SIGMA])))
    return ImageOps.solarize(crop, 128) if values[ph.SOLARISE] else crop


def _turn_hue(image: Image.Image, shift: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue).astype(np.int16) + int(shift * 255)).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


PILLOW_JITTER: dict[int, Callable[[Image.Image, float], Image.Image]] = {
    ph.BRIGHTNESS: lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    ph.CONTRAST: lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    ph.SATURATION: lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    ph.HUE: _turn_hue,
}


def empty_batch(count: int) -> Batch:
    """Room for the crops of `count` images."""
    return Batch(
        empty_crops(count, 2, CROPS.global_size, 3),
        empty_crops(count, CROPS.local_count, CROPS.local_size, 3),
        torch.empty(count, 2 + CROPS.local_count, ph.NUM_PARAMETERS),
        torch.empty(count, 2, GRID[0] * GRID[1], dtype=torch.bool),
        torch.arange(count),
    )


def on_host(images: list[bytes], batch: Batch) -> None:
    """What a worker does for a batch: decode, crop, draw the photometric parameters and the masks."""
    for i, data in enumerate(images):
        cut(CROPS, open_picture(data), generator(0, Purpose.CROP, i), batch.global_crops[i], batch.local_crops[i])
        values = ph.draw(PHOTOMETRIC, generator(0, Purpose.PHOTOMETRIC, i), 3, CROPS.local_count)
        batch.photometric[i] = torch.from_numpy(values)
    batch.masks[:] = torch.from_numpy(draw_masks(MASKS, GRID, len(images), 0, 0, len(images)))


def host_stages(images: list[bytes]) -> dict[str, float]:
    """Milliseconds an image of each stage by itself (their sum leaves out what writes the crops into the batch)."""
    pictures = [open_picture(data) for data in images]
    drawn = [draw_boxes(CROPS, generator(0, Purpose.CROP, i), p.width, p.height) for i, p in enumerate(pictures)]
    sizes = [CROPS.global_size] * 2 + [CROPS.local_size] * CROPS.local_count
    decoded: list[torch.Tensor] = []

    def decode() -> None:
        decoded[:] = [
            open_picture(data).decode(allowed_shrink(CROPS, d.boxes)) for data, d in zip(images, drawn, strict=True)
        ]

    def resize() -> None:
        for pixels, picture, d in zip(decoded, pictures, drawn, strict=True):
            ratio = pixels.shape[2] / picture.width
            for box, size in zip((d.boxes * ratio).astype(int).tolist(), sizes, strict=True):
                resize_box(pixels, box, size)

    def draw() -> None:
        for i, picture in enumerate(pictures):
            draw_boxes(CROPS, generator(0, Purpose.CROP, i), picture.width, picture.height)
            ph.draw(PHOTOMETRIC, generator(0, Purpose.PHOTOMETRIC, i), 3, CROPS.local_count)
        draw_masks(MASKS, GRID, len(images), 0, 0, len(images))

    named = {"decode": decode, "crop and resize": resize, "draw boxes, parameters, masks": draw}
    return {name: 1e3 * seconds(work) / len(images) for name, work in named.items()}


def photometric_stages(batch: Batch) -> dict[str, float]:
    """Milliseconds an image of each operation inside `develop`, and of what is around them."""
    spent: defaultdict[str, float] = defaultdict(float)

    def timed(operation: ph.Operation) -> ph.Operation:
        def work(crops: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            start = time.process_time()
            out = operation(crops, values)
            spent[operation.__name__] += time.process_time() - start
            return out

        return work

    with mock.patch.dict(ph.OPERATIONS, {column: timed(operation) for column, operation in ph.OPERATIONS.items()}):
        total = seconds(lambda: ph.develop(batch, PHOTOMETRIC))
    spent["planning, to floats, normalising"] = total - sum(spent.values())
    return {name: 1e3 * value / len(batch) for name, value in spent.items()}


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call: what else runs on the machine hardly matters."""
    start = time.process_time()
    work()
    return time.process_time() - start


def resize_agreement(images: list[bytes]) -> tuple[float, int]:
    """(share of values within 1 of 255, largest difference) between the two sides' resized crops."""
    differences = []
    for i, data in enumerate(images[:16]):
        pixels = open_picture(data).decode()
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        for left, top, w, h in draw_boxes(CROPS, generator(0, Purpose.CROP, i), *image.size).boxes[:4].tolist():
            ours = resize_box(pixels, [left, top, w, h], CROPS.global_size).permute(1, 2, 0).numpy()
            box = (left, top, left + w, top + h)
            theirs = image.crop(box).resize((CROPS.global_size,) * 2, Image.Resampling.BICUBIC)
            differences.append(np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).ravel())
    every = np.concatenate(differences)
    return float((every <= 1).mean()), int(every.max())


def measure(images: list[bytes], rounds: int) -> dict[str, Any]:
    """All the figures."""
    batch = empty_batch(len(images))
    sides: dict[str, Callable[[], object]] = {
        "pillow": lambda: [with_pillow(data, i) for i, data in enumerate(images)],
        "host": lambda: on_host(images, batch),
        "photometrics": lambda: ph.develop(batch, PHOTOMETRIC),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):  # the first warms up
        for name, work in sides.items():
            times[name].append(1e3 * seconds(work) / len(images))
    pillow, host, device = (float(np.median(values[1:])) for values in times.values())
    totals = {
        "Pillow, everything": pillow,
        "dinoreg, photometrics on device": host,
        "dinoreg, photometrics on this core": host + device,
    }
    share, worst = resize_agreement(images)
    return {
        "images": len(images),
        "rounds": rounds,
        "ms_per_image": totals,
        "speed_up": {name: pillow / value for name, value in totals.items()},
        "stages": {"host": host_stages(images), "photometrics": photometric_stages(batch)},
        "resize": {"within_1_of_255": share, "worst": worst},
        "every_round_ms_per_image": {name: values[1:] for name, values in times.items()},
    }


def show(results: dict[str, Any]) -> None:
    """The table, for a person."""
    print(f"{results['images']} images, median of {results['rounds']} rounds, one core")
    print(f"{'':34}{'ms/image':>10}{'images/s':>10}{'speed-up':>10}")
    for name, value in results["ms_per_image"].items():
        print(f"{name:34}{value:10.2f}{1e3 / value:10.0f}{results['speed_up'][name]:9.1f}x")
    for title, stages in results["stages"].items():
        print(f"\nstages of the {title}, ms/image")
        for name, value in stages.items():
            print(f"  {name:32}{value:10.3f}")
    share, worst = results["resize"]["within_1_of_255"], results["resize"]["worst"]
    print(f"\nresized crops against Pillow's: {share:.4%} of the values within 1 of 255, the worst {worst} apart")


def main() -> None:
    """Measures, prints, and writes to --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of images; without it, cuts from bundled photographs")
    parser.add_argument("--count", type=int, default=64, help="images a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, of which the median counts")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    results = measure(find_images(args.images, args.count), args.rounds)
    show(results)
    if args.out:
        machine = describe_machine(Ranks.alone()) | {"pillow": pillow_version, "numpy": np.__version__}
        folder = Path(args.images).name if args.images else None
        args.out.write_text(json.dumps({"machine": machine, "folder": folder, **results}, indent=1))


if __name__ == "__main__":
    main()
