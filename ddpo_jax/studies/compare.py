"""Compares finished runs: a table, two plots and the curves as a small JSON file.

Runs are grouped by what differs in their configs; seeds of a group are averaged. For every group: the final reward, the
reward queries after which it first reaches the final reward of the baseline, and how many times fewer that is than the
baseline itself needs. The baseline is --baseline, or the plainest group: the one with the fewest settings that differ
from the defaults.

Where the runs were evaluated in training (log.evaluate_every), the evaluations are compared: they are of the same
prompts and noise, so nothing is smoothed, every curve starts at the untrained model, and gains over it are told as
well: the interquartile mean over seeds of the gain, the same in units of the baseline's, the probability that a run
beats one of the baseline, each with its 95 % bootstrap interval, and the speed-up counted in calls of the denoiser,
since replay buys queries with computation.

Curves are smoothed by a running average over the last queries: 500 where the shortest run has 4000 or more (as in
"Selective Timestep Weighting", Fig. 7), an eighth of the shortest run where it has fewer, or --smooth. The final reward
is the last point of the smoothed curve. Shaded: one standard deviation over seeds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddpo_jax import find
from ddpo_jax.config import default_config
from ddpo_jax.config.defaults import FAMILIES, choose
from ddpo_jax.config.keys import flatten
from ddpo_jax.errors import InputError
from ddpo_jax.studies import curves, statistics
from ddpo_jax.studies.curves import Curve
from ddpo_jax.studies.overview import cell
from ddpo_jax.workdir import files, metrics, show
from ddpo_jax.workdir.folder import is_free, read_config

IGNORED = ("seed", "num_epochs", "train.remat", "frozen_on_host")  # besides what a resumed run may change
TIMES = ("time/rollout_s", "time/reward_s", "time/update_s")
EVALUATED = "eval/reward/mean"  # what is compared where every run has it
CALLS = "compute/denoiser_calls"
POINTS = 60  # of a curve in compare.json
PLAINEST = {**dict.fromkeys(("weighting", "replay"), ("uniform", "none")), "algorithm": ("ddpo",)}


@dataclasses.dataclass
class Run:
    """A run as it was read."""

    folder: pathlib.Path
    settings: dict[str, Any]  # dotted key -> value
    rows: list[dict[str, Any]]


@dataclasses.dataclass
class Group:
    """Runs that differ in their seeds only."""

    label: str
    differs: dict[str, Any]  # the settings that make the group
    runs: list[Run]
    curves: list[Curve] = dataclasses.field(default_factory=list)  # smoothed, one for each run


def read_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in ``folders``.

    Raises:
      InputError: one line for each folder that holds none.
    """
    runs, faults = [], []
    for name in dict.fromkeys(folders):
        folder = pathlib.Path(name).expanduser()
        what = f"RUN_DIR: received '{name}'; it has no"
        if not (folder / "config.json").exists():
            faults.append(f"{what} config.json; give folders in which runs were trained")
            continue
        try:
            settings, rows = completed(flatten(read_config(folder, complete=False))), metrics.read_metrics(folder)
        except InputError as error:
            faults.append(str(error))
            continue
        if rows:
            runs.append(Run(folder, settings, rows))
        else:
            faults.append(f"{what} {metrics.FILE}; give folders in which runs were trained")
    if faults:
        raise InputError("\n".join(faults))
    return runs


