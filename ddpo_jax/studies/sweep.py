"""Trains a list of configs with several seeds, one after another or in parallel, and compares them."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import os
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import FrameType
from typing import Any

import numpy as np

from ddpo_jax import errors
from ddpo_jax.config.model import read_json
from ddpo_jax.errors import InputError
from ddpo_jax.studies import compare, overview
from ddpo_jax.workdir import files, metrics
from ddpo_jax.workdir.folder import SIGNALS, read_config

MARK = "sweep.json"  # in a run's folder: the commands that ended well
PLAN_KEYS = ("panel", "name", "config")
PLAN_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "SEEDS": (lambda value: type(value) is int and value > 0, "how many, such as 5; --seeds says which"),
    "DIFFERENCE": (lambda value: isinstance(value, int | float) and value > 0, "a number above 0"),
    "BASELINE": (lambda value: isinstance(value, str), "the name of runs"),
    "METRIC": (lambda value: isinstance(value, str), "the name of a metric"),
    "EVALUATE": (lambda value: isinstance(value, dict), "a dict of flags"),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: where, and its commands by what they do, in order."""

    panel: str
    name: str
    seed: int
    workdir: pathlib.Path
    commands: dict[str, list[str]]

    def __str__(self) -> str:
        return f"{self.panel}/{self.name} seed {self.seed}"


