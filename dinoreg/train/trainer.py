"""The training run: everything is built in `Trainer.__init__`, in order, and `Trainer.run` is the loop."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.profiler import record_function

from dinoreg.data.batch import Batch
from dinoreg.data.images import REASONS
from dinoreg.data.loader import BatchLoader, build_loader, prefetch_to_device
from dinoreg.data.masks import MaskConfig
from dinoreg.data.photometric import develop
from dinoreg.data.sources import open_sources
from dinoreg.models.vit import VisionTransformer, build_vit
from dinoreg.models.weights import initialise
from dinoreg.objectives.observation import Observation
from dinoreg.objectives.self_distillation import SelfDistillation
from dinoreg.parallel.mesh import Ranks, setup_ranks
from dinoreg.parallel.shard import parallelize
from dinoreg.train import pictures
from dinoreg.train.checkpoint import Checkpointer
from dinoreg.train.clock import Clock
from dinoreg.train.flops import peak_flops, step_flops
from dinoreg.train.guard import Guard
from dinoreg.train.knn import KnnMonitor
from dinoreg.train.monitors import measure, weight_distance
from dinoreg.train.optimizer import Optimizer
from dinoreg.train.plan import warnings_of
from dinoreg.train.process import logging_to, unhurried_garbage_collection
from dinoreg.train.recipe import RunConfig, check_world
from dinoreg.train.report import Report, changes
from dinoreg.train.schedules import Schedules, StepValues

logger = logging.getLogger("dinoreg")


def train(cfg: RunConfig) -> Path:
    """Run, or go on with, the training that `cfg` describes.

    Works alone, under torchrun and under srun: who this process is comes from the environment.

    Returns:
        The teacher's last weights, a file for `dinoreg.load_backbone`.
    """
    ranks = setup_ranks()
    try:
        with logging_to(Path(cfg.run_dir) / "logs", ranks), warnings.catch_warnings():
            # Features are views of one packed tensor; what FSDP warns of is work on them in place, and there is none.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            try:
                return Trainer(cfg, ranks).run()
            except BaseException:
                logger.debug("ended by", exc_info=True)  # to the log of the rank that it happened on
                raise
    finally:
        ranks.close()


class Trainer:
    """One run on one rank."""

    def __init__(self, cfg: RunConfig, ranks: Ranks) -> None:
        check_world(cfg, ranks.world)
        self.cfg, self.ranks, self.run_dir = cfg, ranks, Path(cfg.run_dir)
        self.sources = open_sources(cfg.data)
        self.schedules = Schedules(cfg, self.sources.num_samples)
        self._agree_on_sources()
        self.checkpointer = Checkpointer(self.run_dir, cfg.checkpoint, ranks)
        checkpoint = self.checkpointer.latest()
        self.objective = build_objective(cfg, ranks, from_weights=checkpoint is None)
        self.optimizer = Optimizer(self.objective.student, cfg.optim)
        self.guard = Guard(ranks)
        self.start = self._resume(checkpoint) if checkpoint else 0
        self.loader = self._open_loader()
        self.knn = KnnMonitor(cfg.monitor, cfg.model, cfg.photometric, ranks) if cfg.monitor.knn_every else None
        self.clock = Clock()
        self.flops, self.peak_flops = step_flops(cfg), peak_flops(ranks.device)
        if ranks.is_main:
            logger.info(self.schedules.describe())
            for warning in warnings_of(cfg, self.sources.num_samples):
                logger.warning(f"careful: {warning}")
        length = self.schedules.total_steps
        self.report = Report(cfg, length, self.start, self.sources.num_samples, speaks=ranks.is_main)

    def run(self) -> Path:
        """Train to the end. Steps are counted when they are done: step 1 is the first."""
        last = self.schedules.total_steps
        batches = iter(prefetch_to_device(self.loader, self.ranks.device))
        with self.report, unhurried_garbage_collection() as collect_garbage:
            if self.start == 0:
                self._look_in(0)
            for step in range(self.start + 1, last + 1):
                with self.clock.waiting():
                    batch = next(batches)
                values = self.schedules.at(step - 1)
                observe = step % self.cfg.monitor.every == 0
                for sample in batch.bad:
                    logger.debug(f"skipped a sample: {sample}")
                metrics, observation = train_step(
                    self.objective, self.optimizer, self.guard, batch, values, self.cfg, self._row_seed(step), observe
                )
                self.clock.count(self.cfg.train.batch_size)
                saving = step % self.cfg.checkpoint.every == 0 or step == last
                if saving or observe or step == 1 or step % self.cfg.train.log_every == 0:
                    self.log(step, metrics, values, observation)
                    collect_garbage()
                self.report.step_done(step)
                with self.clock.paused():
                    if saving:
                        self.save(step)
                    self._look_in(step, batch)
        return self._finish(last)

    def log(self, step: int, metrics: dict[str, Tensor], values: StepValues, observation: Observation | None) -> None:
        """Bring the step's numbers to the host: the one place where the device is waited for."""
        if observation is not None:
            metrics = metrics | measure(observation, self.cfg.monitor, self.ranks)
            distance = weight_distance(self.objective.teacher, self.objective.student, self.ranks)
            metrics["teacher/ema_distance"] = distance
        numbers = self._mean_over_ranks(metrics) | self._bad_so_far()
        numbers |= {f"plateau/{term}": plateau for term, plateau in self.objective.plateaus.items()}
        interval = self.clock.read()
        numbers |= {
            "lr": values.lr,
            "weight_decay": values.weight_decay,
            "teacher_momentum": values.teacher_momentum,
            "teacher_temperature": values.teacher_temperature,
            "throughput/images_per_second": interval.images_per_second,
            "throughput/data_wait_share": interval.data_wait_share,
        }
        numbers |= self._utilisation(interval.images_per_second)
        self.report.record(step, numbers)
        # Gradients too: the loss is that of the weights before the update, a checkpoint holds those after it.
        for name, value in numbers.items():
            if name.startswith(("loss/total", "grad_norm/")) and not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} of step {step} is {value}: nothing was saved since; lower optim.lr, or start again with "
                    f"the same command from {self.checkpointer.latest() or 'the beginning'}"
                )

    def save(self, step: int) -> None:
        """The resumable checkpoint, and the teacher in one file."""
        self.checkpointer.save(step, self.objective, self.optimizer, about={})
        self.checkpointer.save_teacher(step, self.objective.teacher["backbone"], self.cfg.model, self.cfg.photometric)
        self.checkpointer.wait()

    def teacher(self) -> VisionTransformer:
        """The teacher's backbone as a plain module on every rank, whatever it is sharded over."""
        state = get_model_state_dict(self.objective.teacher["backbone"], options=StateDictOptions(full_state_dict=True))
        with torch.device("meta"):
            backbone = build_vit(self.cfg.model, drop_path=False)  # in fp32, which not every backend takes
        backbone.load_state_dict(state, assign=True)
        return backbone.requires_grad_(False).eval().to(self.ranks.device)

    def _finish(self, step: int) -> Path:
        """Say where the result lies."""
        weights = self.checkpointer.teachers / f"step_{step:08d}.safetensors"
        if self.ranks.is_main:
            if self.start == step:
                logger.info(f"{self.run_dir} already has all its {step} steps; give another run_dir to start afresh")
            logger.info(f"teacher: {weights}")
        self.ranks.barrier()
        return weights

    def _agree_on_sources(self) -> None:
        """Ranks that see different files would train on different images, or wait for each other for ever."""
        seen = self.ranks.broadcast_object(self.sources.num_samples)
        if seen != self.sources.num_samples:
            raise ValueError(
                f"data.sources: rank {self.ranks.rank} finds {self.sources.num_samples} images, the first rank {seen}; "
                "mount the same files on every node"
            )

    def _resume(self, checkpoint: Path) -> int:
        step: int = self.checkpointer.load(checkpoint, self.objective, self.optimizer)["step"]
        if step > self.schedules.total_steps:
            raise ValueError(
                f"{checkpoint} has done {step} steps, more than the {self.schedules.total_steps} asked for"
            )
        if self.ranks.is_main:
            logger.info(f"going on from {checkpoint}")
            for change in changes(self.run_dir / "config.yaml", self.cfg):
                logger.warning(f"careful: {change}")
        return step

    def _open_loader(self) -> BatchLoader:
        cfg, side = self.cfg, self.cfg.crops.global_size // self.cfg.model.patch_size
        return build_loader(
            self.sources,
            cfg.data,
            cfg.crops,
            cfg.photometric,
            cfg.masks if cfg.objective.ibot.weight > 0 else MaskConfig(probability=0.0),
            grid=(side, side),
            channels=cfg.model.in_channels,
            batch_size=cfg.train.batch_size,
            seed=cfg.seed,
            rank=self.ranks.rank,
            world=self.ranks.world,
            start_step=self.start,
            steps=self.schedules.total_steps,
            local_world=self.ranks.local_world,
        )

    def _row_seed(self, step: int) -> int:
        """Which rows drop path keeps: new each step and on each rank, the same after a restart."""
        return hash((self.cfg.seed, step, self.ranks.rank)) % 2**62

    def _look_in(self, step: int, batch: Batch | None = None) -> None:
        """The k-NN and the pictures, when their time has come."""
        every, last = self.cfg.tracking.pictures_every, step == self.schedules.total_steps
        classify = self.knn is not None and (last or step % self.cfg.monitor.knn_every == 0)
        draw = batch is not None and every > 0 and (last or step == 1 or step % every == 0)
        if not (classify or draw):
            return
        teacher = self.teacher()
        if classify and self.knn is not None:
            self.report.record(step, {"knn/top1": self.knn(teacher)})
        if draw and batch is not None and self.ranks.is_main:
            self._draw(step, batch, teacher)
        self.ranks.barrier()

    def _draw(self, step: int, batch: Batch, teacher: VisionTransformer) -> None:
        """Augmented crops, and what the teacher sees in two of them before their colours were changed."""
        folder, photometric = self.run_dir / "pictures", self.cfg.photometric
        crops = pictures.crops_picture(develop(batch, photometric), photometric, folder / f"crops_{step:08d}.png")
        photos = list(batch.global_crops[:2, 0])
        attention = pictures.look(teacher, photos, folder / f"attention_{step:08d}.png", photometric)
        self.report.picture(step, "crops", crops)
        self.report.picture(step, "attention", attention)

    def _mean_over_ranks(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        values = self.ranks.sum_(torch.stack([value.detach().float() for value in metrics.values()])) / self.ranks.world
        return dict(zip(metrics, values.tolist(), strict=True))

    def _utilisation(self, images_per_second: float) -> dict[str, float]:
        numbers: dict[str, float] = {}
        if self.peak_flops:
            share = images_per_second / (self.peak_flops * self.ranks.world)
            nominal, executed = self.flops
            numbers |= {"throughput/mfu": nominal * share, "throughput/mfu_executed": executed * share}
        if self.ranks.device.type == "cuda":
            numbers["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return numbers

    def _bad_so_far(self) -> dict[str, float]:
        counts = self.ranks.sum_(
            torch.tensor([self.loader.bad[reason] for reason in REASONS], device=self.ranks.device)
        ).tolist()
        by_reason = {f"data/bad/{reason}": count for reason, count in zip(REASONS, counts, strict=True) if count}
        return {"data/bad": sum(counts), **by_reason}


def train_step(
    objective: SelfDistillation,
    optimizer: Optimizer,
    guard: Guard,
    batch: Batch,
    values: StepValues,
    cfg: RunConfig,
    row_seed: int,
    observe: bool = False,
) -> tuple[dict[str, Tensor], Observation | None]:
    """One update of student and teacher on this rank's share of a step, already on the device; none if `guard` objects.

    Nothing here waits for the device. The regions are named for the profiler, see benchmarks/step.py.

    Returns:
        Device scalars of this rank, and what the monitors look at when `observe`.
    """
    with record_function("develop"):
        parts = [develop(part, cfg.photometric) for part in batch.split(cfg.train.accumulate)]
    optimizer.set_values(values)
    metrics, observation = objective.forward_backward(
        parts, teacher_temperature=values.teacher_temperature, seed=row_seed, observe=observe
    )
    with record_function("optimizer"):
        metrics |= optimizer.clip()
        skip = guard(metrics)
        optimizer.step(skip)
    with record_function("ema"):
        objective.update_teacher(values.teacher_momentum, skip)
    return metrics, observation


def build_objective(cfg: RunConfig, ranks: Ranks, from_weights: bool = True) -> SelfDistillation:
    """Student, teacher and heads, initialised, then spread over the ranks.

    Every rank fills the same weights from the seed, so the result does not depend on how many there are. Memory is
    filled with NaN first: a parameter that nothing initialises makes the first loss NaN instead of a silent zero.
    from_weights: start from `model.init_from`, if given; not needed where a checkpoint will overwrite everything.
    """
    with torch.device("meta"):
        objective = SelfDistillation(cfg.objective, cfg.model, ranks, attention=cfg.efficiency.attention)
    objective.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in objective.state_dict().values():
            if tensor.is_floating_point():
                tensor.fill_(math.nan)
    torch.manual_seed(cfg.seed)
    objective.init_weights()
    if cfg.model.init_from and from_weights:
        report = initialise(objective.student["backbone"], cfg.model.init_from)  # type: ignore[arg-type]
        objective.teacher["backbone"].load_state_dict(objective.student["backbone"].state_dict())
        if ranks.is_main:
            logger.info(str(report))
    _check_filled(objective)
    parallelize(objective.student, objective.teacher, cfg.efficiency, cfg.train.precision, ranks)
    return objective.to(ranks.device)


def _check_filled(module: nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise RuntimeError(f"{name} was not initialised; its module's init_weights() has to fill it")
