"""How fast a training step could be on a GPU that is not at hand: its operations, counted one by one and priced.

    python -m benchmarks.roofline [RECIPE ...] [key=value ...] [--gpu H200] [--out FILE.json]
    python -m benchmarks.roofline vitl16_short_in1k train.batch_size=64

An operation takes as long as its arithmetic at the rate that kernels of its kind reach, or as the bytes that it has to
read and write, whichever is longer, and a launch. "Compiled" makes one kernel of each run of operations between two
products of a block: it reads once what comes from elsewhere, and writes once what is wanted later. No compiler is as
good: sums over rows, such as a bias's gradient, want kernels of their own. "Losses too" treats the pieces of logits in
the same way, each by itself. `efficiency.compile` asks for both.

A bound, not a measurement. Left out are photometrics, and the host, which has to issue the launches meanwhile. Caches
are not modelled, for an H200's is hardly faster than its memory.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.fake import load_recipe
from benchmarks.machine import describe_machine
from benchmarks.operations import Kind, Operation, Stretch, operations_of
from dinoreg.config import ConfigError
from dinoreg.parallel.mesh import Ranks, setup_ranks
from dinoreg.train.cluster import GPUS
from dinoreg.train.flops import peak_of, step_flops
from dinoreg.train.recipe import RunConfig

CASES = (
    ("vitl16_short_in1k", "train.batch_size=64"),
    ("vitl14_in22k", "train.batch_size=64"),
    ("vits14_in1k", "model.arch=vit_base", "train.batch_size=128"),
    ("vits14_in1k", "train.batch_size=256"),
    ("vitg14", "train.batch_size=32"),
)
AIMED_AT = "H200"
AIMS = {  # images/s on one such GPU with 4 registers, by architecture and patch size
    ("vit_large", 16): (290, 400),
    ("vit_large", 14): (230,),
    ("vit_base", 14): (650,),
    ("vit_small", 14): (2000,),
    ("vit_giant", 14): (75,),
}
KINDS: tuple[Kind, ...] = get_args(Kind)
RATES = {1: 2.0, 2: 1.0, 4: 1 / 15, 8: 1 / 30}  # of products, by bytes of a number: fp32 and fp64 without tensor cores
WIDTH = 145  # characters that the table needs


@dataclass(frozen=True)
class Machine:
    """A GPU, and the shares of its data sheet's rates that kernels reach; launch in seconds, from kernel to kernel.

    Products: 788 of 989 TFLOP/s were seen on an H200 with 8192 x 8192 matrices, and a block's are narrower. Attention:
    flash kernels reach 200 to 300 TFLOP/s forward with heads of 64, less backward, and 261 or 54 tokens do not fill
    their tiles of 64 or 128. Bandwidth: a copy reached 0.9 there.
    """

    gpu: str
    products: float = 0.7
    attention: float = 0.2
    bandwidth: float = 0.85
    launch: float = 3e-6

    @property
    def peak(self) -> float:
        """Operations a second in bf16."""
        return peak_of(GPUS[self.gpu].name) or math.nan

    def seconds(self, operation: Operation) -> float:
        share = self.attention if operation.kind == "attention" else self.products
        computing = operation.flops / (share * self.peak * RATES[operation.width])
        moving = operation.bytes / (self.bandwidth * GPUS[self.gpu].memory_bandwidth)
        return max(computing, moving) + self.launch


def compiled(operations: Sequence[Operation], losses: bool = False) -> list[Operation]:
    """With each run of what only moves bytes, in one pass through a block, as a single operation.

    losses: in one piece of logits, too.
    """
    last_read = {stretch.storage: number for number, each in enumerate(operations) for stretch in each.reads}
    found: list[Operation] = []
    for (place, kind), run in groupby(enumerate(operations), key=lambda pair: (pair[1].place, pair[1].kind)):
        numbers, members = zip(*run, strict=True)
        fuses = kind == "moving" and (place > 0 or (losses and place < 0))
        found += [_fused(members, numbers[-1], last_read)] if fuses else members
    return found


def _fused(run: Sequence[Operation], end: int, last_read: dict[int, int]) -> Operation:
    """Storages that are born in the run and last read in it cost nothing."""
    reads: set[Stretch] = set()
    writes: set[Stretch] = set()
    for each in run:
        born = {stretch.storage for stretch in writes}
        reads |= {stretch for stretch in each.reads if stretch.storage not in born}
        writes |= set(each.writes)
    wanted = tuple(stretch for stretch in writes if last_read.get(stretch.storage, 0) > end)
    return replace(run[0], reads=tuple(reads), writes=wanted)


def bounds(cfg: RunConfig, machine: Machine, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Of the plain step, of dinoreg's, and of what a compiler would make of dinoreg's."""
    plain = operations_of(cfg, "plain", ranks)
    ours = operations_of(cfg, cfg.efficiency.activation_checkpointing, ranks)
    sides = {"plain": plain, "dinoreg": ours, "compiled": compiled(ours), "losses too": compiled(ours, losses=True)}
    return {side: price(cfg, operations, machine) for side, operations in sides.items()}


