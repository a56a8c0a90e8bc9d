"""`dinoreg demo`: the whole way from photographs to registers, in a few minutes on a CPU and without a download.

The photographs are those that scikit-image and scikit-learn bring along. Each is cut into four quarters: tiles of the
upper left and lower right one are what the network trains on, without labels; the other two are never trained on. The
k-NN then asks from which photo a crop of the unseen quarters comes, remembering crops of the seen ones. Both kinds of
crop are taken at random scales, mirrored and changed in brightness, contrast and colour, so that a network that has
learnt nothing does not find it easy.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import shutil
import subprocess
import sys
import tarfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageEnhance
from rich.console import Console

from dinoreg.config import ConfigError
from dinoreg.demo_page import Facts, write_page
from dinoreg.train.tracking import read_metrics

if TYPE_CHECKING:
    from dinoreg.train.recipe import RunConfig

PHOTOS = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cat": "chelsea.png",
    "china": "china.jpg",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "flower": "flower.jpg",
    "galaxies": "hubble_deep_field.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "page": "page.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}
FEWEST_PHOTOS = 8  # below it the packages have changed and the numbers would mean nothing
# Quarters of a photo as (column, row): two diagonals, so that both parts show something of each object.
SEEN, UNSEEN = ((0, 0), (1, 1)), ((1, 0), (0, 1))
TILE = 96  # pixels
TILES_PER_PHOTO, CROPS_PER_PHOTO = 120, 50
KNN_READINGS = 6  # during the training, besides the first
CURVE = 32  # characters
SHOWN = ("astronaut", "coffee")
PROTOCOL = ["--preset", "quick"]  # of the evaluation, which then takes some ten seconds


@dataclass(frozen=True)
class DemoData:
    """What `build_data` wrote: patterns for `data.sources` and the two sides of the k-NN."""

    tiles: str
    seen_crops: str
    unseen_crops: str
    classes: list[str]


def add_arguments(parser: ArgumentParser) -> None:
    """The options of `dinoreg demo`."""
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo_photos"), help="everything is written here (%(default)s)"
    )
    parser.add_argument("--steps", type=int, help="length of the training (default: that of configs/demo.yaml)")


def main(asked: Namespace) -> int:
    """`dinoreg demo`; started again, it goes on where it was stopped."""
    run(asked.out, asked.steps)
    return 0


def run(out: Path, steps: int | None = None) -> None:
    """Build the data, train, draw, evaluate, and tell what happened; everything lands in `out`."""
    from dinoreg.train.pictures import look
    from dinoreg.train.trainer import train

    say = Console(highlight=False, soft_wrap=True).print
    data = build_data(out / "data")
    cfg = _configure(out, data, steps)
    photos = len(data.classes)
    say(
        f"[bold]1. Data:[/bold] {TILES_PER_PHOTO * photos} tiles to train on, {2 * CROPS_PER_PHOTO * photos} labelled "
        f"crops for the k-NN, cut from {photos} photographs into webdataset shards"
    )
    say(f"[bold]2. Training:[/bold] a small ViT with {cfg.model.num_registers} registers, {cfg.train.steps} steps")
    weights = train(cfg)

    say("\n[bold]3. What it learnt[/bold]")
    for line in report(read_metrics(out / "metrics.jsonl"), chance=1 / photos):
        say("   " + line)

    shown = [path for name, path in find_photos().items() if name in SHOWN]
    picture = look(weights, shown, out / "registers.png", cfg.photometric)
    say("\n[bold]4. How good it is[/bold]")
    results = evaluate(weights, data)

    say("\n[bold]5. What to try next[/bold]")
    command = "dinoreg" if shutil.which("dinoreg") else os.path.relpath(Path(sys.executable).with_name("dinoreg"))
    ideas = [(f"{command}{words}", meaning) for words, meaning in _ideas(out, weights)]
    for words, meaning in ideas:
        say(f"   {words}  [dim]{meaning}[/dim]")
    facts = Facts(out, picture, weights, cfg.train.steps or 0, photos, ideas)
    say(f"\n[bold]All of it on one page:[/bold] {write_page(facts, read_metrics(out / 'metrics.jsonl'), results)}")


def evaluate(weights: Path, data: DemoData) -> list[Path]:
    """What `dinoreg-eval` finds out about a teacher of a run, as results.json files; measured once.

    Raises ConfigError where that command fails.
    """
    found = f"*/{weights.stem}/results.json"
    folder = weights.parents[1] / "eval"
    if not any(folder.glob(found)) or not (folder / "report.html").is_file():  # the last that is written
        known, asked = (Path(crops).absolute() for crops in (data.seen_crops, data.unseen_crops))
        words = ["all", "--weights", str(weights.absolute()), *PROTOCOL, "--cache", str(folder.absolute() / "features")]
        words += ["--data-imagenet", f"train={known}", "--data-imagenet", f"test={asked}"]
        # A command of its own, for this package knows nothing of eval; from where both lie, for the user's folder may
        # hold another package of that name.
        ended = subprocess.run([sys.executable, "-m", "eval", *words], cwd=Path(__file__).parents[1])
        if ended.returncode:
            raise ConfigError(f"the evaluation ended with {ended.returncode}: dinoreg-eval {' '.join(words)}")
    return sorted(folder.glob(found))


def _ideas(out: Path, weights: Path) -> list[tuple[str, str]]:
    """What may follow `dinoreg`, and what it does."""
    return [
        (f" look {weights} PHOTO.jpg", "this picture of your photo"),
        (" train demo data.sources=/my/images run_dir=runs/mine", "the same network on your images"),
        (" train own_images_1gpu data.sources=/my/images", "a network for use, on a GPU"),
        (f" doctor {out}", "what the numbers of a run say about its health"),
        (
            f"-eval all --weights {weights} --data-imagenet DIR",
            "scores on your images in DIR/{train,val}/CLASS",
        ),
        ("-eval compare runs/A runs/B --output table.html", "which of two networks is better, and is it chance?"),
    ]


def _configure(out: Path, data: DemoData, steps: int | None) -> RunConfig:
    """The recipe configs/demo.yaml with the paths of this run."""
    from dinoreg.config import load
    from dinoreg.train.recipe import RunConfig

    cfg = load(RunConfig, "demo", [f"train.steps={steps}"] if steps else [])
    cfg.run_dir, cfg.data.sources = str(out), [data.tiles]
    cfg.monitor.knn_train, cfg.monitor.knn_test = data.seen_crops, data.unseen_crops
    cfg.monitor.knn_every = max(1, (cfg.train.steps or 0) // KNN_READINGS)
    return cfg


def report(history: Sequence[Mapping[str, float]], chance: float) -> list[str]:
    """What became of the loss and of the k-NN, each with a small curve."""
    lines = []
    for label, name, shape, meaning in (
        ("loss", "loss/total", "6.3f", "what is optimised: DINO + iBOT + KoLeo"),
        ("DINO", "loss/dino_local", "6.3f", "its part on local crops; ln K = {plateau:.3f} is ignorance"),
        ("k-NN", "knn/top1", "6.1%", "which photo is this crop from? (chance {chance:.1%})"),
    ):
        values = [record[name] for record in history if name in record]
        plateau = max((record["plateau/dino"] for record in history if "plateau/dino" in record), default=math.nan)
        curve = f"{values[0]:{shape}} {sparkline(values):<{CURVE}} {values[-1]:{shape}}"
        lines.append(f"{label}  {curve}   {meaning.format(plateau=plateau, chance=chance)}")
    first, *_, last = [record["knn/top1"] for record in history if "knn/top1" in record]
    lines.append(
        f"The untrained network names the right photo for {first:.1%} of the crops, the trained one for {last:.1%};"
    )
    lines.append("all are cut from quarters of the photos that were never trained on.")
    return lines


def sparkline(values: Sequence[float], width: int = CURVE) -> str:
    """A curve of `width` characters at most, each the mean of its stretch of the values."""
    width = min(width, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    means = [math.fsum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * (mean - low) / span))] for mean in means)


def find_photos() -> dict[str, Path]:
    """The photographs as files inside the installed packages; nothing is downloaded.

    Raises ConfigError when a package is missing or has lost most of its photographs.
    """
    try:
        import skimage.data
        import sklearn.datasets
    except ImportError as error:
        raise ConfigError(f"the demo takes its photographs from scikit-image and scikit-learn: {error}") from None
    # The files themselves rather than skimage.data's functions, which would fetch what is missing.
    folders = [Path(skimage.data.__file__).parent, Path(sklearn.datasets.__file__).parent / "images"]
    found = {name: folder / file for name, file in PHOTOS.items() for folder in folders if (folder / file).is_file()}
    if len(found) < FEWEST_PHOTOS:
        raise ConfigError(f"only {len(found)} of {len(PHOTOS)} photographs are in {folders[0]} and {folders[1]}")
    return found


def build_data(folder: Path) -> DemoData:
    """Write shards of tiles to train on and of labelled crops from seen and unseen parts, once."""
    folder.mkdir(parents=True, exist_ok=True)
    photos = {name: Image.open(path).convert("RGB") for name, path in find_photos().items()}
    data = DemoData(
        str(folder / "tiles-{000..003}.tar"),
        str(folder / "seen-000.tar"),
        str(folder / "unseen-000.tar"),
        list(photos),
    )
    done = folder / "classes.txt"
    if done.exists():
        return data
    for shard in range(4):
        count = TILES_PER_PHOTO // 4
        _write_shard(folder / f"tiles-{shard:03d}.tar", _cut(photos, SEEN, count, seed=shard, disturb=False))
    _write_shard(Path(data.seen_crops), _cut(photos, SEEN, CROPS_PER_PHOTO, seed=100, disturb=True))
    _write_shard(Path(data.unseen_crops), _cut(photos, UNSEEN, CROPS_PER_PHOTO, seed=101, disturb=True))
    done.write_text("".join(f"{name}\n" for name in photos))
    return data


def _cut(
    photos: dict[str, Image.Image], quarters: Sequence[tuple[int, int]], count: int, seed: int, disturb: bool
) -> Iterator[tuple[Image.Image, int]]:
    """`count` square tiles from the given quarters of each photo, with the photo's number, in turn."""
    rng = np.random.default_rng(seed)
    regions = [[_quarter(photo, *quarter) for quarter in quarters] for photo in photos.values()]
    for number in range(count):
        for label, parts in enumerate(regions):
            tile = _random_square(parts[number % len(parts)], rng)
            yield (_disturb(tile, rng) if disturb else tile), label


def _quarter(photo: Image.Image, column: int, row: int) -> Image.Image:
    width, height = photo.width // 2, photo.height // 2
    return photo.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))


def _random_square(region: Image.Image, rng: np.random.Generator) -> Image.Image:
    side = round(min(region.size) * rng.uniform(0.5, 1.0))
    left, top = (int(rng.integers(0, length - side + 1)) for length in region.size)
    return region.crop((left, top, left + side, top + side)).resize((TILE, TILE), Image.Resampling.BICUBIC)


def _disturb(tile: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Another light, another camera: what a photo's identity should survive."""
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        tile = enhancer(tile).enhance(rng.uniform(0.6, 1.4))
    if rng.random() < 0.5:
        tile = tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return tile.convert("L").convert("RGB") if rng.random() < 0.5 else tile


def _write_shard(path: Path, samples: Iterable[tuple[Image.Image, int]]) -> None:
    """A webdataset shard: for each sample a `jpg` and a `cls` member with the same key."""
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w") as tar:
        for number, (image, label) in enumerate(samples):
            jpeg = io.BytesIO()
            image.save(jpeg, "JPEG", quality=92)
            for extension, content in (("jpg", jpeg.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{number:06d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    partial.replace(path)
