"""Are norms one cloud or two, and where is the cutoff between what is usual and what stands out?"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dinoreg.config import ConfigError
from eval.inside.artifacts.bins import Counts, Floats, centres, moments, quantiles, share_above

ROUNDS, STILL = 300, 1e-7  # of expectation-maximisation, at most; gain a token at which it stands still
NARROWEST = math.log(2) / 64  # of a cloud: one bin, for a histogram knows nothing finer
SHALLOW = 0.5  # a valley is at most this share of the lower of its two peaks
FEWEST, LEAST = 20, 1e-4  # tokens, and share of all, that are a cloud and not a few accidents
APART = 1.5  # times as long as the usual tokens are outliers at the least; in the paper 2 to 10 times
PEELED = 3  # clouds that may lie below the main one
STARTS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999)  # shares at which the two halves of a fit start apart
RULES = "a number, valley, 3std, or a quantile as q0.98"


@dataclass(frozen=True)
class Clouds:
    """One Gaussian or two on the logarithms of norms, and whether there are two clouds.

    centres: norms at the two Gaussians' means, the lower first; shares: their weights; spreads: their standard
    deviations in units of ln(norm). bic_gain: by how much the two beat the one by BIC, a token, in nats. depth: density
    in the valley by that of the lower peak, 1 where there is one peak, of the fit or of the tokens, whichever is less
    deep. valley: the norm between the peaks at which tokens are rarest.
    """

    two: bool
    bic_gain: float
    depth: float
    centres: tuple[float, float]
    shares: tuple[float, float]
    spreads: tuple[float, float]
    valley: float | None
    tokens: int

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Cutoff:
    """Tokens of a larger norm are outliers; none are where it is None. how: what it is and how it came about."""

    value: float | None
    rule: str
    how: str

    def number(self) -> float:
        return math.inf if self.value is None else self.value


def check_rule(rule: str) -> None:
    """Raises ConfigError."""
    if rule in ("valley", "3std"):
        return
    text = rule.removeprefix("q")
    try:
        number = float(text)
    except ValueError:
        raise ConfigError(f"is {RULES}, not {rule}", "cutoff") from None
    if not (0 < number < 1 if rule != text else number > 0 and math.isfinite(number)):
        raise ConfigError(f"is {RULES}, not {rule}", "cutoff")


def find_cutoff(counts: Counts, rule: str) -> Cutoff:
    """By a rule that passes `check_rule`, from the histogram (BINS,) of the norms of patch tokens."""
    if (rule == "3std" or rule.startswith("q")) and _all_alike(counts):  # or all might lie beyond their own mean
        return Cutoff(None, rule, "all norms are the same, so that there is no cutoff and nothing is an outlier")
    if rule == "3std":  # Jiang et al. 2025
        mean, std = moments(counts)
        return Cutoff(mean + 3 * std, rule, f"mean + 3 standard deviations = {mean:.4g} + 3 x {std:.4g}")
    if rule.startswith("q"):
        value = quantiles(counts, [float(rule[1:])])[0]
        return Cutoff(value, rule, f"the quantile {rule[1:]} of all norms")
    if rule != "valley":
        return Cutoff(float(rule), "fixed", "given by hand")
    clouds = find_upper_cloud(counts)
    if clouds is None:
        return Cutoff(None, rule, "the norms are one cloud, so that there is no cutoff and nothing is an outlier")
    low, high = clouds.centres
    if high < APART * low:
        return Cutoff(
            None, rule, f"there are two clouds of norms, but around {low:.4g} and {high:.4g}, which is less than "
            f"{APART} times as long: nothing is an outlier",
        )  # fmt: skip
    return Cutoff(clouds.valley, rule, f"the valley between two clouds of norms, around {low:.4g} and {high:.4g}")


def _all_alike(counts: Counts) -> bool:
    """As far as the histogram knows."""
    kept = np.flatnonzero(counts)
    return len(kept) == 0 or bool(kept[-1] - kept[0] <= 1)


def find_upper_cloud(counts: Counts) -> Clouds | None:
    """The split that has a minority of the tokens above it; None where there is none.

    Where the main cloud is the upper one, the tokens below are left out and the rest is split again.
    """
    left, total = counts, counts.sum()
    for _ in range(PEELED):
        clouds = fit_clouds(left)
        if not clouds.two:
            return None
        if (share_above(counts, clouds.valley) or 0.0) <= 0.5:
            return clouds
        left = np.where(centres() > (clouds.valley or 0.0), left, 0)
        if left.sum() < max(FEWEST, LEAST * total):
            return None
    return None


def fit_clouds(counts: Counts) -> Clouds:
    """Fits both to a histogram (BINS,).

    There are two clouds where two Gaussians are better by BIC, and both their sum and the tokens have two peaks with a
    valley between. BIC alone would call every skewed cloud two, for the tokens of many images are so many that any
    difference from a Gaussian is certain. Of the fits that are reached from several starts one with two peaks is
    preferred, for where there are three clouds, the best may be a narrow Gaussian upon a broad one.
    """
    kept = np.flatnonzero(counts)
    total = int(counts.sum())
    if len(kept) < 2:
        at = float(centres()[kept[0]]) if len(kept) else math.nan
        return Clouds(False, 0.0, 1.0, (at, at), (1.0, 0.0), (0.0, 0.0), None, total)
    x, weight = np.log(centres()[kept]), counts[kept] / total
    mean = float(weight @ x)
    spread = max(math.sqrt(float(weight @ (x - mean) ** 2)), NARROWEST)
    alone = float(weight @ _log_normal(x, mean, spread))
    fits = [_judge(x, weight, *_climb(x, weight, start), alone, total) for start in _starts(x, weight)]
    return max(fits, key=lambda fit: (fit.two, fit.bic_gain))


def _judge(
    x: Floats, weight: Floats, together: float, means: Floats, spreads: Floats, shares: Floats, alone: float, total: int
) -> Clouds:
    """together, alone: the mean log density a token of two Gaussians and of one."""
    order = np.argsort(means)
    means, spreads, shares = means[order], spreads[order], shares[order]
    gain = together - alone - 1.5 * math.log(max(total, 2)) / total  # 3 more numbers, each worth half a log n
    between = np.linspace(means[0], means[1], 401)
    _, fitted = _lowest(_mixture(between, means, spreads, shares))
    at, seen = _lowest(_smoothed(between, x, weight, 0.5 * math.sqrt(spreads[0] * spreads[1])))
    depth = max(fitted, seen)
    enough = shares.min() * total >= FEWEST and shares.min() >= LEAST
    two = gain > 0 and depth <= SHALLOW and bool(enough)
    low, high = np.exp(means).tolist()
    return Clouds(
        two, gain, depth, (low, high), (float(shares[0]), float(shares[1])), (float(spreads[0]), float(spreads[1])),
        math.exp(between[at]) if two else None, total,
    )  # fmt: skip


def _log_normal(x: Floats, mean: float | Floats, spread: float | Floats) -> Floats:
    return -0.5 * ((x - mean) / spread) ** 2 - np.log(spread) - 0.5 * math.log(2 * math.pi)


def _starts(x: Floats, weight: Floats) -> list[float]:
    """Where to cut the norms in two at first: at quantiles, for shares, and at even distances, for clouds far away."""
    below = weight.cumsum()
    cuts = {float(x[min(int(np.searchsorted(below, share)), len(x) - 2)]) for share in STARTS}
    return sorted(cuts | set(np.linspace(x[0], x[-1], 14)[1:-1].tolist()))


def _climb(x: Floats, weight: Floats, cut: float) -> tuple[float, Floats, Floats, Floats]:
    """Expectation-maximisation from a cut: mean log density a token, means (2,), spreads (2,), shares (2,)."""
    upper = (x > cut).astype(np.float64)
    belongs = np.stack([1 - upper, upper])
    before = -math.inf
    for _ in range(ROUNDS):
        mass = belongs * weight
        shares = mass.sum(1).clip(1e-300)
        means = mass @ x / shares
        spreads = np.sqrt((mass * (x - means[:, None]) ** 2).sum(1) / shares).clip(NARROWEST)
        each = np.log(shares)[:, None] + _log_normal(x, means[:, None], spreads[:, None])
        both = np.logaddexp(each[0], each[1])
        belongs = np.exp(each - both)
        reached = float(weight @ both)
        if reached - before < STILL:
            break
        before = reached
    return reached, means, spreads, shares


def _mixture(at: Floats, means: Floats, spreads: Floats, shares: Floats) -> Floats:
    """Its log density."""
    return np.logaddexp(*(np.log(shares)[:, None] + _log_normal(at, means[:, None], spreads[:, None])))


def _smoothed(at: Floats, x: Floats, weight: Floats, width: float) -> Floats:
    """The log density of the tokens themselves, smoothed by a Gaussian."""
    each = _log_normal(at[:, None], x, width) + np.log(weight)
    most = each.max(1, keepdims=True)
    return most[:, 0] + np.log(np.exp(each - most).sum(1))


def _lowest(density: Floats) -> tuple[int, float]:
    """Where a log density is lowest, and how low by the lower one of the peaks on either side."""
    at = int(density.argmin())
    return at, float(np.exp(density[at] - min(density[: at + 1].max(), density[at:].max())))
