"""The training run: everything is built in `Trainer.__init__`, in order, and `Trainer.run` is the loop."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.profiler import record_function

from dinoreg.allocator import keep_freed_memory
from dinoreg.config import ConfigError
from dinoreg.data.batch import Batch
from dinoreg.data.images import REASONS, DataError
from dinoreg.data.loader import prefetch_to_device
from dinoreg.data.photometric import develop
from dinoreg.data.progress import merge_positions
from dinoreg.data.sources import Sources, open_sources
from dinoreg.models.vit import VisionTransformer, build_vit
from dinoreg.objectives.observation import Observation
from dinoreg.objectives.self_distillation import SelfDistillation
from dinoreg.parallel.judge import WITH_OTHERS
from dinoreg.parallel.mesh import Ranks, setup_ranks
from dinoreg.parallel.precision import resolve_precision
from dinoreg.parallel.watch import Watch
from dinoreg.train import pictures
from dinoreg.train.about import About
from dinoreg.train.build import build_objective, open_loader
from dinoreg.train.checkpoint import Checkpointer, CheckpointError
from dinoreg.train.clock import Clock
from dinoreg.train.faults import Recent, Trace
from dinoreg.train.flops import peak_flops, step_flops
from dinoreg.train.guard import Guard
from dinoreg.train.knn import KnnMonitor
from dinoreg.train.monitors import measure, weight_distance
from dinoreg.train.optimizer import Optimizer
from dinoreg.train.plan import warnings_of
from dinoreg.train.process import logging_to, unhurried_garbage_collection
from dinoreg.train.recipe import RunConfig, check_world
from dinoreg.train.report import Report
from dinoreg.train.rundir import claimed
from dinoreg.train.schedules import Schedules, StepValues
from dinoreg.train.stopping import Stopped, StopRequests, parse_time
from dinoreg.train.tracking import known_run_id

logger = logging.getLogger("dinoreg")

_GO_ON, _STOP, _NO_DATA = range(3)  # what a rank wishes before a step; the greatest wish of all ranks wins


class NoData(DataError):
    """A rank has no data to go on with; raised by all ranks together, with everything saved."""


_TOGETHER = (Stopped, NoData, FloatingPointError, CheckpointError)  # what all ranks raise at the same place


def train(cfg: RunConfig) -> Path:
    """Run, or go on with, the training that `cfg` describes.

    Works alone, under torchrun and under srun: who this process is comes from the environment.

    Returns:
        The teacher's last weights, a file for `dinoreg.load_backbone`.

    Raises:
        Stopped: a signal or the time limit came; everything is saved, and the same call goes on.
        DataError: a rank has no data; what was done is saved.
        FloatingPointError: `train.max_skipped` steps in a row were not finite.
    """
    limit = None if cfg.train.time_limit is None else parse_time(cfg.train.time_limit)
    with StopRequests(limit) as stop:
        ranks = setup_ranks()
        if ranks.device.type == "cpu":
            keep_freed_memory()
        # Written down, so that the run goes on in the same numbers wherever it does.
        precision = ranks.from_main(lambda: resolve_precision(cfg.train.precision, ranks.device))
        cfg = replace(cfg, train=replace(cfg.train, precision=precision))
        try:
            logs = Path(cfg.run_dir) / "logs"
            with Watch(ranks, cfg.watch, _TOGETHER) as watch, claimed(cfg, ranks), logging_to(logs, ranks):
                # The others map what the main process found: 1,000 ranks must not each look at 100,000 shards.
                sources = ranks.from_main(lambda: open_sources(cfg.data, Path(cfg.run_dir) / "data_index"))
                return _run(cfg, ranks, sources, stop, watch)
        finally:
            ranks.close()


def _run(cfg: RunConfig, ranks: Ranks, sources: Sources, stop: StopRequests, watch: Watch) -> Path:
    with warnings.catch_warnings():
        # Features are views of one packed tensor; what FSDP warns of is work on them in place, and there is none.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        try:
            with closing(Trainer(cfg, ranks, sources, stop, watch)) as trainer:
                return trainer.run()
        except BaseException:
            logger.debug("ended by", exc_info=True)  # to the log of the rank that it happened on
            raise


class Trainer:
    """One run on one rank."""

    def __init__(self, cfg: RunConfig, ranks: Ranks, sources: Sources, stop: StopRequests, watch: Watch) -> None:
        watch.mark(0, "building the run")
        check_world(cfg, ranks.world)
        sources.check_here()
        self.cfg, self.ranks, self.sources, self.stop, self.watch = cfg, ranks, sources, stop, watch
        self.run_dir = Path(cfg.run_dir)
        self.fingerprint = sources.fingerprint()
        self.schedules = Schedules(cfg, sources.num_samples)
        self.checkpointer = Checkpointer(self.run_dir, cfg.checkpoint, ranks)
        checkpoint = self._where_to_start()
        self.objective = build_objective(cfg, ranks, from_weights=checkpoint is None)
        self.optimizer = Optimizer(self.objective.student, cfg.optim)
        self.about = self._resume(checkpoint) if checkpoint else About()
        self.start = self.saved = self.about.step
        self.bad = Counter(self.about.bad if ranks.is_main else {})  # of steps that are trained, unlike the loader's
        self.guard, self.recent, self.skipped = Guard(ranks, self.about.skipped), Recent(cfg, ranks), self.about.skipped
        self.loader = open_loader(cfg, self.sources, ranks, self.about, self.schedules.total_steps)
        self.knn = KnnMonitor(cfg.monitor, cfg.model, cfg.photometric, ranks) if cfg.monitor.knn_every else None
        self.clock = Clock()
        self.flops, self.peak_flops = step_flops(cfg), peak_flops(ranks.device)
        if ranks.is_main:
            logger.info(self.schedules.describe())
            for warning in warnings_of(cfg, self.sources.num_samples):
                logger.warning(f"careful: {warning}")
        length = self.schedules.total_steps
        self.report = Report(cfg, length, self.about, self.sources.num_samples, speaks=ranks.is_main)

    def run(self) -> Path:
        """Train to the end. Steps are counted when they are done: step 1 is the first."""
        last = self.schedules.total_steps
        batches = iter(prefetch_to_device(self.loader, self.ranks.device))
        with self.report, unhurried_garbage_collection() as collect_garbage:
            if self.start == 0:
                self._look_in(0)
            for step in range(self.start + 1, last + 1):
                batch = self._next(batches, step)
                values = self.schedules.at(step - 1)
                observe = step % self.cfg.monitor.every == 0
                for sample in batch.bad:
                    logger.debug(f"skipped a sample: {sample}")
                self.watch.mark(step, "training")
                seed = row_seed(self.cfg.seed, step, self.ranks.rank)
                metrics, observation = train_step(
                    self.objective, self.optimizer, self.guard, batch, values, self.cfg, seed, observe,
                    before_update=self.checkpointer.staged,
                )  # fmt: skip
                self.recent.append(Trace(step, batch.keys, metrics))
                self.clock.count(self.cfg.train.batch_size)
                saving = step % self.cfg.checkpoint.every == 0 or step == last
                if saving or observe or step == 1 or step % self.cfg.train.log_every == 0:
                    self.log(step, metrics, values, observation)
                    collect_garbage()
                self.report.step_done(step)
                self.bad.update(sample.reason for sample in batch.bad)
                with self.clock.paused():
                    self.watch.mark(step, "k-NN, pictures or saving")
                    self._look_in(step, batch)
                    if saving:
                        self.save(step)
        return self._finish(last)

    def log(self, step: int, metrics: dict[str, Tensor], values: StepValues, observation: Observation | None) -> None:
        """Bring the step's numbers to the host: the one place where the device is waited for."""
        if observation is not None:
            metrics = metrics | measure(observation, self.cfg.monitor, self.ranks)
            distance = weight_distance(self.objective.teacher, self.objective.student, self.ranks)
            metrics["teacher/ema_distance"] = distance
        numbers = self._mean_over_ranks(metrics | self.guard.counts())
        bad = self._bad_so_far()
        numbers |= {"data/bad": sum(bad.values())} | {f"data/bad/{name}": count for name, count in bad.items() if count}
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
        self._heed_skips(step, int(numbers["skipped/total"]), int(numbers["skipped/in_row"]))

    def _heed_skips(self, step: int, total: int, in_row: int) -> None:
        """Say that steps were skipped, or give up when there is no end to it."""
        if total > self.skipped and self.ranks.is_main:
            logger.warning(
                f"step {step}: {total - self.skipped} of the latest steps had a loss or gradient that is not finite "
                "and were skipped; nothing of them remains"
            )
        self.skipped = total
        if in_row < self.cfg.train.max_skipped:
            return
        folder = self.recent.leave(self.run_dir, in_row)
        with closing(Checkpointer(folder, self.cfg.checkpoint, self.ranks)) as checkpointer:
            checkpointer.save(step, self.objective, self.optimizer, asdict(self._about(step)))
            checkpointer.wait()
        raise FloatingPointError(
            f"{in_row} steps in a row, from step {step - in_row + 1} on, had no finite loss or gradient; weights are "
            f"as before them. See what broke: dinoreg replay {folder}. To go on: a new run_dir, a lower optim.lr and "
            f"train.go_on_from={self.run_dir}"
        )

    def _next(self, batches: Iterator[Batch], step: int) -> Batch:
        """The batch of `step`, once every rank has its own and nobody wants to stop; else the end of the run.

        All ranks leave at the same step, or those that go on would wait for the others for ever. They agree on the
        host, while the device still computes.
        """
        batch, trouble = None, None
        self.watch.mark(step, "waiting for data")
        with self.clock.waiting():
            try:
                batch = next(batches)
            except DataError as error:
                trouble = error
        self.watch.mark(step, WITH_OTHERS)
        wish = _NO_DATA if trouble else _STOP if self.stop.reason else _GO_ON
        verdict = self.ranks.agree(wish)
        if batch is None or verdict != _GO_ON:
            self._leave(step - 1, verdict, trouble)
        return batch

    def _leave(self, done: int, verdict: int, trouble: DataError | None) -> NoReturn:
        """Save what is done, and say why it ends here. Every rank comes here together."""
        if done > self.saved:
            self.save(done)
        self.watch.mark(done, "saving")
        self.checkpointer.wait()
        saved = f"step {done} is saved" if done else "nothing was done yet"
        if verdict == _STOP:
            reasons = self.ranks.gather_objects(self.stop.reason)
            reason = next(reason for reason in reasons if reason)
            raise Stopped(f"stopped by {reason}; {saved}; the same command goes on")
        troubles = self.ranks.gather_objects(None if trouble is None else str(trouble))
        rank, words = next((rank, words) for rank, words in enumerate(troubles) if words)
        who = f"rank {rank}: " if self.ranks.world > 1 else ""
        raise NoData(f"{who}{words} ({saved})")

    def save(self, step: int) -> None:
        """Start to write the resumable checkpoint, and the teacher in one file."""
        self.report.sync()
        self.checkpointer.save(step, self.objective, self.optimizer, asdict(self._about(step)))
        self._save_teacher(step)
        self.saved = step

    def _save_teacher(self, step: int) -> None:
        self.checkpointer.save_teacher(step, self.objective.teacher["backbone"], self.cfg.model, self.cfg.photometric)

    def teacher(self) -> VisionTransformer:
        """The teacher's backbone as a plain module on every rank, whatever it is sharded over."""
        state = get_model_state_dict(self.objective.teacher["backbone"], options=StateDictOptions(full_state_dict=True))
        with torch.device("meta"):
            backbone = build_vit(self.cfg.model, drop_path=False)  # in fp32, which not every backend takes
        backbone.load_state_dict(state, assign=True)
        return backbone.requires_grad_(False).eval().to(self.ranks.device)

    def _finish(self, step: int) -> Path:
        """Wait for the disk, and say where the result lies."""
        self.checkpointer.wait()
        weights = self.checkpointer.teacher_path(step)
        if self.ranks.is_main:
            if self.start == step:
                logger.info(f"{self.run_dir} already has all its {step} steps; give another run_dir to start afresh")
            logger.info(f"teacher: {weights}")
        self.ranks.barrier()
        return weights

    def close(self) -> None:
        """End the data workers, and let the checkpoint that is being written come to its end."""
        self.loader.close()
        self.checkpointer.close()

    def _where_to_start(self) -> Path | None:
        """This run's newest checkpoint, or that of the run that it goes on from."""
        checkpoint, origin = self.checkpointer.latest(), self.cfg.train.go_on_from
        if checkpoint is not None or origin is None:
            return checkpoint
        if not (Path(origin) / "checkpoints").is_dir():
            self.checkpointer.check(Path(origin))
            return Path(origin)
        with closing(Checkpointer(Path(origin), self.cfg.checkpoint, self.ranks)) as other:
            checkpoint = other.latest(of_another_run=True)
        if checkpoint is None:
            raise ConfigError(f"{origin} has no checkpoint", key="train.go_on_from")
        return checkpoint

    def _about(self, step: int) -> About:
        """What the checkpoint of `step` says about the run."""
        return About(
            step=step,
            images=step * self.cfg.train.batch_size,
            world=self.ranks.world,
            data=self.fingerprint,
            streams=merge_positions(self.ranks.gather_objects(self.loader.position(step))),
            bad={reason: count for reason, count in self._bad_so_far().items() if count},
            skipped=int(self.guard.total),
            wandb=known_run_id(self.run_dir),
        )

    def _resume(self, checkpoint: Path) -> About:
        about = About.of(self.checkpointer.load(checkpoint, self.objective, self.optimizer))
        if checkpoint.parent == self.run_dir / "checkpoints":
            self.ranks.from_main(lambda: about.check_data(self.fingerprint, origin=self.cfg.run_dir))
            if self.ranks.from_main(lambda: not self.checkpointer.teacher_path(about.step).exists()):
                self._save_teacher(about.step)  # it was killed, or found no room, between the two
        else:  # another run's: this one has shards, samples and a wandb run of its own
            about = replace(about, streams=None, bad={}, wandb=None)
        step = about.step
        if step > self.schedules.total_steps:
            raise ValueError(
                f"{checkpoint} has done {step} steps, more than the {self.schedules.total_steps} asked for"
            )
        if self.ranks.is_main:
            logger.info(f"going on from {checkpoint}")
        return about

    def _look_in(self, step: int, batch: Batch | None = None) -> None:
        """The k-NN and the pictures, when their time has come."""
        every, last = self.cfg.tracking.pictures_every, step == self.schedules.total_steps
        classify = self.knn is not None and (last or step % self.cfg.monitor.knn_every == 0)
        draw = batch is not None and every > 0 and (last or step == 1 or step % every == 0)
        if not (classify or draw):
            return
        teacher = self.teacher()
        if classify and self.knn is not None:
            top1 = self.knn(teacher, lambda: self.watch.mark(step, "k-NN"))
            self.report.record(step, {"knn/top1": top1})
        if draw and batch is not None and self.ranks.is_main:
            try:
                self._draw(step, batch, teacher)
            except OSError as error:
                logger.warning(f"pictures of step {step} cannot be written: {error.strerror or error}")
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

    def _bad_so_far(self) -> dict[str, int]:
        """Samples that could not be used, by reason, on all ranks and since the run began."""
        counts = torch.tensor([self.bad[reason] for reason in REASONS], device=self.ranks.device)
        return dict(zip(REASONS, self.ranks.sum_(counts).tolist(), strict=True))


def row_seed(seed: int, step: int, rank: int) -> int:
    """Of the rows that drop path keeps: new each step and on each rank, the same after a restart."""
    return hash((seed, step, rank)) % 2**62


def train_step(
    objective: SelfDistillation,
    optimizer: Optimizer,
    guard: Guard,
    batch: Batch,
    values: StepValues,
    cfg: RunConfig,
    row_seed: int,
    observe: bool = False,
    before_update: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Tensor], Observation | None]:
    """One update of student and teacher on this rank's share of a step, already on the device; none if `guard` objects.

    Nothing here waits for the device. The regions are named for the profiler, see benchmarks/step.py.

    Args:
        before_update: called when gradients are there and parameters are about to change.

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
        before_update()
        skip = guard(metrics)
        optimizer.step(skip)
    with record_function("ema"):
        objective.update_teacher(values.teacher_momentum, skip)
    return metrics, observation
