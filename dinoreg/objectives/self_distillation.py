"""DINOv2's self-distillation: DINO on class tokens, iBOT on masked patches, KoLeo to spread features."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dinoreg.models.heads import HeadConfig


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
class TargetConfig:
    """How teacher outputs become targets."""

    centering: Literal["sinkhorn", "centering"] = "sinkhorn"
    sinkhorn_iterations: int = 3
    center_momentum: float = 0.9
    student_temperature: float = 0.1
    temperature: float = 0.07
    temperature_start: float = 0.04
    temperature_warmup: int | float | str = 0.3  # linear from temperature_start


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
