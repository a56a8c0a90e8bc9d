"""The `dinoreg` command: a thin front, one function a subcommand.

Nothing heavy is imported before it is known which subcommand is wanted, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dinoreg.threads import set_patience

if TYPE_CHECKING:
    from dinoreg.train.recipe import RunConfig

OVERVIEW = """\
usage: dinoreg COMMAND ...

Pretrain vision transformers with registers, and look at what came out.

  demo           see the whole way in a few minutes, on a CPU, without any data of yours
  train          pretrain on images by a recipe, on one CPU, one GPU or many; goes on where it stopped
  data prepare   turn a folder, a tar or an ImageNet-style tree into shards
  data check     count, measure and show what is in a folder or in shards
  look           draw attention, PCA and norm maps of a backbone for some images
  export         write a backbone as Hugging Face, timm, DINOv2 or ONNX read it
  doctor         say in words what is wrong with a run
  replay         do a step again that was not finite, and say where it broke

  dinoreg COMMAND --help explains each, with examples.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one subcommand and exit with its status: 0, 1 for findings, 2 for a mistake, told in one line."""
    set_patience()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a peer that dies is told in one line, not in stack frames
    words = list(sys.argv[1:] if arguments is None else arguments)
    run_command("dinoreg", COMMANDS, OVERVIEW, words)


def run_command(
    program: str, commands: Mapping[str, Callable[[Sequence[str]], int]], overview: str, words: Sequence[str]
) -> NoReturn:
    """Find the subcommand that `words` begin with, and exit with its status; errors for users become one line."""
    command, rest = _find_command(commands, words)
    if command is None:
        asked = not words or words[0] in ("-h", "--help", "help")
        print(overview if asked else f"{program}: no command '{' '.join(words[:2])}'\n\n{overview}", end="")
        sys.exit(0 if asked else 2)
    try:
        sys.exit(command(rest))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not _is_for_users(error):
            raise
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"{program}: {text}", file=sys.stderr)
        sys.exit(2)


def train(words: Sequence[str]) -> int:
    """`dinoreg train`."""
    from dinoreg.config import load, recipes

    parser = _parser(
        "train",
        "Pretrain by a recipe. Started again with the same run_dir, it goes on from its last checkpoint.",
        f"""\
        recipes:
{chr(10).join(f"          {name:<20} {title}" for name, title in recipes().items())}

        examples:
          dinoreg train own_images_1gpu data.sources=/my/images run_dir=runs/mine
          dinoreg train own_images_1gpu data.sources=/my/images --dry-run     what it would be and cost
          dinoreg train vitg14 --dry-run world_size=1024 gpu=H200             the same on a cluster that is not there
          dinoreg train configs/demo.yaml data.sources=/my/images train.steps=200
          dinoreg train own_images_1gpu 'data.sources=[a-{{000..099}}.tar, b-{{00..09}}.tar]' model.init_from=FILE
          torchrun --nproc-per-node 8 -m dinoreg train own_images_8gpu data.sources=/my/images
          srun dinoreg train vitl16_short_in1k data.sources=/data/imagenet1k

        exit codes:
          0   finished
          2   a mistake, told in one line
          75  stopped by SIGTERM, SIGUSR1, SIGUSR2, Ctrl-C or train.time_limit, and saved, or the port where
              the processes were to meet was taken: the same command goes on
          76  another process died or hangs, told in one line; start all again

        Every option with its default and its meaning: the dataclasses that dinoreg/train/recipe.py puts together.""",
    )
    parser.add_argument(
        "config", metavar="CONFIG", help="a recipe's name, or a YAML file that may name another as `base`"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options, stronger than the recipe's")
    parser.add_argument("--dry-run", action="store_true", help="print the plan (size, FLOPs, memory, lengths) and exit")
    asked = parser.parse_intermixed_args(words)

    from dinoreg.train.recipe import RunConfig

    cluster, overrides = _cluster_words(asked.overrides) if asked.dry_run else ([], asked.overrides)
    config = load(RunConfig, asked.config, [*other_lengths_off(overrides), *overrides])
    if asked.dry_run:
        _print_plan(config, cluster)
        return 0
    require_sources(config.data.sources)
    from dinoreg.parallel.mesh import PortTaken
    from dinoreg.train.stopping import EXIT_STOPPED, Stopped
    from dinoreg.train.trainer import train as run

    try:
        run(config)
    except Stopped as stopped:
        if _is_first_process():
            print(f"dinoreg: {stopped}", file=sys.stderr)
        return EXIT_STOPPED
    except PortTaken as taken:
        print(f"dinoreg: {taken}", file=sys.stderr)
        return EXIT_STOPPED
    return 0


def _cluster_words(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words about GPUs that are not here, which only a plan understands, and the run's own."""
    from dinoreg.train.scale import split_words

    return split_words(overrides)