def load(file: pathlib.Path) -> dict[str, Any]:
    """The names that a sweep file defines.

    Raises:
      InputError: in one line, why it is none.
    """
    fault = f"FILE: received '{file}'; "
    if not file.is_file():
        raise InputError(f"{fault}there is no such file; give a sweep such as configs/sweeps/weighting_and_replay.py")
    try:
        plan = runpy.run_path(str(file))
        plan["runs"] = plan["runs"]() if callable(plan.get("runs")) else None
    except Exception as error:  # the file is the user's: it may raise anything
        raise InputError(f"{fault}{type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(plan["runs"], list):
        raise InputError(f"{fault}it defines no function runs() that returns a list of dicts; write one")
    for run in plan["runs"]:
        if not isinstance(run, dict) or "config" not in run or "name" not in run:
            raise InputError(f"{fault}runs() returned {run!r}; each must be a dict with 'name' and 'config'")
        for key in [key for key in PLAN_KEYS if key in run]:
            if not isinstance(run[key], str) or (key != "config" and ("/" in run[key] or not run[key])):
                rule = "text" if key == "config" else "the name of a folder"
                raise InputError(f"{fault}runs() returned {key!r}: {run[key]!r}; it must be {rule}")
    for key, (holds, rule) in PLAN_RULES.items():
        if plan.get(key) is not None and not holds(plan[key]):
            raise InputError(f"{fault}{key} is {plan[key]!r}; it must be {rule}")
    names = [(run.get("panel", "all"), run["name"]) for run in plan["runs"]]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{fault}two runs are named {'/'.join(twice[0])}; each needs a name of its own")
    return plan


def jobs(
    plan: dict[str, Any], file: pathlib.Path, out: pathlib.Path, seeds: Sequence[int], only: str, extra: Sequence[str]
) -> list[Job]:
    """All runs, seed by seed, so that a first comparison is there early.

    Args:
      plan: of ``load``.
      file: the sweep file.
      out: folder of the sweep.
      seeds: each run is trained with each.
      only: glob patterns on ``<panel>/<name>``, with commas; empty = all.
      extra: flags added to every training command.

    Raises:
      InputError: ``only`` picks nothing.
    """
    patterns = [pattern.strip() for pattern in only.split(",") if pattern.strip()] or ["*"]
    found = []
    for seed in seeds:
        for run in plan["runs"]:
            panel, name = run.get("panel", "all"), run["name"]
            if not any(fnmatch.fnmatchcase(f"{panel}/{name}", pattern) for pattern in patterns):
                continue
            workdir = out / panel / name / f"seed{seed}"
            config, colon, choices = run["config"].partition(".py:")
            path = os.path.normpath(file.parent / (config + ".py" * bool(colon)))
            flags = [f"--config.{key}={value}" for key, value in run.items() if key not in PLAN_KEYS]
            where, python = f"--workdir={workdir}", [sys.executable, "-m"]
            given = f"--config={path}{':' * bool(colon)}{choices}"
            commands = {"train": [*python, "ddpo_jax.main", given, where, f"--config.seed={seed}", *flags, *extra]}
            if "EVALUATE" in plan:
                options = [f"--{key}={value}" for key, value in plan["EVALUATE"].items()]
                options.append(f"--out={workdir / 'evaluation'}")
                commands["evaluate"] = [*python, "ddpo_jax", "evaluate", where, *options]
            found.append(Job(panel, name, seed, workdir, commands))
    if not found:
        names = sorted(f"{run.get('panel', 'all')}/{run['name']}" for run in plan["runs"])
        raise InputError(f"--only: received '{only}'; it picks none of {', '.join(names)}; use --only='{names[0]}'")
    return found


class Runner:
    """Runs jobs as processes of their own and stops them when this process is asked to stop."""

    def __init__(self, say: Callable[[str], None]):
        """``say`` gets one line for each run that ended."""
        self._say = say
        self._alive: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._free: list[set[int]] = []  # sets of CPU cores that no run has
        self.stopped = 0  # signal received

    def run(self, todo: Sequence[Job], parallel: int) -> list[Job]:
        """Runs all jobs; returns those that failed.

        Raises:
          errors.Interrupted: SIGTERM, SIGINT or SIGHUP came; the runs in progress have saved.
        """
        numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._stop) for number in numbers}
        failed, seconds = [], []
        self._free = core_sets(parallel)
        try:
            with ThreadPoolExecutor(parallel) as pool:
                futures = {pool.submit(self._job, job): job for job in todo}
                for count, future in enumerate(as_completed(futures), 1):
                    took, line, well = future.result()
                    seconds += [took] if took else []
                    left = metrics.duration(float(np.mean(seconds or [0])) * (len(todo) - count) / parallel)
                    if not self.stopped:
                        self._say(f"[{count}/{len(todo)}] {futures[future]}: {line}; ETA {left}")
                        failed += [] if well else [futures[future]]
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.stopped:
            raise errors.Interrupted(self.stopped, "stopped; runs in progress have saved, the same command goes on")
        return failed

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = self.stopped or number
        with self._lock:
            for process in self._alive:
                process.send_signal(signal.SIGTERM)

    def _job(self, job: Job) -> tuple[float, str, bool]:
        """``(seconds, what became of it, whether it ended well)``; 0 seconds if there was nothing to do."""
        try:
            return self._commands(job)
        except (InputError, errors.RunFailure, OSError) as error:  # its folder cannot be read or written
            return 0.0, f"FAILED: {error}", False

    def _commands(self, job: Job) -> tuple[float, str, bool]:
        mark = job.workdir / MARK
        done: dict[str, Any] = read_json(mark) if mark.exists() else {}
        start, idle = time.monotonic(), True
        for kind, command in job.commands.items():
            if done.get(kind) == command[1:]:  # without the interpreter's path
                continue
            idle = False
            code = self._process(_filled(command, job.workdir), job.workdir)
            if code:
                return time.monotonic() - start, f"FAILED ({kind}, exit code {code}): {_last_line(job.workdir)}", False
            if kind == "train":  # what was evaluated before is of another run
                shutil.rmtree(job.workdir / "evaluation", ignore_errors=True)
                done = {}
            done[kind] = command[1:]
            files.write_json(mark, done)
        seconds = 0.0 if idle else time.monotonic() - start
        return seconds, _outcome(job.workdir) + (", done before" if idle else f" in {metrics.duration(seconds)}"), True

    def _process(self, command: Sequence[str], workdir: pathlib.Path) -> int:
        workdir.mkdir(parents=True, exist_ok=True)
        with open(workdir / "log.txt", "ab") as log:
            with self._lock:
                if self.stopped:
                    return 128 + self.stopped
                # A session of its own: Ctrl-C at the terminal reaches it once, through _stop.
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
                self._alive.add(process)
                cores = self._free.pop() if self._free else set()
                if cores:
                    os.sched_setaffinity(process.pid, cores)  # before it has threads, which inherit this
            code = process.wait()
        with self._lock:
            self._alive.discard(process)
            self._free += [cores] if cores else []
        return code


