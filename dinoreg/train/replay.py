"""`dinoreg replay`: the step that a run could not take, done again with eyes open."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinoreg.config import ConfigError, load
from dinoreg.data.batch import Batch, Crops
from dinoreg.data.photometric import develop
from dinoreg.data.sources import open_sources
from dinoreg.models.vit import Features
from dinoreg.objectives.self_distillation import SelfDistillation
from dinoreg.parallel.mesh import Ranks, setup_ranks
from dinoreg.train.about import About
from dinoreg.train.build import build_objective, open_loader
from dinoreg.train.checkpoint import Checkpointer
from dinoreg.train.faults import FAULT
from dinoreg.train.optimizer import Optimizer
from dinoreg.train.pictures import crops_picture
from dinoreg.train.recipe import RunConfig, check_world
from dinoreg.train.schedules import Schedules
from dinoreg.train.trainer import row_seed

SHOWN = 5  # names of a kind that are printed; report.json has all


@dataclass
class Replay:
    """What one rank saw. Names are in the order in which things happened."""

    losses: dict[str, float]
    batch: int  # images
    largest: tuple[str, float]  # the weight of the greatest size, and that size
    modules: list[str] = field(default_factory=list)  # whose output was not finite
    gradients: list[str] = field(default_factory=list)  # parameters whose gradient was not finite
    images: list[str] = field(default_factory=list)  # whose features were not finite
    keys: list[str] = field(default_factory=list)  # of all images, to be compared with the run's

    @property
    def finite(self) -> bool:
        numbers = [*self.losses.values(), self.largest[1]]
        return not (self.modules or self.gradients or self.images) and all(map(math.isfinite, numbers))


def replay(folder: Path, overrides: Sequence[str] = ()) -> int:
    """Do the first skipped step of a fault again, report what is not finite, and return 1 for that, 0 for nothing.

    Run it under as many processes as the run had for exactly the same; on another number drop path keeps other rows.
    Raises ConfigError or OSError where `folder` is no fault of a run.
    """
    fault, cfg = _read(folder, overrides)
    ranks = setup_ranks()
    try:
        check_world(cfg, ranks.world)
        step: int = fault["steps"][0]["step"]
        found, batch = _do_again(cfg, ranks, folder, step)
        everyone = ranks.gather_objects(found)
        if ranks.is_main:
            (folder / "report.json").write_text(json.dumps([asdict(each) for each in everyone], indent=1))
            picture = crops_picture(develop(batch, cfg.photometric), cfg.photometric, folder / "crops.png")
            _show(everyone, fault, ranks, picture)
        return 0 if all(each.finite for each in everyone) else 1
    finally:
        ranks.close()


def _read(folder: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], RunConfig]:
    if not (folder / FAULT).is_file():
        raise ConfigError(f"{folder} is no fault of a run: it has no {FAULT}; give run_dir/faults/step_...")
    # Compiled or recomputed, modules would be seen not at all, or twice.
    plain = ["efficiency.compile=false", "efficiency.activation_checkpointing=none"]
    return json.loads((folder / FAULT).read_text()), load(RunConfig, folder / "config.yaml", [*plain, *overrides])


def _do_again(cfg: RunConfig, ranks: Ranks, folder: Path, step: int) -> tuple[Replay, Batch]:
    sources = open_sources(cfg.data)
    if sources.num_samples is None:
        raise ConfigError(
            f"streamed images cannot be fetched again; their names are in {folder / FAULT}", "data.sources"
        )
    schedules = Schedules(cfg, sources.num_samples)
    objective = build_objective(cfg, ranks, from_weights=False)
    optimizer = Optimizer(objective.student, cfg.optim)
    checkpointer = Checkpointer(folder, cfg.checkpoint, ranks)
    checkpoint = checkpointer.latest(of_another_run=True)
    if checkpoint is None:
        raise ConfigError(f"{folder} has lost its checkpoint, the state before the step")
    checkpointer.load(checkpoint, objective, optimizer)
    batch = open_loader(cfg, sources, ranks, About(step=step - 1), total=step).maker[step - 1].to(ranks.device)
    parts = [develop(part, cfg.photometric) for part in batch.split(cfg.train.accumulate)]
    found = Replay({}, len(batch), _largest_weight(objective))
    with _watched(objective, found.modules):
        metrics, _ = objective.forward_backward(
            parts,
            teacher_temperature=schedules.at(step - 1).teacher_temperature,
            seed=row_seed(cfg.seed, step, ranks.rank),
        )
    found.losses = {name: float(value) for name, value in metrics.items()}
    found.gradients = [
        name for name, p in objective.student.named_parameters() if p.grad is not None and not _finite(p.grad)
    ]
    found.keys = [f"{source} {key}" for source, key in batch.keys]
    broken = [row for part, crops in enumerate(parts) for row in _broken_images(objective, crops, part)]
    found.images = [found.keys[row] for row in broken]
    return found, batch


@torch.no_grad()
def _largest_weight(objective: nn.Module) -> tuple[str, float]:
    """Of this rank's shards; NaN counts as larger than all."""
    sizes = {name: float(_local(p).abs().max()) for name, p in objective.named_parameters() if _local(p).numel()}
    return max(sizes.items(), key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1])


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _finite(tensor: Tensor) -> bool:
    return bool(_local(tensor).isfinite().all())


