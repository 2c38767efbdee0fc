"""Reward curves of several seeds: smoothing, averaging, when a level is reached, intervals, plots. Numpy only."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from ddpo_jax.studies.statistics import interquartile_mean
from ddpo_jax.workdir import show

BOOTSTRAP = 2000  # resamples


@dataclasses.dataclass
class Curve:
    """One run: reward queries so far, seconds so far, value, calls of the denoiser so far (NaN where not counted)."""

    queries: Float[np.ndarray, " N"]
    wall: Float[np.ndarray, " N"]
    values: Float[np.ndarray, " N"]
    calls: Float[np.ndarray, " N"] | None = None

    def by_calls(self) -> Curve | None:
        """The same with calls of the denoiser in the place of queries; None where they were not counted."""
        if self.calls is None or not np.isfinite(self.calls).all():
            return None
        return dataclasses.replace(self, queries=self.calls)


@dataclasses.dataclass
class Average:
    """Several runs at the same reward queries."""

    queries: Float[np.ndarray, " N"]
    wall: Float[np.ndarray, " N"]
    mean: Float[np.ndarray, " N"]
    std: Float[np.ndarray, " N"]  # over runs, with n - 1; 0 for one run


def running_average(
    queries: Float[np.ndarray, " N"], values: Float[np.ndarray, " N"], window: float
) -> Float[np.ndarray, " N"]:
    """At each point the mean over the queries of the last ``window``: of the points after ``queries - window``.

    Each point counts as often as it has queries of its own. The first points average over what there is.
    """
    weights = np.diff(queries, prepend=0.0)
    smooth = np.empty_like(values)
    for i, query in enumerate(queries):
        inside = slice(int(np.searchsorted(queries, query - window, side="right")), i + 1)
        if inside.start > i:  # a window shorter than an epoch
            inside = slice(i, i + 1)
        smooth[i] = np.average(values[inside], weights=weights[inside])
    return smooth


def average(curves: Sequence[Curve]) -> Average:
    """Mean over runs where all have data; at the queries of the run with the fewest points, interpolated for others."""
    end, start = min(c.queries[-1] for c in curves), max(c.queries[0] for c in curves)
    shortest = min(curves, key=lambda c: len(c.queries)).queries
    grid = shortest[(shortest >= start) & (shortest <= end)]
    if not grid.size or grid[-1] < end:
        grid = np.append(grid, end)
    values = np.stack([np.interp(grid, c.queries, c.values) for c in curves])
    wall = np.mean([np.interp(grid, c.queries, c.wall) for c in curves], axis=0)
    std = values.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(len(grid))
    return Average(grid, wall, values.mean(axis=0), std)


def final(curves: Sequence[Curve]) -> Float[np.ndarray, " S"]:
    """The last value of each run."""
    return np.array([c.values[-1] for c in curves])


def gains(curves: Sequence[Curve]) -> Float[np.ndarray, " S"]:
    """Final minus first value of each run; with evaluations the first is the untrained model's."""
    return np.array([c.values[-1] - c.values[0] for c in curves])


def rises(gains: Float[np.ndarray, " S"]) -> bool:
    """Whether a baseline gains anything, so that other gains can be told in units of its own."""
    return interquartile_mean([gains]) > 0


def interval(values: Float[np.ndarray, " S"]) -> tuple[float, float | None]:
    """Mean and half width of its 95 % confidence interval (Student's t); None for a single value."""
    from scipy import stats  # here because it takes a second

    n = len(values)
    if n < 2:
        return float(np.mean(values)), None
    return float(np.mean(values)), float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))


def queries_to(curves: Sequence[Curve], level: float) -> float | None:
    """Reward queries after which the average of the curves first reaches ``level``, linear between points.

    None if it never does.
    """
    mean = average(curves)
    above = np.flatnonzero(mean.mean >= level - 1e-12 * abs(level))
    if not above.size:
        return None
    i = int(above[0])
    if i == 0:
        return float(mean.queries[0])
    low, high = mean.mean[i - 1], mean.mean[i]
    part = min((level - low) / (high - low), 1.0)
    return float(mean.queries[i - 1] + part * (mean.queries[i] - mean.queries[i - 1]))


def speed_up(baseline: Sequence[Curve], group: Sequence[Curve]) -> tuple[float | None, tuple[float, float] | None]:
    """How many times fewer queries ``group`` needs to reach the baseline's final reward than the baseline.

    Both counts are to the first time the averaged curve is there. None: it never is, or the baseline ends no higher
    than it began. The interval is the 2.5th and 97.5th percentile over resampled seeds of both (0 where a resample
    never gets there); None with one seed each.
    """

    def ratio(base: Sequence[Curve], other: Sequence[Curve]) -> float | None:
        mean = average(base).mean
        if mean[-1] <= mean[0]:
            return None
        level = float(mean[-1])
        needs, has = queries_to(other, level), queries_to(base, level)
        return has / needs if needs and has else None

    if len(baseline) < 2 and len(group) < 2:
        return ratio(baseline, group), None
    same = baseline is group  # the baseline against itself: by definition 1
    if same:
        return 1.0, None
    rng = np.random.default_rng(0)
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    draws = []
    for _ in range(BOOTSTRAP):
        ours, theirs = (tuple(sorted(rng.integers(len(c), size=len(c)).tolist())) for c in (baseline, group))
        picked = ours, theirs
        if picked not in known:  # three seeds have ten distinct resamples each
            known[picked] = ratio([baseline[i] for i in picked[0]], [group[i] for i in picked[1]]) or 0.0
        draws.append(known[picked])
    low, high = np.percentile(draws, [2.5, 97.5])
    return ratio(baseline, group), (float(low), float(high))


def plot(
    path: str | os.PathLike[str], groups: Mapping[str, Average], axis: str, xlabel: str, ylabel: str, title: str
) -> None:
    """One line per group, shaded by one standard deviation over seeds.

    Args:
      path: of the PNG.
      groups: averages by label.
      axis: "queries" or "wall".
      xlabel, ylabel, title: texts.
    """
    with show.plot(path, size=(7.2, 4.4)) as (axes,):
        for label, curve in groups.items():
            x = getattr(curve, axis)
            (line,) = axes.plot(x, curve.mean, label=label, linewidth=1.6)
            axes.fill_between(x, curve.mean - curve.std, curve.mean + curve.std, color=line.get_color(), alpha=0.18)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel.replace("/", " "))
        axes.set_title(title, fontsize=9)
