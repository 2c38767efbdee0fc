"""Times of rollout and update on the devices at hand, and tables of them.

Every time is the median of some runs after a first one, which compiles; no compilation cache is used, so the first run
is a cold one. A sample-step is one denoising step of one image: in the rollout one guided network call, in the update
the gradient of its log-probability.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array
from ml_collections import ConfigDict

from ddpo_jax import sharding
from ddpo_jax.models import layers
from ddpo_jax.models.functional import functional
from ddpo_jax.ops.advantages import PromptStats
from ddpo_jax.ops.random import Stream, generator
from ddpo_jax.perf import capacity
from ddpo_jax.rollout.collector import Rollout
from ddpo_jax.training import batching
from ddpo_jax.training import epoch as epochs
from ddpo_jax.training.build import Parts
from ddpo_jax.training.learner import TrainState
from ddpo_jax.training.watch import device_peak_bytes
from ddpo_jax.types import ScoredSamples

FRACTIONS = (1.0, 0.4)  # parts of the steps that an update trains
Row = tuple[str, float, str]  # what, value, unit


def median_time(function: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """``(first call, median of the next)`` in seconds; waits for what ``function`` returns."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return times[0], statistics.median(times[1:])


def measure(config: ConfigDict, parts: Parts, repeats: int, work: capacity.Work | None = None) -> list[Row]:
    """Times of a run's own programs.

    Args:
      config: resolved, of the run.
      parts: its parts; the trained parameters change.
      repeats: timed runs of each.
      work: operations of a sample, for the share of the chip's peak.
    """
    state, options = parts.init(), config.train
    steps, trained = config.sample.num_steps, int(parts.trained_steps.sum())
    rollouts: list[Rollout] = []

    def collect() -> None:
        rollouts.append(parts.collector.collect(len(rollouts), state.params))

    first, _ = median_time(collect, repeats)
    images = len(rollouts[-1].prompts)
    sampling = statistics.median(rollout.rollout_s for rollout in rollouts[1:])
    rows: list[Row] = [
        ("rollout, per sample-step", 1e3 * sampling / (images * steps), "ms"),
        ("rollout, with decoding", images / sampling, "images/s"),
        ("rollout, first run (compiles)", first, "s"),
        *share("rollout", work.rollout_step * steps + work.decode if work else None, images / sampling, parts),
    ]
    samples = epochs.assign(parts, config, PromptStats(), rollouts[-1])
    for fraction in FRACTIONS:
        first, typical, state = time_update(config, parts, state, samples, fraction, repeats)
        pairs = options.batch_size * max(1, round(fraction * trained))
        name = f"update, timestep_fraction {fraction:g}"
        rows += [
            (f"{name}, per sample-step", 1e3 * typical / pairs, "ms"),
            (name, options.batch_size / typical, "images/s"),
            (f"{name}, first run (compiles)", first, "s"),
            *share(name, work.update_step if work else None, pairs / typical, parts),
        ]

    return rows + epoch_rows(config, parts, state, repeats) + peak_memory()


def epoch_rows(config: ConfigDict, parts: Parts, state: TrainState, repeats: int) -> list[Row]:
    """Times of whole epochs, and the share of one in which all else waits for the reward."""
    stats, rollouts = PromptStats(), list[Rollout]()

    def epoch() -> None:
        nonlocal state
        rollouts.append(parts.collector.collect(len(rollouts), state.params))
        state, _ = epochs.update(parts, config, state, stats, rollouts[-1], len(rollouts) - 1)

    _, typical = median_time(epoch, repeats)
    waited = statistics.median(rollout.reward_s for rollout in rollouts[1:])
    return [
        ("whole epoch", len(rollouts[-1].prompts) / typical, "reward queries/s"),
        ("whole epoch", typical, "s"),
        (f"whole epoch, waiting for {config.reward.name}", 100 * waited / typical, "%"),
    ]


def time_update(
    config: ConfigDict, parts: Parts, state: TrainState, samples: ScoredSamples, fraction: float, repeats: int
) -> tuple[float, float, TrainState]:
    """``(first, median of the next, state)`` of one optimizer update on ``train.batch_size`` images, in seconds."""
    rows = np.resize(np.arange(len(samples)), config.train.batch_size)
    rng = generator(config.seed, 0, Stream.SHUFFLE)
    batches = batching.minibatches(
        rng, samples[rows], len(rows), parts.trained_steps, parts.traits, timestep_fraction=fraction
    )
    batch = sharding.put_batch(next(batches), parts.mesh)

    def update() -> Any:
        nonlocal state
        state, metrics = parts.learner.update(state, parts.model.reference, parts.model.frozen, parts.uncond, batch)
        return metrics

    return *median_time(update, repeats), state


def share(name: str, operations: float | None, per_second: float, parts: Parts) -> list[Row]:
    """Operations per second and device, and their share of the peak where it is known."""
    if not operations:
        return []
    rate = operations * per_second / parts.mesh.size
    peak = capacity.peak_flops(jax.devices()[0].device_kind)
    rows: list[Row] = [(f"{name}, operations per device", rate / 1e12, "TFLOP/s")]
    return rows + ([(f"{name}, share of the chip's peak", 100 * rate / peak, "%")] if peak else [])