@contextmanager
def _watched(objective: SelfDistillation, broken: list[str]) -> Iterator[None]:
    """Notes the modules whose output is not finite, in the order in which they ran."""

    def note(name: str, output: Any) -> None:
        if name not in broken and not all(_finite(tensor) for tensor in _tensors(output)):
            broken.append(name)

    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: note(name, output))
        for name, module in objective.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Features):
        return [output.prenorm]
    return [tensor for each in output for tensor in _tensors(each)] if isinstance(output, list | tuple) else []


@torch.no_grad()
def _broken_images(objective: SelfDistillation, crops: Crops, part: int) -> list[int]:
    """Rows of the batch whose features the teacher or the student, which sees the masks, cannot give finitely."""
    images = len(crops.global_crops)
    fine = torch.ones(images, dtype=torch.bool, device=crops.global_crops.device)
    for network, masked in ((objective.teacher, False), (objective.student, True)):
        features = network.look_at(crops, masked=masked)
        fine &= features.prenorm.isfinite().flatten(1).all(1).view(images, -1).all(1)
    return [part * images + row for row in (~fine).nonzero()[:, 0].tolist()]


def _show(found: Sequence[Replay], fault: dict[str, Any], ranks: Ranks, picture: Path) -> None:
    console = Console()
    first = fault["steps"][0]
    then = first["ranks"][0]["metrics"]
    console.print(
        f"step {first['step']}, the first of {len(fault['steps'])} in a row that were skipped", soft_wrap=True
    )
    if ranks.world != fault["world"]:
        console.print(f"the run had {fault['world']} processes, this has {ranks.world}: drop path keeps other rows")
    table = Table("", "in the run", "now", box=None, pad_edge=False)
    for name, now in found[0].losses.items():
        table.add_row(name, _number(float(then.get(name, math.nan))), _number(now))
    console.print(table)
    for line in _sentences(found):
        console.print(line, soft_wrap=True, highlight=False)
    if [key for each in found for key in each.keys] != [name for rank in first["ranks"] for name in rank["images"]]:
        console.print("[bold red]these are not the run's images:[/] the data, or options of theirs, have changed since")
    elif all(each.finite for each in found):
        console.print("all is finite now: what broke the step was not in the weights, the images or the arithmetic")
    console.print(f"crops: {picture}", soft_wrap=True, highlight=False)


def _sentences(found: Sequence[Replay]) -> Iterator[str]:
    """What the ranks found, put together."""
    name, value = max((each.largest for each in found), key=lambda pair: pair[1])
    yield f"[bold]largest weight[/]        {value:.3g} in {name}"
    modules = _together(found, lambda each: each.modules)
    for network in ("teacher", "student"):
        broken = [name for name in modules if name.startswith(network)]
        first = f"first after {broken[0]}, then in {len(broken) - 1} modules more" if broken else "all finite"
        yield f"[bold]{network}'s outputs[/]     {first}"
    gradients, images = _together(found, lambda each: each.gradients), _together(found, lambda each: each.images)
    yield f"[bold]gradients not finite[/]  {_some(gradients)}"
    total = sum(each.batch for each in found)
    yield f"[bold]images not finite[/]     {f'all {total}' if len(images) == total else _some(images)}"


def _together(found: Sequence[Replay], names: Callable[[Replay], list[str]]) -> list[str]:
    return list(dict.fromkeys(name for each in found for name in names(each)))


def _some(names: Sequence[str]) -> str:
    """How many, and the first few by name."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)}: {escape(', '.join(names[:SHOWN]))}{more}" if names else "none"


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else f"[red]{value}[/]"
