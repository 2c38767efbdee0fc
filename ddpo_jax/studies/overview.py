"""What a sweep says over all its panels at once: gains in units of the baseline's, and the curves side by side.

Rewards have scales of their own, so a gain over the untrained model is divided by the baseline's gain on that panel
(panels on which the baseline gains nothing are left out, and named). Over seeds and panels then stand the interquartile
mean and the probability of improvement, with stratified bootstrap intervals (Agarwal et al. 2021, arXiv:2108.13264).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ddpo_jax.studies import curves, statistics
from ddpo_jax.studies.curves import Curve
from ddpo_jax.workdir import show

COLUMNS = 3  # panels in a row of the plot


@dataclasses.dataclass(frozen=True)
class Panel:
    """The runs of one panel by name, a curve for each seed, and which of them is the baseline."""

    title: str
    baseline: str
    runs: Mapping[str, Sequence[Curve]]


def overview(panels: Sequence[Panel], difference: float | None = None) -> dict[str, Any]:
    """The gains of every name that all panels have.

    Args:
      panels: of a sweep, each with its baseline.
      difference: that is expected, in units of the baseline's gain; None = nothing is said of seeds.

    Returns:
      ``methods``: by name ``normalised_gain`` and ``probability`` (each with ``value`` and ``interval``) and, by panel,
      ``speed_up``. ``left_out``: panels on which the baseline gains nothing. ``seeds_needed``: by panel, how many seeds
      show ``difference`` with a probability of 80 %, from how far the baseline's gains are apart; only where it has two
      seeds and ``difference`` is given.
    """
    shared = [name for name in panels[0].runs if all(name in panel.runs for panel in panels)]
    theirs = [curves.gains(panel.runs[panel.baseline]) for panel in panels]
    rising = [curves.rises(gains) for gains in theirs]
    methods: dict[str, Any] = {}
    for name in shared:
        gain: statistics.Estimate | None
        ours = [curves.gains(panel.runs[name]) for panel in panels]
        if all(name == panel.baseline for panel in panels):
            gain, wins = statistics.Estimate(1.0, None), statistics.Estimate(0.5, None)
        else:
            kept = [
                [gains for gains, rises in zip(all_gains, rising, strict=True) if rises] for all_gains in (ours, theirs)
            ]
            gain = statistics.bootstrap(statistics.normalised_gain, *kept) if any(rising) else None
            wins = statistics.bootstrap(statistics.probability_of_improvement, ours, theirs)
        methods[name] = {
            "normalised_gain": statistics.as_dict(gain),
            "probability": statistics.as_dict(wins),
            "speed_up": {panel.title: _speed_up(panel, name) for panel in panels},
        }
    found: dict[str, Any] = {"baseline": {panel.title: panel.baseline for panel in panels}, "methods": methods}
    found["left_out"] = [panel.title for panel, rises in zip(panels, rising, strict=True) if not rises]
    if difference is not None:
        found["difference"] = difference
        found["seeds_needed"] = {
            panel.title: statistics.seeds_needed(
                float(gains.std(ddof=1)), difference * statistics.interquartile_mean([gains])
            )
            for panel, gains, rises in zip(panels, theirs, rising, strict=True)
            if len(gains) > 1 and rises
        }
    return found


def _speed_up(panel: Panel, name: str) -> dict[str, Any]:
    base = panel.runs[panel.baseline]
    value, interval = curves.speed_up(base, base if name == panel.baseline else panel.runs[name])
    return {"value": value, "interval": interval}


def table(result: Mapping[str, Any]) -> str:
    """The overview as text."""
    panels = list(result["baseline"])
    lines = [
        ["all panels", "gain in the baseline's", "probability to beat it", *(f"fewer queries: {p}" for p in panels)]
    ]
    for name, told in result["methods"].items():
        cells = [told["normalised_gain"], told["probability"], *(told["speed_up"][panel] for panel in panels)]
        lines.append([name, *map(cell, cells)])
    text = show.table(lines)
    if result["left_out"]:
        text += f"\nnot in the gain, because the baseline gains nothing there: {', '.join(result['left_out'])}"
    for panel, seeds in result.get("seeds_needed", {}).items():
        text += f"\n{panel}: a difference of {result['difference']:.2g} of the baseline's gain needs {seeds} seeds"
    return text


def cell(estimate: Mapping[str, Any]) -> str:
    """``value [low, high]``; "-" where there is no value."""
    if estimate["value"] is None:
        return "-"
    interval = estimate["interval"]
    return f"{estimate['value']:.3g}" + (f" [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else "")


def plot(path: str | os.PathLike[str], panels: Sequence[Panel]) -> None:
    """A panel each: 0 is the untrained model, 1 where the baseline ends; shaded: one standard deviation over seeds.

    Where the baseline gains nothing the unit is the reward's own.
    """
    columns = 2 if len(panels) == 4 else min(COLUMNS, len(panels))
    with show.plot(path, len(panels), (4.6, 3.4), columns) as every:
        for axes, panel in zip(every, panels, strict=True):
            zero = np.mean([curve.values[0] for runs in panel.runs.values() for curve in runs])
            gain = curves.average(panel.runs[panel.baseline]).mean[-1] - zero
            rises = gain > 0
            unit = gain if rises else 1.0
            for name, runs in panel.runs.items():
                found = curves.average(runs)
                mean, std = (found.mean - zero) / unit, found.std / unit
                (line,) = axes.plot(found.queries, mean, label=name, linewidth=1.6)
                axes.fill_between(found.queries, mean - std, mean + std, color=line.get_color(), alpha=0.15)
            axes.axhline(1.0 if rises else 0.0, color="black", linewidth=0.8, linestyle=":")
            axes.set_title(panel.title if rises else f"{panel.title} (gain in the reward's unit)", fontsize=9)
            axes.set_xlabel("reward queries")
        every[0].set_ylabel("gain, 1 = the baseline's end")