def core_sets(parallel: int) -> list[set[int]]:
    """The cores of this process shared out among ``parallel`` runs; none where there is no way or no need to.

    Runs that wander over the same cores get in each other's way: two of the miniature on two cores take 1.7 times as
    long as on a core each.
    """
    if parallel == 1 or not hasattr(os, "sched_setaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[i::parallel]) for i in range(parallel)] if len(cores) >= parallel else []


def _filled(command: Sequence[str], workdir: pathlib.Path) -> list[str]:
    """The command with the run's reward in the place of ``{reward}``, known once it was trained."""
    path = workdir / "config.json"  # absent before training, whose command has no such word
    reward = read_config(workdir).reward.name if path.exists() else ""
    return [word.replace("{reward}", reward) for word in command]


def _outcome(workdir: pathlib.Path) -> str:
    rows = metrics.read_metrics(workdir)
    if not rows:
        return "no epochs"
    first, last = (math.nan if row["reward/mean"] is None else row["reward/mean"] for row in (rows[0], rows[-1]))
    return f"reward {first:.4g} -> {last:.4g}, {rows[-1]['reward_queries']} queries"


def _last_line(workdir: pathlib.Path) -> str:
    path = workdir / "log.txt"
    return f"{path.read_text(errors='replace').strip().rpartition(chr(10))[2] or 'no output'} (see {path})"


def evaluations(done: Sequence[Job]) -> dict[str, Any]:
    """Means over seeds of what `ddpo_jax evaluate` wrote, by name of the run: reward -> base, trained, seeds."""
    found: dict[str, Any] = {}
    for job in done:
        path = job.workdir / "evaluation" / "evaluation.json"
        if path.exists():
            for reward, row in _rewards(path).items():
                entry = found.setdefault(job.name, {}).setdefault(reward, {"base": [], "trained": []})
                for model in entry:
                    entry[model].append(row[model])
    return {
        name: {
            reward: {model: float(np.mean(values)) for model, values in entry.items()} | {"seeds": len(entry["base"])}
            for reward, entry in rewards.items()
        }
        for name, rewards in found.items()
    }


def _rewards(path: pathlib.Path) -> dict[str, dict[str, float]]:
    """Reward -> {"base": mean, "trained": mean} of an ``evaluation.json``.

    Raises:
      InputError: it is not one.
    """
    content = read_json(path)
    try:
        means = {
            reward: {model: float(row[model]["mean"]) for model in ("base", "trained")}
            for reward, row in content["rewards"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = errors.one_line(error)
        raise InputError(f"{path}: it holds no means of rewards ({why}); delete it and run the sweep again") from error
    return means


def summarise(todo: Sequence[Job], failed: Sequence[Job], out: pathlib.Path, plan: dict[str, Any]) -> list[str]:
    """Compares the finished runs of each panel; returns the tables as text."""
    metric, texts, panels = plan.get("METRIC", ""), [], []
    for panel in dict.fromkeys(job.panel for job in todo):
        done = [job for job in todo if job.panel == panel and job not in failed]
        if not done:
            continue
        folder, names = out / panel, [str(job.workdir) for job in done]
        runs = compare.read_runs(names)
        labels = {group.runs[0].folder.parent.name: group.label for group in compare.group(runs)}
        wanted = plan.get("BASELINE", "")
        note = (
            "" if wanted in ("", *labels) else f"\nno run {wanted} among these (--only, or it failed): another baseline"
        )
        result = compare.compare(runs, folder, metric, labels.get(wanted, ""), title=panel)
        texts.append(f"{panel} ({folder}/compare.json, compare_queries.png)\n{compare.table(result)}{note}")
        (base,) = [name for name, label in labels.items() if label == result["baseline"]]
        panels.append(_panel(panel, runs, base, result["metric"]))
        if scores := evaluations(done):
            files.write_json(folder / "evaluations.json", scores)
            lines = [f"{panel}: evaluated, untrained -> trained"]
            for name, rewards in scores.items():
                for reward, row in rewards.items():
                    numbers = f"{row['base']:.4g} -> {row['trained']:.4g} ({row['seeds']} seeds)"
                    lines.append(f"  {name}  {reward}: {numbers}")
            texts.append("\n".join(lines))
    if panels:
        found = overview.overview(panels, plan.get("DIFFERENCE"))
        files.write_json(out / "overview.json", found)
        overview.plot(out / "overview.png", panels)
        texts.append(f"{overview.table(found)}\nin {out}: overview.json, overview.png")
    return texts


def _panel(title: str, runs: Sequence[compare.Run], baseline: str, metric: str) -> overview.Panel:
    """The curves of a panel by the names of its runs, one of which is the baseline."""
    groups: dict[str, compare.Group] = {}
    for run in runs:
        name = run.folder.parent.name
        groups.setdefault(name, compare.Group(name, {}, [])).runs.append(run)
    compare.curves_of([*groups.values()], metric, None)
    return overview.Panel(title, baseline, {name: group.curves for name, group in groups.items()})
