"""One epoch beside another library's, in turns, so that whatever else the machine does meets both.

The peer is TRL's DDPOTrainer (0.22.2 is the last release that has it) in PyTorch, in a process of its own on the same
cores: the same network and weights, images, denoising steps, guidance, updates and reward. All parameters are trained
at every step; a second row trains the steps that an importance draw of 3 in 10 picks, which TRL cannot.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ddpo_jax.config import default_config
from ddpo_jax.config.model import local_folder
from ddpo_jax.config.override import override
from ddpo_jax.config.ready import make_ready
from ddpo_jax.errors import InputError
from ddpo_jax.ops.advantages import PromptStats
from ddpo_jax.perf.benchmark import Row
from ddpo_jax.training.build import build
from ddpo_jax.training.epoch import update

FRACTIONS = {"all steps": 1.0, "3 of 10 steps, by importance": 0.3}
INSTALL = "install torch, diffusers, transformers, accelerate and pandas, then `pip install --no-deps trl==0.22.2`"
PROMPTS = ("a red circle", "a blue square", "two green stars", "a yellow ring", "a striped cross", "a pink diamond")


@dataclasses.dataclass(frozen=True)
class Settings:
    """An epoch of the miniature, for both."""

    model: str
    threads: int
    prompts: Sequence[str] = PROMPTS
    steps: int = 10
    guidance: float = 5.0
    sample_batch: int = 32
    batches: int = 2
    train_batch: int = 16
    learning_rate: float = 1e-4


def compare(repeats: int, backend: str, devices: int) -> list[Row]:
    """Seconds of an epoch of each, and how many times faster this library's is.

    Args:
      repeats: epochs of each after a first one that compiles.
      backend: of jax.
      devices: of jax.

    Raises:
      InputError: the peer is not installed, or did not start.
    """
    settings = Settings(str(local_folder("mini")), len(os.sched_getaffinity(0)))
    with _Peer(settings) as theirs:
        ours = {name: _epoch(settings, fraction, backend, devices) for name, fraction in FRACTIONS.items()}
        runs: dict[str, Callable[[], float]] = {"trl": theirs.epoch, **ours}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(repeats + 1):
            for name, run in runs.items():
                took = run()
                if turn:
                    seconds[name].append(took)
    return rows(seconds)


def rows(seconds: dict[str, list[float]]) -> list[Row]:
    """The table of ``compare`` from the seconds of every epoch; the first name is the peer's."""
    peer, *ours = seconds
    found: list[Row] = [(f"{name}: an epoch", float(np.median(seconds[name])), "s") for name in seconds]
    for name in ours:
        ratio, low, high = faster(seconds[peer], seconds[name])
        found += [(f"{name}: faster than {peer}", ratio, "times")]
        ends = [] if math.isnan(low) else [("low", low), ("high", high)]  # one turn has no interval
        found += [(f"{name}: 95 % interval, {end}", value, "times") for end, value in ends]
    return found


def faster(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """``(ratio, low, high)``: the geometric mean of their seconds over ours, turn by turn, and its 95 % t-interval."""
    from scipy import stats  # here because it takes a second

    logs = np.log(np.asarray(theirs) / np.asarray(ours))
    mean = float(logs.mean())
    if len(logs) < 2:
        return math.exp(mean), math.nan, math.nan
    half = float(stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs)))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def _epoch(settings: Settings, fraction: float, backend: str, devices: int) -> Callable[[], float]:
    """A function that trains one more epoch and returns its seconds."""
    config = default_config()
    given: dict[str, Any] = {
        "model": "mini",
        "sample.num_steps": settings.steps,
        "sample.guidance_scale": settings.guidance,
        "sample.batch_size": settings.sample_batch,
        "sample.num_batches_per_epoch": settings.batches,
        "train.batch_size": settings.train_batch,
        "train.learning_rate": settings.learning_rate,
        "train.timestep_fraction": fraction,
        "train.lora_rank": 0,
        "log.evaluate_every": 0,
    }
    override(config, [(key, str(value)) for key, value in given.items()])
    ready = make_ready(config, backend, devices)
    parts = build(ready)
    state, stats, done = parts.init(), PromptStats(), 0

    def epoch() -> float:
        nonlocal state, done
        start = time.perf_counter()
        rollout = parts.collector.collect(done, state.params)
        state, _ = update(parts, ready.config, state, stats, rollout, done)
        done += 1
        return time.perf_counter() - start

    return epoch


class _Peer:
    """The process of ``trl_peer``."""

    def __init__(self, settings: Settings):
        self._log = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-m", "ddpo_jax.perf.trl_peer", json.dumps(dataclasses.asdict(settings))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, bufsize=1
        )

    def __enter__(self) -> _Peer:
        if self._answer() != "ready":
            raise InputError(f"--against: received 'trl', which did not start: {self._last()}; {INSTALL}")
        return self

    def __exit__(self, *args: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def epoch(self) -> float:
        """Trains one more epoch; its seconds."""
        print("epoch", file=self._process.stdin, flush=True)
        answer = self._answer()
        if not answer:
            raise InputError(f"--against: received 'trl', which ended: {self._last()}; {INSTALL}")
        return float(answer)

    def _answer(self) -> str:
        return "" if self._process.stdout is None else self._process.stdout.readline().strip()

    def _last(self) -> str:
        self._process.wait(10)
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1] if lines else "it said nothing"
