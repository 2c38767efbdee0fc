"""The same work beside PyTorch's, in turns, so that whatever else the machine does meets both.

``trl``: epochs of the miniature beside TRL's DDPOTrainer (0.22.2 is the last release that has it), in a process of its
own on the same cores: the same network and weights, images, denoising steps, guidance, updates and reward. All
parameters are trained at every step; a second row trains the steps that an importance draw of 3 in 10 picks, which TRL
cannot.

``torch``: rollout and update of any model, of random weights too, beside a loop over diffusers' network of the same
size on the same device (``torch_peer``): what an accelerator is to be measured with.
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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpo_jax import sharding
from ddpo_jax.config import default_config
from ddpo_jax.config.model import local_folder
from ddpo_jax.config.override import override
from ddpo_jax.config.ready import make_ready
from ddpo_jax.errors import InputError
from ddpo_jax.ops.advantages import PromptStats
from ddpo_jax.perf import capacity
from ddpo_jax.perf.benchmark import Row, share
from ddpo_jax.training import batching
from ddpo_jax.training.build import Parts, build
from ddpo_jax.training.epoch import update
from ddpo_jax.types import ScoredSamples

FRACTIONS = {"all steps": 1.0, "3 of 10 steps, by importance": 0.3}
INSTALL = {
    "trl": "install torch, diffusers, transformers, accelerate and pandas, then `pip install --no-deps trl==0.22.2`",
    "torch": "install torch for this device, diffusers and peft",
}
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


@dataclasses.dataclass(frozen=True)
class Loop:
    """The work of a run's rollout and update, for ``torch_peer``.

    Attributes:
      unet: options of diffusers' UNet2DConditionModel.
      dtype: in which the network computes.
      batch: images of a rollout and of an update, of which ``microbatch`` go through the network at once.
      latent, context: (h, w, c) of a sample's latents and (L, D) of its prompt.
      rank, targets: of the adapters; rank 0 trains everything.
      remat: whether activations are computed again for the gradient.
      timesteps, from_latents, from_output, std: a step's Gaussian: its mean is ``from_latents`` times the latents plus
        ``from_output`` times the network's output at that timestep.
    """

    unet: dict[str, Any]
    dtype: str
    batch: int
    microbatch: int
    latent: tuple[int, int, int]
    context: tuple[int, int]
    guidance: float
    rank: int
    targets: Sequence[str]
    remat: bool
    learning_rate: float
    max_grad_norm: float
    clip_range: float
    timesteps: Sequence[float]
    from_latents: Sequence[float]
    from_output: Sequence[float]
    std: Sequence[float]
    threads: int


def loop_of(config: ConfigDict, parts: Parts) -> Loop:
    """The work of a run, whose batch is ``train.batch_size``."""
    train, pipe, policy = config.train, parts.model.pipeline, parts.sampler.policy
    transition = policy.transition
    index = jnp.arange(transition.num_steps)
    one, zero = jnp.ones((transition.num_steps, 1, 1, 1)), jnp.zeros((transition.num_steps, 1, 1, 1))
    from_latents, std = transition.step(zero, one, index)  # the mean is linear in both
    from_output, _ = transition.step(one, zero, index)
    return Loop(
        unet=dataclasses.asdict(pipe.unet.config) | {"sample_size": pipe.latent_shape[0]},
        dtype=config.dtype,
        batch=train.batch_size,
        microbatch=train.microbatch_size,
        latent=pipe.latent_shape,
        context=(parts.uncond.shape[0], parts.uncond.shape[1]),
        guidance=config.sample.guidance_scale,
        rank=train.lora_rank,
        targets=list(train.lora_targets),
        remat=train.remat == "on",
        learning_rate=train.learning_rate,
        max_grad_norm=train.max_grad_norm,
        clip_range=train.clip_range,
        timesteps=np.asarray(transition.timesteps).tolist(),
        from_latents=np.asarray(from_latents).ravel().tolist(),
        from_output=np.asarray(from_output).ravel().tolist(),
        std=np.asarray(std).ravel().tolist(),
        threads=len(os.sched_getaffinity(0)),
    )


def beside_torch(config: ConfigDict, parts: Parts, repeats: int, work: capacity.Work | None = None) -> list[Row]:
    """Milliseconds of a sample-step in rollout and update of each, and how many times faster this library's is.

    Args:
      config: resolved, of the run; both draw and train on ``train.batch_size`` images.
      parts: its parts; the trained parameters change.
      repeats: timed runs of each after a first one that compiles.
      work: operations of a sample, for the share of the chip's peak.

    Raises:
      InputError: the peer is not installed, did not start, or cannot have the same devices.
    """
    kind, count = jax.default_backend(), parts.mesh.size
    if kind != "cpu" and (kind != "gpu" or count > 1):
        raise InputError(
            f"--against: received 'torch' on {count} x {kind}; the loop runs on one GPU or on the CPU; use "
            "--set=mesh.data=1 on a GPU, or JAX_PLATFORMS=cpu"
        )
    n, steps, trained = config.train.batch_size, config.sample.num_steps, int(parts.trained_steps.sum())
    samples = {"rollout": n * steps, "update": n * trained}
    operations = {"rollout": work.rollout_step, "update": work.update_step} if work else {}
    found: list[Row] = []
    with _Peer("torch", "torch_peer", loop_of(config, parts)) as theirs:
        ours = works(config, parts)
        for name in samples:
            runs = {"torch": partial(theirs.ask, name), "ddpo_jax": partial(timed, ours[name])}
            seconds = in_turns(runs, repeats)
            typical = {who: float(np.median(values)) for who, values in seconds.items()}
            for who, value in typical.items():
                found += [(f"{name}: {who}, per sample-step", 1e3 * value / samples[name], "ms")]
                found += [(f"{name}: {who}", n / value, "images/s")]
                found += share(f"{name}: {who}", operations.get(name), samples[name] / value, parts)
            ratio, low, high = faster(seconds["torch"], seconds["ddpo_jax"])
            found += [(f"{name}: faster than torch", ratio, "times"), *interval(name, low, high)]
    return found


def works(config: ConfigDict, parts: Parts) -> dict[str, Callable[[], Any]]:
    """This library's rollout and update on one batch, each a function that starts it and returns what to wait for."""
    n, state = config.train.batch_size, parts.init()
    prompts, ids, key = [f"prompt {i}" for i in range(n)], np.arange(n, dtype=np.int32), jax.random.key(config.seed)
    drawn, _ = parts.sampler.trajectories(state.params, prompts, ids, key)
    trajectory = jax.tree.map(sharding.fetch, drawn)
    samples = ScoredSamples(
        latents=trajectory.latents,
        log_prob=trajectory.log_prob,
        weights=np.ones_like(trajectory.log_prob),
        mask=np.tile(parts.trained_steps.astype(np.float32), (n, 1)),
        context=parts.sampler.codec.embed(prompts),
        prompt_ids=ids.astype(np.int64),
        group_ids=ids.astype(np.int64),
        rewards=np.zeros(n, np.float32),
        advantages=np.random.default_rng(0).standard_normal(n),
    )
    batch = next(batching.minibatches(np.random.default_rng(0), samples, n, parts.trained_steps, parts.traits))
    batch = sharding.put_batch(batch, parts.mesh)

    def rollout() -> Any:
        return parts.sampler.trajectories(state.params, prompts, ids, key)

    def update() -> Any:
        nonlocal state
        state, metrics = parts.learner.update(state, parts.model.reference, parts.model.frozen, parts.uncond, batch)
        return state, metrics

    return {"rollout": rollout, "update": update}