def completed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run, with the defaults of the options that the version that trained it did not have yet.

    A default that depends on the machine or the model is not known here; such a key is left out.
    """
    config = default_config()
    for family in FAMILIES:
        with contextlib.suppress(InputError):  # a member of the user's that is not here
            choose(config, family, settings[f"{family}.name"])
    return {key: value for key, value in flatten(config).items() if value not in (None, "auto")} | settings


def group(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order in which they appear, named by the settings that differ between groups.

    A member's own option is left out of the name where the member's name already tells it.
    """
    values: dict[str, set[str]] = {}
    for run in runs:
        for key, value in run.settings.items():
            if key not in IGNORED and not is_free(key):
                values.setdefault(key, set()).add(repr(value))
    differing = [key for key, found in values.items() if len(found) > 1]
    told = []
    for key in differing:
        family = key.partition(".")[0]
        by_member: dict[str, set[str]] = {}
        for run in runs:
            by_member.setdefault(run.settings[f"{family}.name"] if family in FAMILIES else "", set()).add(
                repr(run.settings.get(key))
            )
        own = family in FAMILIES and not key.endswith(".name") and f"{family}.name" in differing
        if not (own and all(len(given) == 1 for given in by_member.values())):
            told.append(key)
    groups: dict[str, Group] = {}
    for run in runs:
        differs = {key: run.settings[key] for key in told if key in run.settings}
        name = ", ".join(f"{_short(key)}={_short_value(value)}" for key, value in differs.items())
        groups.setdefault(name or "all runs", Group(name or "all runs", differs, [])).runs.append(run)
    return list(groups.values())


def _short(key: str) -> str:
    return key.removesuffix(".name").rpartition(".")[2]


