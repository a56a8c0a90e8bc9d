"""DINOv2's self-distillation: DINO on class tokens, iBOT on masked patches, KoLeo to spread features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from dinoreg.data.batch import Crops
from dinoreg.losses.distillation import cross_entropy, masked_token_weights, pair_weights
from dinoreg.losses.koleo import groups_straddle
from dinoreg.losses.sinkhorn import Tile
from dinoreg.models.heads import HeadConfig
from dinoreg.models.vit import Features, ModelConfig
from dinoreg.objectives.ema import release, update_average
from dinoreg.objectives.network import HeadedBackbone
from dinoreg.objectives.observation import Observation
from dinoreg.objectives.spread import Spread, koleo_of_crops
from dinoreg.objectives.targets import Assignments, BalancedTargets, TargetConfig, Targets
from dinoreg.parallel.mesh import Ranks
from dinoreg.parallel.shard import set_gradient_sync


@dataclass
class DinoConfig:
    """Cross-entropy between class tokens of different crops (DINO, eq. 2)."""

    weight: float = 1.0
    head: HeadConfig = field(default_factory=HeadConfig)


@dataclass
class IbotConfig:
    """Cross-entropy on masked patch tokens (iBOT, eq. 2)."""

    weight: float = 1.0  # 0 turns masking off
    separate_head: bool = False  # False: patches share the DINO head
    head: HeadConfig = field(default_factory=HeadConfig)  # used when separate_head


@dataclass
class KoleoConfig:
    """Differential-entropy regulariser on student class tokens (DINOv2, section 4)."""

    weight: float = 0.1
    # Images among which neighbours are sought; must divide the global batch, 0 is the whole batch.
    # DINOv2 sought within each GPU's share (12 to 64 images); a number here is independent of the GPUs.
    group: int = 0


@dataclass
class TeacherConfig:
    """The teacher is a moving average of the student; its momentum rises by a cosine."""

    momentum: float = 0.994
    momentum_end: float = 1.0


@dataclass
class ObjectiveConfig:
    """All that defines what is learnt."""

    dino: DinoConfig = field(default_factory=DinoConfig)
    ibot: IbotConfig = field(default_factory=IbotConfig)
    koleo: KoleoConfig = field(default_factory=KoleoConfig)
    targets: TargetConfig = field(default_factory=TargetConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)


SHOWN_PATCHES = 512  # of iBOT's targets, in the observation of an objective without DINO


@dataclass
class _Step:
    """What the parts of a step have in common."""

    parts: int
    seed: int
    targets: BalancedTargets
    koleo: Callable[[Tensor, int], Tensor]  # of a part's class tokens (2 b, D) and the part's number


class SelfDistillation(nn.Module):
    """Student, teacher, and the loss between them.

    A term with weight 0 costs nothing, and a head that no term uses does not exist.
    """

    student: HeadedBackbone
    teacher: HeadedBackbone

    def __init__(
        self, cfg: ObjectiveConfig, model: ModelConfig, ranks: Ranks, attention: str = "auto", compile: bool = False
    ) -> None:
        """compile: what is done to logits, piece by piece; `parallelize` compiles the blocks."""
        super().__init__()
        self.cfg, self.ranks, self.compiled = cfg, ranks, compile
        terms = [term for term, weight in (("dino", cfg.dino.weight), ("ibot", cfg.ibot.weight)) if weight > 0]
        by_head = {f"{term}_head": [term] for term in terms} if cfg.ibot.separate_head else {"dino_head": terms}
        heads = {head: cfg.ibot.head if head == "ibot_head" else cfg.dino.head for head in by_head}
        self.student = HeadedBackbone(model, heads, by_head, attention=attention, drop_path=True)
        self.teacher = HeadedBackbone(model, heads, by_head, attention=attention, drop_path=False)
        self.teacher.requires_grad_(False)
        self.targets = Targets(
            cfg.targets, {term: heads[head].prototypes for term, head in self.student.head_of.items()}, ranks, compile
        )
        self.train()

    def train(self, mode: bool = True) -> SelfDistillation:
        """As usual, but the teacher is never trained."""
        super().train(mode)
        self.teacher.eval()
        return self

    @property
    def plateaus(self) -> dict[str, float]:
        """ln K of each term: the cross-entropy of a student that tells nothing apart."""
        return {term: math.log(count) for term, count in self.targets.prototypes.items()}

    def init_weights(self) -> None:
        """Fill every parameter and buffer; the teacher starts as the student."""
        self.student.init_weights()
        self.teacher.load_state_dict(self.student.state_dict())
        self.targets.init_weights()

    def update_teacher(self, momentum: float, skip: Tensor | None = None) -> None:
        """One step of the moving average; where the device scalar `skip` is 1, none, and centers go back too."""
        update_average(self.teacher, self.student, momentum, skip)
        if skip is not None:
            self.targets.take_back(skip)

    def forward_backward(
        self, parts: Sequence[Crops], *, teacher_temperature: float, seed: int, observe: bool = False
    ) -> tuple[dict[str, Tensor], Observation | None]:
        """Add to the student's gradients that of the loss of this rank's share of the batch, given in equal parts.

        The loss of the global batch is the mean of the ranks' losses, which FSDP's averaging of gradients amounts to.
        Parts bound memory and change nothing else: Sinkhorn-Knopp, centering and KoLeo see the whole global batch.
        Nothing here waits for the device.

        Args:
            seed: of the rows that drop path keeps.
            observe: also return what the monitors look at.

        Returns:
            Metrics as device scalars, whose mean over ranks is that of the global batch: `loss/total` is optimised;
            the others are unweighted means, over pairs of crops (loss/dino_global, loss/dino_local: plateau ln K),
            masked crops (loss/ibot: plateau ln K) and global crops (loss/koleo).
        """
        with record_function("teacher"):
            tiles = self._teacher_pass(parts)
            features = self._look(parts[0]) if observe else None
            release(self.teacher)
        with record_function("targets"):
            targets = self.targets(tiles, teacher_temperature)
        with record_function("student"):
            step = _Step(len(parts), seed, targets, self._koleo(parts, seed))
        means: dict[str, Tensor] = {}
        observation = None
        for index, part in enumerate(parts):
            losses, seen = self._learn(part, index, step, features)
            observation, features = observation or seen, None
            for name, value in losses.items():
                means[name] = means.get(name, torch.zeros_like(value)) + value / len(parts)
        if "ibot" in means:
            means["ibot"] = means["ibot"] / self._masked_share(parts)
        return {f"loss/{name}": value for name, value in means.items()}, observation

    @torch.no_grad()
    def _look(self, part: Crops) -> Features:
        """The teacher's features, in a pass of its own: looking changes nothing, not even in rounding."""
        return self.teacher.look_at(part, masked=False)

    @torch.no_grad()
    def _teacher_pass(self, parts: Sequence[Crops]) -> dict[str, list[Tile]]:
        """The teacher's logits, one tile a part for each term.

        The logits of a single part are kept. Of several parts only the narrow outputs of the heads' MLPs are, and
        logits are made anew whenever they are read: together they would take the memory that parts are to save.
        """
        teacher = self.teacher
        narrow = [teacher.bottlenecks(teacher.rows(*teacher.tokens(p, masked=False, local=False))) for p in parts]
        if len(parts) == 1:
            return {term: [logits] for term, logits in teacher.logits(narrow[0]).items()}
        return {t: [partial(teacher.last_layer(t), rows[t]) for rows in narrow] for t in teacher.head_of}

    def _koleo(self, parts: Sequence[Crops], seed: int) -> Callable[[Tensor, int], Tensor]:
        """KoLeo for the parts to come. Groups that cross parts need the class tokens of all parts beforehand."""
        group = self.cfg.koleo.group
        share, pieces = len(parts[0].global_crops), len(parts) * self.ranks.world
        if self.cfg.koleo.weight == 0 or len(parts) == 1 or not groups_straddle(share, group, pieces):
            return lambda cls, _: koleo_of_crops(cls, group, self.ranks)
        with torch.no_grad():
            cls = [self._student_tokens(part, seed + i, local=False)[0] for i, part in enumerate(parts)]
        return Spread.of(cls, group, self.ranks).follow

    def _student_tokens(self, part: Crops, seed: int, *, local: bool) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(part.global_crops.device).manual_seed(seed)
        return self.student.tokens(part, masked=True, local=local, generator=generator)

    def _learn(
        self, part: Crops, index: int, step: _Step, features: Features | None
    ) -> tuple[dict[str, Tensor], Observation | None]:
        """Student, losses and backward of one part, whose graph dies with this call.

        features: the teacher's of this part, when an observation is wanted.

        Returns:
            Unweighted losses and their weighted "total"; "ibot" is the mean over all global crops, masked or not.
        """
        local_count = part.local_crops.shape[1]
        with record_function("targets"):
            assigned = step.targets.assign(index, local_count)
        with record_function("student"):
            cls, patches = self._student_tokens(part, step.seed + index, local=True)
            rows = self.student.by_head(self.student.rows(cls, patches))
            cls = cls[: 2 * len(part.global_crops)]
            logits = {head: self.student[head](x) for head, x in rows.items()}
        with record_function("losses"):
            entropies = self._cross_entropies(logits, assigned)
            losses = {name: entropy.mean() for name, entropy in entropies.items() if name != "ibot"}
            if "ibot" in entropies:
                weights = masked_token_weights(part.masks, part.masked_index)
                losses["ibot"] = (weights * entropies["ibot"]).sum() / len(cls)
            if self.cfg.koleo.weight > 0:
                losses["koleo"] = step.koleo(cls, index)
            total = self._total(losses, local_count)
        with record_function("backward"):
            set_gradient_sync(self.student, index == step.parts - 1)
            (total / step.parts).backward()
        losses = {name: value.detach() for name, value in (losses | {"total": total}).items()}
        return losses, None if features is None else _observe(features, cls, assigned, entropies)

    def _cross_entropies(self, logits: dict[str, Tensor], assigned: dict[str, Assignments]) -> dict[str, Tensor]:
        """Cross-entropy of each of the student's rows, by loss. logits: (n, K) by head."""
        entropies: dict[str, Tensor] = {}
        for head, terms in self.student.terms_by_head.items():
            wanted = {name: rows for term in terms for name, rows in assigned[term].items()}
            temperature = self.cfg.targets.student_temperature
            entropy = cross_entropy(logits[head], list(wanted.values()), temperature, self.compiled)
            entropies.update(zip(wanted, entropy.split([count for count, _ in wanted.values()]), strict=True))
        return entropies

    def _total(self, losses: dict[str, Tensor], local_count: int) -> Tensor:
        """What is optimised: DINOv2's weights, in which each crop adds its own KoLeo."""
        global_share, local_share = pair_weights(local_count)
        weights = {
            "dino_global": self.cfg.dino.weight * global_share,
            "dino_local": self.cfg.dino.weight * local_share,
            "ibot": self.cfg.ibot.weight,
            "koleo": 2 * self.cfg.koleo.weight,
        }
        return torch.stack([weights[name] * value for name, value in losses.items()]).sum()

    def _masked_share(self, parts: Sequence[Crops]) -> Tensor:
        """Share of the global crops, of all ranks, that are masked; tiny where none is."""
        share = torch.stack([part.masks.any(-1).float().mean() for part in parts]).mean()
        return (self.ranks.sum_(share) / self.ranks.world).clamp_min(1e-9)


def _observe(
    teacher: Features, student_cls: Tensor, assigned: dict[str, Assignments], entropies: dict[str, Tensor]
) -> Observation:
    (name, (count, rows)) = next(iter((assigned.get("dino") or assigned["ibot"]).items()))
    shown = count if name == "dino_global" else min(count, SHOWN_PATCHES)
    return Observation(
        teacher_cls=teacher.cls,
        student_cls=student_cls.detach(),
        tokens_prenorm=teacher.prenorm,
        num_registers=teacher.registers.shape[1],
        dino_targets=rows(0, shown),
        dino_cross_entropy=entropies[name][:shown].detach().mean(),
    )
