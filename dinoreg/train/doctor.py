"""Reads the metrics of a run and says in words what is wrong with it.

Self-distillation fails quietly: the loss of a collapsed run looks like that of one that has not begun to learn, and
each kind of collapse wants another remedy. What tells them apart is here, as one rule a failure. Rules about the
collapse are tried from the most to the least specific and the first that holds is reported, because one failure
brings the symptoms of the others along (features that are all equal also have rank 1 and a loss of ln K).

A network at its beginning looks collapsed: class tokens almost equal, targets uniform, loss at ln K. Nothing of that
kind is therefore said before PATIENCE steps, while the learning rate still rises (for at most LONG_PATIENCE steps),
or while the sign in question recovers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

PATIENCE = 100  # steps during which a bad sign must last
LONG_PATIENCE = 1000  # steps for which a rising learning rate excuses it
MONITORED = "teacher/entropy"  # present in the records that hold the monitors, which are rarer than the losses

NOTHING_MOVES = 1e-7  # a learning rate below it changes no fp32 weight of usual size; a gradient norm neither
CONSTANT_STD = 0.05  # of features/cls_std: the class tokens differ by a twentieth of their length, a cosine of 0.9975
CONSTANT_MARGINAL = 0.05  # of ln K: all targets together use K ** 0.05 prototypes (2 of 65536)
UNIFORM_GAP = 0.005  # of ln K: cosines with random prototypes alone make targets sharper than that
RANK_SHARE = 0.01  # of the largest possible RankMe, and never less than MIN_RANK directions
MIN_RANK = 2.0
DEAD_SHARE = 0.5
PLATEAU_GAP = 0.005  # of ln K
MOVING = 0.1  # a sign recovers when it grows by this share of itself within the window,
NOISE = 0.02  # and by more than this share of its threshold
FALLING = 0.3  # of PLATEAU_GAP, within the window
STARVING = 0.3  # share of the time spent waiting for data
BAD_SAMPLES = 0.01
KNN_DROP = 0.1  # of the first k-NN accuracy


@dataclass(frozen=True)
class Diagnosis:
    """One finding: what is seen, why that usually happens, and what to try."""

    name: str
    what: str
    cause: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}. Likely cause: {self.cause}. Try: {self.remedy}."


def diagnose(history: Sequence[Mapping[str, float]]) -> list[Diagnosis]:
    """Findings about a run from its metrics in order, under the names of metrics.jsonl; empty for a healthy run.

    The history may begin in the middle of a run and may mix records with and without monitors.
    """
    signs = _Signs(history)
    if (broken := _non_finite(signs)) is not None:
        return [broken]
    findings = []
    if signs.settled:
        findings.append(next((found for rule in COLLAPSES if (found := rule(signs)) is not None), None))
    findings += [_data_starving(signs), _bad_samples(signs), _knn_falling(signs)]
    return [finding for finding in findings if finding is not None]


class _Signs:
    """The latest stretch of a history: the monitors of the last PATIENCE steps, and of three records at least."""

    def __init__(self, history: Sequence[Mapping[str, float]]) -> None:
        self.history = list(history)
        self.last_step = self.history[-1]["step"] if self.history else 0.0
        monitored = [record for record in self.history if MONITORED in record]
        recent = [record for record in monitored if record["step"] >= self.last_step - PATIENCE]
        self.window = recent if len(recent) >= 3 else monitored[-3:]

    @property
    def settled(self) -> bool:
        """Whether a bad sign may be taken seriously by now."""
        if len(self.window) < 3:
            return False
        span = self.last_step - self.history[0]["step"]
        if self.last_step < PATIENCE or span < 0.9 * PATIENCE:  # the first record comes a logging interval late
            return False
        return span >= LONG_PATIENCE or not self._lr_rises()

    def _lr_rises(self) -> bool:
        rates = [(record["step"], record["lr"]) for record in self.history if "lr" in record]
        before = [rate for step, rate in rates if step <= self.last_step - PATIENCE] or [rate for _, rate in rates[:1]]
        return bool(rates) and rates[-1][1] > before[-1] * (1 + 1e-6)

    def recent(self, name: str) -> list[float]:
        """The values of a metric in the window; empty when one record lacks it, so that no rule holds by omission."""
        values = [record[name] for record in self.window if name in record]
        return values if len(values) == len(self.window) else []

    def every(self, name: str, holds: Callable[[float], bool]) -> bool:
        """Whether a metric is known and fulfils a condition throughout the window."""
        values = self.recent(name)
        return bool(values) and all(holds(value) for value in values)

    def grows(self, values: Sequence[float], threshold: float) -> bool:
        """Whether a sign that should be above its threshold is on its way: the window's second half against the first.

        Below a small share of the threshold, growth is noise.
        """
        half = len(values) // 2
        if not half:
            return False
        return fmean(values[-half:]) > fmean(values[:half]) * (1 + MOVING) + NOISE * threshold

    def everything(self, name: str) -> list[float]:
        return [record[name] for record in self.history if name in record]

    @property
    def plateau(self) -> float:
        """ln K, the loss of a student that has learnt nothing."""
        return self.window[-1].get("plateau/dino", math.nan)


# --------------------------------------------------------------------------------------------- what collapse looks like


def _teacher_is_student(signs: _Signs) -> Diagnosis | None:
    """The average can only equal the student if it is the student: the student moves and the distance stays 0."""
    if not signs.every("teacher/ema_distance", lambda distance: distance == 0) or _nothing_moves(signs):
        return None
    return Diagnosis(
        "teacher is student",
        "the teacher's weights equal the student's although the student is learning",
        "the teacher shares its parameters with the student by reference, or its momentum is 0",
        "copy the parameters when the teacher is built (not the module), and check objective.teacher.momentum",
    )


def _nothing_moves(signs: _Signs) -> bool:
    return signs.every("lr", lambda lr: lr < NOTHING_MOVES) or signs.every(
        "grad_norm/backbone", lambda norm: norm < NOTHING_MOVES
    )


def _backbone_rests(signs: _Signs) -> Diagnosis | None:
    """Without updates the run keeps every sign of the untrained network; the lack of updates names it."""
    if not _nothing_moves(signs):
        return None
    no_rate = signs.every("lr", lambda lr: lr < NOTHING_MOVES)
    stuck = signs.every("loss/dino_global", lambda loss: loss > (1 - PLATEAU_GAP) * signs.plateau)
    return Diagnosis(
        "loss stuck at ln K" if stuck else "backbone at rest",
        f"the backbone does not change (and the loss of a student that knows nothing is ln K = {signs.plateau:.2f})",
        "the learning rate is zero" if no_rate else "no gradient reaches the backbone",
        "raise optim.lr" if no_rate else "look for a detach() or no_grad() between backbone and loss",
    )


def _constant_output(signs: _Signs) -> Diagnosis | None:
    """Features do not depend on the image, or all targets sit on the same few prototypes."""
    spread = signs.recent("features/cls_std")
    same_features = signs.every("features/cls_std", lambda std: std < CONSTANT_STD) and not signs.grows(
        spread, CONSTANT_STD
    )
    same_targets = signs.every("teacher/marginal_entropy", lambda entropy: entropy < CONSTANT_MARGINAL * signs.plateau)
    if not same_features and not same_targets:
        return None
    seen = (
        f"every image gives the same class token (mean cosine {signs.window[-1]['features/cls_cosine']:.4f})"
        if same_features
        else f"all targets fall on the same {signs.window[-1]['prototypes/perplexity']:.1f} prototypes"
    )
    return Diagnosis(
        "constant output",
        seen,
        "centering too weak against the sharpening, a learning rate too high, or inputs that are all alike",
        "look at the picture of the crops, use objective.targets.centering=sinkhorn, halve optim.lr, raise "
        "objective.koleo.weight",
    )


def _rank_collapse(signs: _Signs) -> Diagnosis | None:
    """Features vary, but along hardly any direction."""
    ranks, limits = signs.recent("features/rankme"), signs.recent("features/rank_limit")
    if not ranks or not limits:
        return None
    threshold = max(MIN_RANK, RANK_SHARE * min(limits))
    spread = signs.window[-1].get("features/cls_std", 0.0) >= CONSTANT_STD
    beyond_one = [rank - 1 for rank in ranks]
    if max(ranks) >= threshold or not spread or signs.grows(beyond_one, threshold - 1):
        return None
    return Diagnosis(
        "rank collapse",
        f"the class tokens use {ranks[-1]:.1f} of {limits[-1]:.0f} directions (RankMe)",
        "nothing spreads the features apart, or a layer before the output passes only a few directions",
        "raise objective.koleo.weight, use a larger batch, and lower optim.weight_decay_end",
    )


def _uniform_output(signs: _Signs) -> Diagnosis | None:
    """Targets say nothing about their image: both entropies are ln K."""
    gaps = [signs.plateau - entropy for entropy in signs.recent("teacher/entropy")]
    threshold = UNIFORM_GAP * signs.plateau
    if not gaps or not max(gaps) < threshold or signs.grows(gaps, threshold):
        return None
    return Diagnosis(
        "uniform output",
        f"the teacher's targets are uniform (entropy {signs.plateau - gaps[-1]:.2f} of ln K = {signs.plateau:.2f})",
        "the teacher's temperature is too high, so that nothing is sharpened",
        "lower objective.targets.temperature (0.04 to 0.07 is usual), or lengthen its warm-up",
    )


def _dead_prototypes(signs: _Signs) -> Diagnosis | None:
    """Most prototypes tell nothing about the images, in batches large enough to show it."""
    shares = signs.recent("prototypes/dead_share")
    if not shares or median(shares) <= DEAD_SHARE:
        return None
    for record in signs.window:
        if record["teacher/marginal_entropy"] - record["teacher/entropy"] < UNIFORM_GAP * signs.plateau:
            return None  # no prototype can tell what the targets do not contain
        # A target spreads over exp(entropy) prototypes: together the samples must be able to reach all K.
        if record["prototypes/samples"] * math.exp(record["teacher/entropy"]) < math.exp(signs.plateau):
            return None
    return Diagnosis(
        "dead prototypes",
        f"{median(shares):.0%} of the prototypes say nothing about the images",
        "more prototypes than the data can fill, or prototypes that drifted away while they were not chosen",
        "lower objective.dino.head.prototypes, lengthen optim.freeze_last_layer, or use "
        "objective.targets.centering=sinkhorn",
    )


def _stuck_at_plateau(signs: _Signs) -> Diagnosis | None:
    """Targets are informative and the student does not follow them: its loss is at ln K or above."""
    threshold, losses = PLATEAU_GAP * signs.plateau, signs.recent("loss/dino_global")
    if not losses or not min(losses) > signs.plateau - threshold:
        return None
    half = len(losses) // 2
    if fmean(losses[:half]) - fmean(losses[-half:]) > FALLING * threshold:
        return None
    return Diagnosis(
        "loss stuck at ln K",
        f"the loss stays at its plateau, ln K = {signs.plateau:.2f}: the student does not learn the teacher's targets",
        "a learning rate too low or too high, or a batch too small for the number of prototypes",
        "change optim.lr by a factor of 3 either way, lower objective.dino.head.prototypes, or raise train.batch_size",
    )


COLLAPSES: tuple[Callable[[_Signs], Diagnosis | None], ...] = (
    _teacher_is_student,
    _backbone_rests,
    _constant_output,
    _rank_collapse,
    _uniform_output,
    _dead_prototypes,
    _stuck_at_plateau,
)


# ------------------------------------------------------------------------------------------------ what else goes wrong


def _non_finite(signs: _Signs) -> Diagnosis | None:
    trained = [record for record in signs.history if "loss/total" in record]  # not every record: some hold the k-NN
    if not trained:
        return None
    latest = trained[-1]
    broken = [name for name, value in latest.items() if _is_learning(name) and not math.isfinite(value)]
    if not broken:
        return None
    return Diagnosis(
        "non-finite numbers",
        f"{', '.join(broken)} at step {latest['step']:.0f}",
        "a learning rate too high, or a precision too low for one of the inputs",
        "go back to the last checkpoint with half of optim.lr or a smaller optim.clip; train.precision=fp32 tells "
        "whether precision is to blame",
    )


def _is_learning(name: str) -> bool:
    return name.startswith(("loss/", "grad_norm/", "teacher/", "features/"))


def _data_starving(signs: _Signs) -> Diagnosis | None:
    shares = signs.everything("throughput/data_wait_share")[-10:]
    if len(shares) < 10 or median(shares) <= STARVING:
        return None
    return Diagnosis(
        "data starving",
        f"{median(shares):.0%} of the time is spent waiting for data",
        "too few workers, slow storage, or images much larger than the crops",
        "raise data.workers, or store the images smaller and in shards: dinoreg data prepare",
    )


def _bad_samples(signs: _Signs) -> Diagnosis | None:
    """The counter begins anew with each start, hence the difference over the history."""
    counts, images = signs.everything("data/bad"), signs.everything("images")
    if len(counts) < 2 or images[-1] <= images[0]:
        return None
    share = (counts[-1] - counts[0]) / (images[-1] - images[0])
    if share <= BAD_SAMPLES:
        return None
    return Diagnosis(
        "bad samples",
        f"{share:.1%} of the samples could not be read",
        "truncated downloads, or files that are no images",
        "read the reasons in data/bad/* and the names in the run's logs, and prepare the data again",
    )


def _knn_falling(signs: _Signs) -> Diagnosis | None:
    scores = signs.everything("knn/top1")
    if len(scores) < 3 or any(score > (1 - KNN_DROP) * scores[0] for score in scores[-2:]):
        return None
    return Diagnosis(
        "k-NN below its start",
        f"the teacher's k-NN accuracy fell from {scores[0]:.1%} to {scores[-1]:.1%}",
        "the weights it started from are being unlearnt",
        "lower optim.lr, raise objective.teacher.momentum, or lengthen optim.warmup",
    )