def _short_value(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def choose_baseline(groups: Sequence[Group], wanted: str) -> Group:
    """The group that ``wanted`` describes ("algorithm=ddpo", several with commas), or the plainest one if it is empty.

    Raises:
      InputError: it describes no group, or more than one.
    """
    if not wanted:
        return min(groups, key=_settings)
    found = matching(groups, wanted)
    if len(found) == 1:
        return found[0]
    labels = [group.label for group in groups]
    near = find.nearest(wanted, labels)
    fix = f"use --baseline='{near or labels[0]}'"
    raise InputError(
        f"--baseline: received '{wanted}', which {len(found) or 'no'} group{'s'[: len(found) != 1]} match; "
        f"groups are {'; '.join(labels)}; {fix}"
    )


def matching(groups: Sequence[Group], wanted: str) -> list[Group]:
    """The groups whose label has all settings of ``wanted``; the one whose label it is, if there is one."""
    asked = {item.strip() for item in wanted.split(",")}
    labels = [{item.strip() for item in group.label.split(",")} for group in groups]
    exact = [group for group, label in zip(groups, labels, strict=True) if asked == label]
    return exact or [group for group, label in zip(groups, labels, strict=True) if asked <= label]


def _settings(group: Group) -> int:
    """How far a group is from plain DDPO."""
    defaults = flatten(default_config())
    count = 0
    for key, value in group.differs.items():
        plain = PLAINEST[key.partition(".")[0]] if key in [f"{family}.name" for family in PLAINEST] else ()
        count += value not in plain if plain else key in defaults and value != defaults[key]
    return count


def is_evaluation(metric: str) -> bool:
    """Whether a metric is of the evaluations in training."""
    return metric.startswith("eval/")


def choose_metric(groups: Sequence[Group], wanted: str) -> str:
    """``wanted``, or if it is empty the evaluations' where every run has at least one, else ``reward/mean``."""
    if wanted:
        return wanted
    evaluated = all(any(_known(row, EVALUATED) for row in run.rows) for group in groups for run in group.runs)
    return EVALUATED if evaluated else "reward/mean"


def curves_of(groups: Sequence[Group], metric: str, smooth: float | None) -> float:
    """Fills in the groups' curves; returns the window over which they are smoothed, in reward queries.

    Raises:
      InputError: a run has no such metric.
    """
    faults = []
    for run in (run for group in groups for run in group.runs):
        if not any(_known(row, metric) for row in run.rows):
            near = find.nearest(metric, sorted({key for row in run.rows for key in row}))
            faults.append(f"--metric: received '{metric}'; {run.folder} has none; " + f"use {near or 'reward/mean'}")
    if faults:
        raise InputError("\n".join(faults))
    shortest = min(run.rows[-1]["reward_queries"] for group in groups for run in group.runs)
    usual = 0.0 if is_evaluation(metric) else 500.0 if shortest >= 4000 else shortest / 8
    window = usual if smooth is None else smooth
    for group in groups:
        group.curves = [_curve(run, metric, window) for run in group.runs]
    return window


def _known(row: dict[str, Any], key: str) -> bool:
    return isinstance(row.get(key), int | float)


def _curve(run: Run, metric: str, window: float) -> Curve:
    wall = np.cumsum([sum(row.get(key) or 0.0 for key in TIMES) for row in run.rows])
    calls = np.cumsum([float(row[CALLS]) if _known(row, CALLS) else np.nan for row in run.rows])
    known = [i for i, row in enumerate(run.rows) if _known(row, metric)]
    queries = np.array([run.rows[i]["reward_queries"] for i in known], float)
    values = np.array([run.rows[i][metric] for i in known], float)
    curve = Curve(queries, wall[known], curves.running_average(queries, values, window), calls[known])
    difference = f"{metric.removesuffix('/mean')}/difference"
    if is_evaluation(metric) and _known(first := run.rows[known[0]], difference):
        return _from_untrained(curve, values[0] - first[difference])
    return curve


def _from_untrained(curve: Curve, value: float) -> Curve:
    """The curve with the untrained model in front, which took no queries."""
    queries, wall, values = (
        np.concatenate([[first], x]) for first, x in ((0.0, curve.queries), (0.0, curve.wall), (value, curve.values))
    )
    return Curve(queries, wall, values, None if curve.calls is None else np.concatenate([[0.0], curve.calls]))


def improvement(base: Group, member: Group) -> dict[str, Any]:
    """What is said of a group's gains against the baseline's, each as value and 95 % interval.

    Returns:
      ``gain``: the interquartile mean over seeds of the gain, in units of the metric; ``normalised_gain``: the same in
      units of the baseline's, None where that gains nothing; ``probability``: that a run gains more than one of the
      baseline; ``call_speed_up``: how many times fewer calls of the denoiser it takes to the baseline's final value.
    """
    ours, theirs = [curves.gains(member.curves)], [curves.gains(base.curves)]

    estimates: dict[str, statistics.Estimate | None] = {
        "gain": statistics.bootstrap(statistics.interquartile_mean, ours)
    }
    if base is member:  # against itself: by definition
        estimates |= {"normalised_gain": statistics.Estimate(1.0, None), "probability": statistics.Estimate(0.5, None)}
    else:
        estimates |= {
            "normalised_gain": (
                statistics.bootstrap(statistics.normalised_gain, ours, theirs) if curves.rises(theirs[0]) else None
            ),
            "probability": statistics.bootstrap(statistics.probability_of_improvement, ours, theirs),
        }
    found: dict[str, Any] = {name: statistics.as_dict(estimate) for name, estimate in estimates.items()}
    by_calls = [[curve.by_calls() for curve in group.curves] for group in (base, member)]
    if all(curve is not None for group in by_calls for curve in group):
        theirs_by_calls, ours_by_calls = ([curve for curve in group if curve is not None] for group in by_calls)
        same = theirs_by_calls if base is member else ours_by_calls
        speed, interval = curves.speed_up(theirs_by_calls, same)
        found["call_speed_up"] = {"value": speed, "interval": interval}
    return found


def table(result: dict[str, Any]) -> str:
    """The comparison as text."""
    head = ("", "seeds", f"final {result['metric']}", "queries to baseline", "speed-up")
    lines = [head]
    for entry in result["groups"]:
        final, reach = entry["final"], entry["queries_to_baseline"]
        spread = "" if final["half_width"] is None else f" ± {final['half_width']:.3g}"
        speed = "-" if entry["speed_up"] is None else f"{entry['speed_up']:.2f}x"
        if entry["speed_up_interval"]:
            low, high = entry["speed_up_interval"]
            speed += f" [{low:.2f}, {high:.2f}]"
        mark = " (baseline)" if entry["label"] == result["baseline"] else ""
        lines.append(
            (
                entry["label"] + mark,
                str(len(entry["runs"])),
                f"{final['mean']:.4g}{spread}",
                "not reached" if reach is None else f"{reach:.0f}",
                speed,
            )
        )
    smoothed = (
        f"Smoothed over the last {result['smoothing_queries']:.4g} queries. " if result["smoothing_queries"] else ""
    )
    note = (
        f"final: mean over seeds ± 95 % t-interval. Baseline's final reward {result['level']:.4g}. {smoothed}"
        "[..]: 95 % bootstrap over seeds."
    )
    return "\n".join([show.table(lines), note, *_gains_table(result)])


def _gains_table(result: dict[str, Any]) -> list[str]:
    """The table of gains over the untrained model, where the runs were evaluated."""
    lines = [("", "gain (IQM)", "of the baseline's", "probability to beat it", "speed-up in denoiser calls")]
    for entry in result["groups"]:
        if "improvement" not in entry:
            return []
        told = entry["improvement"]
        cells = [cell(told[name]) for name in ("gain", "normalised_gain", "probability")]
        lines.append((entry["label"], *cells, cell(told["call_speed_up"]) if "call_speed_up" in told else "-"))
    note = "IQM: interquartile mean over seeds, of the gain over the untrained model on the same prompts and noise."
    return ["", show.table(lines), note]


def compare(
    runs: Sequence[Run],
    out: pathlib.Path,
    metric: str = "",
    baseline: str = "",
    smooth: float | None = None,
    title: str = "",
) -> dict[str, Any]:
    """Writes ``compare.json``, ``compare_queries.png`` and ``compare_time.png`` into ``out``; returns the first.

    Args:
      runs: of ``read_runs``.
      out: folder, made if missing.
      metric: of metrics.jsonl; empty is ``choose_metric``'s.
      baseline: see ``choose_baseline``.
      smooth: window of the running average in reward queries; None as the module says.
      title: over the plots.

    Raises:
      InputError: metric or baseline cannot be had, in one line each.
    """
    groups = group(runs)
    base = choose_baseline(groups, baseline)
    metric = choose_metric(groups, metric)
    window = curves_of(groups, metric, smooth)
    level = float(curves.average(base.curves).mean[-1])
    entries = []
    for member in groups:
        mean, half_width = curves.interval(curves.final(member.curves))
        reach = curves.queries_to(member.curves, level)
        speed, speed_interval = curves.speed_up(base.curves, member.curves)
        average = curves.average(member.curves)
        points = np.unique(np.linspace(0, len(average.queries) - 1, POINTS).round().astype(int))
        told: dict[str, Any] = {"improvement": improvement(base, member)} if is_evaluation(metric) else {}
        entries.append(
            told
            | {
                "label": member.label,
                "settings": member.differs,
                "runs": [{"folder": run.folder.name, "seed": run.settings.get("seed")} for run in member.runs],
                "final": {"mean": mean, "half_width": half_width},
                "queries_to_baseline": reach,
                "speed_up": speed,
                "speed_up_interval": speed_interval,
                "curve": {
                    "reward_queries": average.queries[points].round(1).tolist(),
                    "wall_s": average.wall[points].round(1).tolist(),
                    "mean": [float(f"{x:.6g}") for x in average.mean[points]],
                    "std": [float(f"{x:.4g}") for x in average.std[points]],
                },
            }
        )
    result = {
        "metric": metric,
        "smoothing_queries": window,
        "baseline": base.label,
        "level": level,
        "groups": entries,
    }
    files.write_json(out / "compare.json", result)
    shown = f"running average over {window:.4g} queries" if window else "the same prompts and noise for all"
    title = f"{title + ': ' if title else ''}{shown}"
    labelled = {member.label: curves.average(member.curves) for member in groups}
    curves.plot(out / "compare_queries.png", labelled, "queries", "reward queries", metric, title)
    curves.plot(out / "compare_time.png", labelled, "wall", "wall time, s", metric, title)
    return result
