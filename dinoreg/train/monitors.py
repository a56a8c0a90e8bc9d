"""Signs of collapse and of artifacts, computed on the device from what a step produced anyway."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from dinoreg.config import ConfigError
from dinoreg.parallel.mesh import Ranks

if TYPE_CHECKING:
    from dinoreg.objectives.observation import Observation

# Images over all ranks whose features and norms are looked at. RankMe is cubic in this number, and at 512 rows it is
# a few milliseconds; its value then cannot exceed 512, which `features/rank_limit` tells.
ROWS = 512
TOLD, CHOSEN = 0.25, 0.01  # below these shares a prototype is dead, see target_statistics
RANKME_EPS = 1e-7  # RankMe (Garrido et al. 2023), eq. 1, for fp32


@dataclass
class MonitorConfig:
    """What is watched beside the losses."""

    every: int = 100  # steps between feature monitors (RankMe, norms, entropies)
    outlier_norm: float = 0.0  # patch norm called an outlier; 0: mean + 3 std of the batch
    knn_train: str | None = None  # labelled folder or shards for the k-NN's memory
    knn_test: str | None = None  # labelled folder or shards that the k-NN classifies; default: a held-out fifth
    knn_every: int = 0  # steps; 0: never
    knn_k: int = 20

    def check(self) -> None:
        """Raises ConfigError on what cannot be measured."""
        if self.every < 1:
            raise ConfigError("must be at least 1", key="every")
        if self.outlier_norm < 0:
            raise ConfigError("a norm is not negative", key="outlier_norm")
        if self.knn_every < 0:
            raise ConfigError("must be 0 (never) or a number of steps", key="knn_every")
        if self.knn_every and self.knn_train is None:
            raise ConfigError(
                "a k-NN needs monitor.knn_train, a folder of class folders or labelled shards", key="knn_every"
            )
        if self.knn_k < 1:
            raise ConfigError("must be at least 1", key="knn_k")


@torch.no_grad()
def measure(observation: Observation, cfg: MonitorConfig, ranks: Ranks) -> dict[str, Tensor]:
    """All monitors of one step, over all ranks, as scalars that stay on the device.

    Every rank must call it. The singular values make a GPU wait, so call it at logging steps only.
    """
    return {
        **target_statistics(observation.dino_targets, observation.dino_cross_entropy, ranks),
        **feature_statistics(observation.teacher_cls, observation.student_cls, ranks),
        **norm_statistics(observation.tokens_prenorm, observation.num_registers, cfg.outlier_norm, ranks),
    }


def target_statistics(targets: Tensor, cross_entropy: Tensor, ranks: Ranks) -> dict[str, Tensor]:
    """Entropies in nats of the teacher's targets (n, K), and how its K prototypes are used.

    teacher/entropy           mean over samples of H(target)
    teacher/marginal_entropy  H(mean target); minus the former it is what a target tells about its sample
    teacher/kl                KL(teacher || student) = cross-entropy - teacher/entropy; near 0 both have collapsed
                              (DINO, section 5.3)
    prototypes/perplexity     exp of the marginal entropy: prototypes in use, K at most
    prototypes/dead_share     prototypes that are hardly ever chosen (less than CHOSEN of an equal share) or chosen by
        all samples almost alike: that such a prototype was chosen says less than TOLD of what the average one says
        about the sample. The second half is needed because Sinkhorn-Knopp forces mass onto every prototype.
        `prototypes/samples`, the number of samples, tells how far one batch can show this: it cannot where samples are
        few against K.
    """
    targets = targets.float()
    samples = len(targets) * ranks.world
    surprise = torch.special.entr(targets)  # (n, K): -t ln t
    mass, doubt = ranks.sum_(torch.stack([targets.sum(0), surprise.sum(0)])) / samples  # (K,) each
    entropy, marginal = doubt.sum(), torch.special.entr(mass)
    # Mutual information of sample and prototype, H(mean target) - mean H(target), split by prototype: each summand is
    # mass * (ln n - H(sample | prototype)), hence never negative but for rounding.
    told = (marginal - doubt).clamp_min(0)
    dead = (told <= TOLD * mass * told.sum()) | (mass < CHOSEN / len(mass))
    return {
        "teacher/entropy": entropy,
        "teacher/marginal_entropy": marginal.sum(),
        "teacher/kl": _mean_over_ranks(cross_entropy, ranks) - entropy,
        "prototypes/perplexity": marginal.sum().exp(),
        "prototypes/dead_share": dead.float().mean(),
        "prototypes/samples": torch.full_like(entropy, samples),
    }


def feature_statistics(teacher_cls: Tensor, student_cls: Tensor, ranks: Ranks) -> dict[str, Tensor]:
    """How the class tokens (n, D), after the final norm, fill their space.

    features/rankme      effective rank, exp of the entropy of the singular values (RankMe, eq. 1), of at most ROWS rows
    features/rank_limit  the largest value it could take, min(rows, D)
    features/cls_std     distance from their mean over their length (both root mean squares): centred 1, constant 0
    features/cls_cosine  mean cosine between different samples
    teacher/student_cosine  mean cosine between teacher and student of the same crop
    """
    agreement = F.cosine_similarity(teacher_cls.float(), student_cls.float(), dim=1).mean()
    features = _some_rows(teacher_cls, ranks)
    rows, width = features.shape
    unit = F.normalize(features, dim=1)
    # |sum of unit vectors|^2 holds each pair twice and each vector with itself once.
    cosine = (unit.sum(0).square().sum() - rows) / (rows * (rows - 1)) if rows > 1 else unit.new_tensor(math.nan)
    return {
        "features/rankme": rankme(features),
        "features/rank_limit": cosine.new_full((), min(rows, width)),
        "features/cls_std": (features.var(0, correction=0).sum() / features.square().sum(1).mean()).sqrt(),
        "features/cls_cosine": cosine,
        "teacher/student_cosine": _mean_over_ranks(agreement, ranks),
    }


def rankme(features: Tensor) -> Tensor:
    """RankMe (Garrido et al. 2023, eq. 1) of fp32 features (n, D); NaN where they are not finite."""
    finite = features.isfinite().all()
    # The decomposition raises on NaN, and a monitor must report an accident, not add one.
    singular = torch.linalg.svdvals(torch.where(finite, features, 0.0))
    share = singular / singular.sum() + RANKME_EPS
    return torch.where(finite, torch.special.entr(share).sum().exp(), math.nan)


def norm_statistics(tokens: Tensor, registers: int, outlier_norm: float, ranks: Ranks) -> dict[str, Tensor]:
    """L2 norms of the teacher's tokens (n, 1+R+N, D) before the final norm, which would hide outliers.

    norms/patch_q50 q90 q99 max  quantiles of the patch norms
    norms/outlier_share          share of patches above norms/outlier_cutoff
    norms/outlier_cutoff         `outlier_norm` or, where that is 0, mean + 3 std of this batch (Jiang et al. 2025)
    norms/cls, norms/register_i  means
    """
    norms = _some_rows(tokens.float().norm(dim=2), ranks)  # (rows, 1+R+N)
    patches = norms[:, 1 + registers :].flatten()
    cutoff = patches.new_full((), outlier_norm) if outlier_norm > 0 else patches.mean() + 3 * patches.std()
    return {
        "norms/patch_q50": patches.quantile(0.5),
        "norms/patch_q90": patches.quantile(0.9),
        "norms/patch_q99": patches.quantile(0.99),
        "norms/patch_max": patches.max(),
        "norms/outlier_share": (patches > cutoff).float().mean(),
        "norms/outlier_cutoff": cutoff,
        "norms/cls": norms[:, 0].mean(),
        **{f"norms/register_{i}": norms[:, 1 + i].mean() for i in range(registers)},
    }


@torch.no_grad()
def weight_distance(teacher: nn.Module, student: nn.Module, ranks: Ranks) -> Tensor:
    """|teacher - student| / |student| over all weights (teacher/ema_distance): 0 when they are one and the same.

    Sharded weights are compared shard by shard, without moving them. Every rank must call it.
    """
    squares = torch.zeros(2, device=ranks.device)
    for average, weight in zip(_local_weights(teacher), _local_weights(student), strict=True):
        squares += torch.stack([(average - weight).norm(), weight.norm()]).square()
    apart, size = ranks.sum_(squares).sqrt()
    return apart / size


def _local_weights(module: nn.Module) -> Iterator[Tensor]:
    """This rank's part of each parameter. Replicas are counted by every rank, which leaves the ratio as it is."""
    for parameter in module.parameters():
        yield (parameter.to_local() if isinstance(parameter, DTensor) else parameter).float()


def _some_rows(values: Tensor, ranks: Ranks) -> Tensor:
    """The first rows of every rank, ROWS at most in all, in fp32."""
    return ranks.gather(values[: max(1, ROWS // ranks.world)].float().contiguous())


def _mean_over_ranks(value: Tensor, ranks: Ranks) -> Tensor:
    return ranks.sum_(value.detach().float().clone()) / ranks.world
