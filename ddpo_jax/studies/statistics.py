"""What a few seeds can tell: interquartile means, stratified bootstrap intervals, the probability of improvement.

Follows Agarwal et al. 2021, arXiv:2108.13264. Scores come as one array of seeds for each panel (a reward, a category),
so panels may have different numbers of seeds. A bootstrap resamples the seeds of each panel on their own (stratified),
because panels are chosen and seeds are drawn.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

Panels = Sequence[Float[np.ndarray, " S"]]  # one array of seeds for each panel
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A statistic and its 95 % interval.

    The interval is None where a single seed leaves nothing to resample, or where the statistic of a resample cannot be
    told (NaN).
    """

    value: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:.3g}"
        return f"{self.value:.3g} [{self.interval[0]:.3g}, {self.interval[1]:.3g}]"


def as_dict(estimate: Estimate | None) -> dict[str, Any]:
    """``value`` and ``interval`` for JSON, both None where nothing can be told."""
    return {"value": None, "interval": None} if estimate is None else dataclasses.asdict(estimate)


def interquartile_mean(panels: Panels) -> float:
    """Mean of the middle half of all scores: a quarter is cut from each end, rounded down to whole scores.

    It is as robust as a median and needs fewer seeds (Agarwal et al. 2021, section 4.3).
    """
    scores = np.sort(np.concatenate([np.asarray(panel, np.float64) for panel in panels]))
    cut = int(0.25 * len(scores))
    return float(scores[cut : len(scores) - cut].mean())


def normalised_gain(ours: Panels, theirs: Panels) -> float:
    """Interquartile mean of our gains, each in units of the baseline's interquartile mean on the same panel.

    NaN where the baseline gains nothing on a panel.
    """
    units = [interquartile_mean([panel]) for panel in theirs]
    if min(units) <= 0:
        return math.nan
    return interquartile_mean([gains / unit for gains, unit in zip(ours, units, strict=True)])


def probability_of_improvement(ours: Panels, theirs: Panels) -> float:
    """How likely a run of ours beats a run of theirs on a panel, averaged over panels; ties count one half.

    Agarwal et al. 2021, section 4.3: the Mann-Whitney statistic of each panel over its number of pairs.
    """
    wins = []
    for a, b in zip(ours, theirs, strict=True):
        difference = np.asarray(a, np.float64)[:, None] - np.asarray(b, np.float64)[None, :]
        wins.append(float(np.mean((difference > 0) + 0.5 * (difference == 0))))
    return float(np.mean(wins))


def bootstrap(statistic: Callable[..., float], *groups: Panels, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """``statistic(*groups)`` with its 95 % percentile interval over stratified resamples of the seeds.

    Args:
      statistic: a function of groups of panels, such as ``interquartile_mean``.
      groups: what it takes; the seeds of every panel of every group are resampled independently.
      seed: of the resampling.
      resamples: their number.
    """
    value = statistic(*groups)
    if all(len(panel) < 2 for group in groups for panel in group):
        return Estimate(value, None)
    rng = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for i in range(resamples):
        draws[i] = statistic(*[[panel[rng.integers(len(panel), size=len(panel))] for panel in g] for g in groups])
    if np.isnan(draws).any():
        return Estimate(value, None)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(value, (float(low), float(high)))


def paired_difference(after: Float[np.ndarray, " N"], before: Float[np.ndarray, " N"]) -> tuple[float, float]:
    """Mean of ``after - before`` of the same prompts and noise, and its standard error (NaN for a single pair)."""
    difference = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    if len(difference) < 2:
        return float(difference.mean()), math.nan
    return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference)))


def seeds_needed(deviation: float, difference: float, power: float = 0.8) -> int:
    """Seeds of each of two methods that show ``difference`` at the 5 % level (two-sided) with the given power.

    Normal approximation: ``2 (z_0.975 + z_power)^2 (deviation / difference)^2``, at least 2.

    Args:
      deviation: standard deviation of a method's final score over seeds.
      difference: of the two methods' means that is to be shown; not 0.
      power: the probability to show it.
    """
    from scipy import stats  # here because it takes a second

    quantiles = float(stats.norm.ppf(0.975) + stats.norm.ppf(power))
    return max(2, math.ceil(2 * (quantiles * deviation / difference) ** 2))