def price(cfg: RunConfig, operations: Sequence[Operation], machine: Machine) -> dict[str, Any]:
    """What the operations of a step come to. The share "in blocks" is a part of what is moving."""
    spent = [(machine.seconds(each), each) for each in operations]
    total, images = sum(seconds for seconds, _ in spent), cfg.train.batch_size
    shares = {kind: sum(seconds for seconds, each in spent if each.kind == kind) / total for kind in KINDS}
    inside = sum(seconds for seconds, each in spent if each.kind == "moving" and each.place > 0) / total
    nominal, executed = (flops * images / total / machine.peak for flops in step_flops(cfg))
    return {
        "images_per_second": images / total,
        "tflop_per_image": sum(each.flops for each in operations) / images / 1e12,
        "gb_per_image": sum(each.bytes for each in operations) / images / 1e9,
        "launches": len(operations),
        "shares": shares | {"in blocks": inside},
        "mfu": {"nominal": nominal, "executed": executed},
    }


def show(found: Sequence[dict[str, Any]], machine: Machine, console: Console) -> None:
    """A network after the other, a line for each way to train it; aims as shares of what is possible."""
    table = Table(title=f"{machine.gpu}, at most; TFLOP and GB of an image", title_justify="left")
    shares = (*KINDS, "in blocks")
    for heading in ("network, batch", "step", "TFLOP", "GB", "launches", *shares, "images/s", "MFU, executed", "aims"):
        table.add_column(heading, justify="left" if heading in ("network, batch", "step") else "right")
    for recipe, sides in ((case["recipe"], case["bounds"]) for case in found):
        aims = AIMS.get((recipe["arch"], recipe["patch_size"]), ()) if machine.gpu == AIMED_AT else ()
        name = f"{recipe['arch']}/{recipe['patch_size']}, {recipe['batch_size']}"
        for side, bound in sides.items():
            rate = bound["images_per_second"]
            table.add_row(
                name, side, f"{bound['tflop_per_image']:.3f}", f"{bound['gb_per_image']:.1f}", f"{bound['launches']:,}",
                *(f"{share:.0%}" if (share := bound["shares"][each]) else "" for each in shares), f"{rate:,.0f}",
                f"{bound['mfu']['nominal']:.0%}, {bound['mfu']['executed']:.0%}",
                "\n".join(f"{aim:,}: {aim / rate:.0%}" for aim in aims), end_section=side == "losses too",
            )  # fmt: skip
            name = ""
    console.print(table)


def cases_of(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(recipe, options) of each network: those named, or all that have an aim."""
    recipes, options = [word for word in words if "=" not in word], [word for word in words if "=" in word]
    return [(recipe, [*own, *options]) for recipe, *own in ([(recipe,) for recipe in recipes] or CASES)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.roofline", description="Bounds of a step's speed on a GPU.")
    parser.add_argument("words", nargs="*", metavar="RECIPE or key=value", help="default: the networks with an aim")
    parser.add_argument("--gpu", choices=GPUS, default=AIMED_AT)
    for key in ("products", "attention", "bandwidth"):
        default = getattr(Machine, key)
        parser.add_argument(f"--{key}", type=float, default=default, help="share reached (default: %(default)s)")
    parser.add_argument("--launch", type=float, default=Machine.launch, help="seconds (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_intermixed_args()
    machine = Machine(args.gpu, args.products, args.attention, args.bandwidth, args.launch)
    ranks, console = setup_ranks(), Console()
    console = Console(width=max(WIDTH, console.width))
    try:
        cases = [(recipe, words, load_recipe(recipe, words)) for recipe, words in cases_of(args.words)]
    except ConfigError as error:
        raise SystemExit(f"benchmarks.roofline: {error}") from None
    found = []
    for recipe, words, cfg in track(cases, "counting"):
        about = {"name": recipe, "arch": cfg.model.arch, "patch_size": cfg.model.patch_size}
        about |= {"batch_size": cfg.train.batch_size, "overrides": words}
        found.append({"recipe": about, "bounds": bounds(cfg, machine, ranks)})
    show(found, machine, console)
    if args.out:
        content = {"machine": describe_machine(ranks), "assumed": asdict(machine), "found": found}
        args.out.write_text(json.dumps(content, indent=1))
    ranks.close()


if __name__ == "__main__":
    main()