def timed(function: Callable[[], Any]) -> float:
    """Seconds until what ``function`` returns is computed."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


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
    with _Peer("trl", "trl_peer", settings) as theirs:
        ours = {name: _epoch(settings, fraction, backend, devices) for name, fraction in FRACTIONS.items()}
        runs: dict[str, Callable[[], float]] = {"trl": lambda: theirs.ask("epoch"), **ours}
        return rows(in_turns(runs, repeats))


def in_turns(runs: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each returned, one after another ``repeats`` times, without a first turn, which compiles."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            took = run()
            if turn:
                found[name].append(took)
    return found


def rows(seconds: dict[str, list[float]]) -> list[Row]:
    """The table of ``compare`` from the seconds of every epoch; the first name is the peer's."""
    peer, *ours = seconds
    found: list[Row] = [(f"{name}: an epoch", float(np.median(seconds[name])), "s") for name in seconds]
    for name in ours:
        ratio, low, high = faster(seconds[peer], seconds[name])
        found += [(f"{name}: faster than {peer}", ratio, "times"), *interval(name, low, high)]
    return found


def interval(name: str, low: float, high: float) -> list[Row]:
    """The rows of an interval; none where one turn gave none."""
    ends = [] if math.isnan(low) else [("low", low), ("high", high)]
    return [(f"{name}: 95 % interval, {end}", value, "times") for end, value in ends]


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
    """A process that answers a line with seconds."""

    def __init__(self, name: str, module: str, settings: Settings | Loop):
        self._name, self._log = name, tempfile.TemporaryFile("w+")
        command = [sys.executable, "-m", f"ddpo_jax.perf.{module}", json.dumps(dataclasses.asdict(settings))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, bufsize=1
        )

    def __enter__(self) -> _Peer:
        if self._answer() != "ready":
            raise self._fault("did not start")
        return self

    def __exit__(self, *args: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def ask(self, line: str) -> float:
        """Has it do what the line says; the seconds that it took."""
        print(line, file=self._process.stdin, flush=True)
        answer = self._answer()
        if not answer:
            raise self._fault("ended")
        return float(answer)

    def _fault(self, what: str) -> InputError:
        return InputError(f"--against: received {self._name!r}, which {what}: {self._last()}; {INSTALL[self._name]}")

    def _answer(self) -> str:
        return "" if self._process.stdout is None else self._process.stdout.readline().strip()

    def _last(self) -> str:
        self._process.wait(10)
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1] if lines else "it said nothing"