def _print_plan(config: RunConfig, cluster: Sequence[str]) -> None:
    from dinoreg.train.plan import print_plan
    from dinoreg.train.scale import print_scale

    if cluster:
        print_scale(config, cluster)
    else:
        print_plan(config)


def other_lengths_off(overrides: Sequence[str]) -> list[str]:
    """A length on the command line takes the place of the recipe's, in whichever unit that is."""
    units = ("steps", "epochs", "images")
    given = [unit for unit in units if any(text.startswith(f"train.{unit}=") for text in overrides)]
    return [f"train.{unit}=null" for unit in units if unit not in given] if len(given) == 1 else []


def data_prepare(words: Sequence[str]) -> int:
    """`dinoreg data prepare`."""
    from dinoreg.data import prepare

    parser = _parser(
        "data prepare",
        "Write shuffled webdataset shards with an index and a manifest. Stopped, it goes on where it was.",
        """\
        examples:
          dinoreg data prepare /my/photos /data/photos                a folder, or a tree with a folder a class
          dinoreg data prepare ILSVRC2012_img_train.tar /data/imagenet1k --resize 512
          dinoreg data prepare 'old-{000..099}.tar' /data/new --workers 16""",
    )
    prepare.add_arguments(parser)
    return prepare.main(parser.parse_args(words))


def data_check(words: Sequence[str]) -> int:
    """`dinoreg data check`."""
    from dinoreg.data import inspect

    parser = _parser(
        "data check",
        "Count, measure and show what is in a source; 1 is returned when something is unreadable.",
        """\
        examples:
          dinoreg data check /my/photos
          dinoreg data check 'shards-{000..099}.tar' --limit 10000 --picture crops.png""",
    )
    inspect.add_arguments(parser)
    return inspect.main(parser.parse_args(words))


def look(words: Sequence[str]) -> int:
    """`dinoreg look`."""
    parser = _parser(
        "look",
        "Draw, for each image, the attention of CLS and of each register, the first three principal components of the\n"
        "patch features, and the norms of the patch tokens.",
        """\
        examples:
          dinoreg look runs/mine/teacher/step_00010000.safetensors cat.jpg dog.jpg
          dinoreg look dinov2_vits14_reg4_pretrain.pth *.jpg --out maps.png --size 518""",
    )
    parser.add_argument("weights", metavar="WEIGHTS", help="a backbone: of dinoreg, DINOv2, timm or Hugging Face")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--out", default="look.png", help="the picture to write (default: %(default)s)")
    parser.add_argument("--size", type=int, help="pixels of the images' short side (default: as in training, or finer)")
    asked = parser.parse_args(words)

    from dinoreg.train import pictures

    print(pictures.look(asked.weights, asked.images, asked.out, size=asked.size))
    return 0


def export(words: Sequence[str]) -> int:
    """`dinoreg export`."""
    from dinoreg.models import exporting

    parser = _parser(
        "export",
        "Write a backbone as another library reads it. WEIGHTS may be of any kind that can be read: a run directory\n"
        "(its newest teacher), a file or folder of dinoreg, DINO, DINOv2, DINOv3, DeiT-III, timm, OpenCLIP or Hugging\n"
        "Face. Which it is, is found by looking, and said.",
        """\
        formats:
          safetensors   one file with its architecture in it, for dinoreg.load_backbone
          dinov2        a state dict in the names of Meta's repository
          hf            a folder for transformers: Dinov2, Dinov2WithRegisters, CLIP vision or DINOv3 ViT
          timm          a folder for timm
          onnx          one graph for any number of images of any size; needs pip install 'dinoreg[onnx]'

        examples:
          dinoreg export runs/mine --format hf
          dinoreg export runs/mine/teacher/step_00010000.safetensors --format onnx --output mine.onnx
          dinoreg export dinov2_vits14_reg4_pretrain.pth --format timm --output vits14_reg4""",
    )
    exporting.add_arguments(parser)
    return exporting.main(parser.parse_args(words))