def peak_memory() -> list[Row]:
    """The most memory that the process and each device's allocator have held."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    rows: list[Row] = [("peak memory, host", kilobytes / 2**20, "GiB")]
    peak = device_peak_bytes()
    return rows + ([("peak memory, device", peak / 2**30, "GiB")] if peak else [])


def plain_conv(x: Array, kernel: Array, stride: int, padding: layers.Padding) -> Array:
    """The convolution with the gradients that XLA derives."""
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def loop_rows(repeats: int, channels: int = 64, size: int = 16, images: int = 16, length: int = 8) -> list[Row]:
    """Gradient of one resnet block, summed over ``length`` batches: one call each, and inside a scan by two rules.

    On CPU XLA's own kernel gradient of a convolution is many times slower inside a loop than outside
    (``layers.conv``); on other devices both rules are the same.
    """
    block = layers.ResnetBlock2D(channels, channels, groups=8, epsilon=1e-5, rngs=nnx.Rngs(0))
    apply, params, _ = functional(block, lambda name: True)
    batches = jax.random.normal(jax.random.key(0), (length, images, size, size, channels))

    def gradient(params: Any, x: Array) -> Any:
        return jax.grad(lambda p: jnp.square(apply(p, {}, x)).mean())(params)

    def scanned(params: Any, batches: Array) -> Any:
        def add(total: Any, x: Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, x)), None

        return lax.scan(add, jax.tree.map(jnp.zeros_like, params), batches)[0]

    def timed(function: Callable[..., Any]) -> float:
        compiled = jax.jit(function)
        return 1e3 * median_time(lambda: compiled(params, batches), repeats)[1] / length

    single = jax.jit(gradient)
    outside = median_time(lambda: [single(params, x) for x in batches], repeats)[1]
    ours, inside = layers.conv, timed(scanned)
    layers.conv = plain_conv
    try:
        # A new function: jax keeps what it traced for the old one.
        trapped = timed(lambda params, batches: scanned(params, batches))
    finally:
        layers.conv = ours
    name = f"gradient of a resnet block, {images}x{size}x{size}x{channels}"
    return [
        (f"{name}: outside a loop", 1e3 * outside / length, "ms"),
        (f"{name}: inside lax.scan, layers.conv", inside, "ms"),
        (f"{name}: inside lax.scan, XLA's rule", trapped, "ms"),
        ("XLA's rule over layers.conv", trapped / inside, "x"),
    ]


def memory_rows(entries: Iterable[capacity.Memory]) -> list[Row]:
    """Every number of the table of what fits where."""
    rows: list[Row] = []
    for entry in entries:
        for name, value in dataclasses.asdict(entry).items():
            if isinstance(value, int):
                rows.append((f"{entry.setting}: {name.replace('_', ' ')}", value / 2**30, "GiB"))
        rows[-1] = (f"{rows[-1][0]} (fits {', '.join(entry.fits) or 'none'})", *rows[-1][1:])
    return rows


def memory_table(entries: Sequence[capacity.Memory], compile_for: str) -> str:
    """What fits where, in Markdown; GiB on one device."""
    columns = ["resident", "rollout", "decode", "update"]
    columns += ["compiled_rollout", "compiled_update"] if compile_for != "none" else []
    titles = [name.replace("_", " ") for name in columns] + [f"{chip} ({gib})" for chip, gib in capacity.CHIPS.items()]
    lines = [
        "| " + " | ".join(["GiB", *titles]) + " |",
        "|---|" + "---:|" * len(columns) + "---|" * len(capacity.CHIPS),
    ]
    for entry in entries:
        cells = [f"{getattr(entry, name) / 2**30:.1f}" for name in columns]
        cells += ["yes" if chip in entry.fits else "no" for chip in capacity.CHIPS]
        lines.append("| " + " | ".join([entry.setting, *cells]) + " |")
    notes = [
        "Each number but the first includes what is resident: parameters, AdamW's moments, VAE, text encoder.",
        "Rollout, decode and update are on paper: the arrays of the program as written, in their own types, "
        "elementwise work fused, attention in chunks. Not in them: padding, workspace and fragmentation, hence a chip "
        f"counts for {capacity.USABLE:.0%}; the network of a reward; fsdp, which splits parameters over several chips.",
    ]
    if compile_for == "here":
        notes.append(f"Compiled is what XLA reserves on this machine's {jax.devices()[0].device_kind}.")
        if jax.default_backend() == "cpu":
            notes[-1] += (
                " It is not an accelerator's number: a CPU computes bfloat16 in float32, so it keeps such copies of "
                "weights and activations, and has convolution gradients of its own."
            )
    elif compile_for != "none":
        notes.append(f"Compiled is what the compiler of TPU {compile_for} reserves; in its column it decides.")
    return "\n".join([*lines, "", *notes])


def report(header: dict[str, Any], rows: list[Row], as_json: bool) -> str:
    """The rows as a table, or everything as JSON."""
    if as_json:
        listed = [{"what": what, "value": value, "unit": unit} for what, value, unit in rows]
        return json.dumps(header | {"rows": listed}, indent=2)
    width = max((len(what) for what, *_ in rows), default=0)
    lines = [", ".join(f"{key} {value}" for key, value in header.items())]
    return "\n".join(lines + [f"{what:{width}}  {value:10.4g} {unit}" for what, value, unit in rows])