def doctor(words: Sequence[str]) -> int:
    """`dinoreg doctor`."""
    parser = _parser(
        "doctor",
        "Read the metrics of a run and say what is wrong with it, why that usually happens and what to try.",
        """\
        example:
          dinoreg doctor runs/mine""",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="a run directory, with metrics.jsonl in it")
    folder = parser.parse_args(words).run_dir

    from dinoreg.train.doctor import diagnose
    from dinoreg.train.tracking import read_metrics

    history = read_metrics(folder / "metrics.jsonl")
    findings = diagnose(history)
    for finding in findings:
        print(finding)
    if not findings:
        last = int(max((record["step"] for record in history if "step" in record), default=0))
        print(f"{folder}: nothing looks wrong in {len(history)} records up to step {last}")
    return 1 if findings else 0


def replay(words: Sequence[str]) -> int:
    """`dinoreg replay`."""
    parser = _parser(
        "replay",
        "Do the first step again of those that made a run give up, from the state before it, and say which images,\n"
        "losses, modules and gradients are not finite. Writes report.json and a picture of the crops beside it.",
        """\
        examples:
          dinoreg replay runs/mine/faults/step_00001234
          dinoreg replay runs/mine/faults/step_00001234 train.precision=fp32      does it happen there too?""",
    )
    parser.add_argument("folder", metavar="FAULT", type=Path, help="what the run left: run_dir/faults/step_...")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that differ from the run's")
    asked = parser.parse_intermixed_args(words)

    from dinoreg.train.replay import replay as run

    return run(asked.folder, asked.overrides)


def demo(words: Sequence[str]) -> int:
    """`dinoreg demo`."""
    from dinoreg import demo as module

    parser = _parser(
        "demo",
        "From photographs that come with scikit-image and scikit-learn to shards, a small ViT with 4 registers, its\n"
        "loss, its k-NN accuracy and a picture of what it sees.",
        """\
        example:
          dinoreg demo""",
    )
    module.add_arguments(parser)
    return module.main(parser.parse_args(words))


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": demo,
    "train": train,
    "data prepare": data_prepare,
    "data check": data_check,
    "look": look,
    "export": export,
    "doctor": doctor,
    "replay": replay,
}


def _find_command(
    commands: Mapping[str, Callable[[Sequence[str]], int]], words: Sequence[str]
) -> tuple[Callable[[Sequence[str]], int] | None, Sequence[str]]:
    for length in (2, 1):
        command = commands.get(" ".join(words[:length]))
        if command is not None:
            return command, words[length:]
    return None, words


def _parser(command: str, description: str, epilog: str) -> ArgumentParser:
    indent = len(epilog) - len(epilog.lstrip())
    examples = "\n".join(line[indent:] if line[:indent].isspace() else line for line in epilog.splitlines())
    return ArgumentParser(
        f"dinoreg {command}", description=description, epilog=examples, formatter_class=RawDescriptionHelpFormatter
    )


def require_sources(sources: Sequence[object]) -> None:
    """Raises ConfigError where a run is given no images."""
    from dinoreg.config import ConfigError

    if not sources:
        raise ConfigError("no images: give a folder, shards or URLs, as in data.sources=/my/images", key="data.sources")


def _is_first_process() -> bool:
    """Whether this process speaks for all of its launch."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _is_for_users(error: Exception) -> bool:
    """Whether the message alone is what helps: our own words about a user's input, or a missing file.

    A ValueError from elsewhere is a fault of the program, and its traceback is wanted.
    """
    from dinoreg.config import ConfigError

    if isinstance(error, ConfigError) or (isinstance(error, OSError) and error.filename is not None):
        return True
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = Path(raised_in).is_relative_to(Path(__file__).parent)
    return ours and (isinstance(error, ValueError | FloatingPointError) or _is_data_error(error))


def _is_data_error(error: Exception) -> bool:
    from dinoreg.data.images import DataError

    return isinstance(error, DataError)
