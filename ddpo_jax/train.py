"""The training loop: sample, score, weigh, update, write. One epoch is one page."""

from __future__ import annotations

import math
import pathlib
import signal
import time
from types import FrameType, TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ddpo_jax import batching, checkpoint, metrics, sharding
from ddpo_jax import config as configs
from ddpo_jax.build import Parts, build, describe
from ddpo_jax.errors import Interrupted, RunFailure
from ddpo_jax.learner import TrainState
from ddpo_jax.ops.advantages import PromptStats
from ddpo_jax.reward_runner import RewardError
from ddpo_jax.rollout import Rollout, generator
from ddpo_jax.types import Params, Samples, Traits
from ddpo_jax.validate import validate

_SHUFFLE = 1  # stream of the host generator (0 is the prompts')


def train(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Trains (or resumes) the run of ``config`` in ``workdir``.

    Raises:
      ValueError: the input is wrong; nothing was trained.
      RunFailure: something broke in mid-run; the last complete epoch is saved.
      Interrupted: a signal asked to stop; the last complete epoch is saved.
    """
    config = configs.resolve(config, jax.default_backend(), jax.device_count())
    validate(config, jax.device_count())
    parts = build(config)
    refuse_other_run(config, workdir)
    stats = PromptStats()
    saver = checkpoint.Checkpointer(workdir, config.checkpoint.every, config.checkpoint.keep)
    state, start = restore(saver, parts, stats)
    if start >= config.num_epochs:
        logging.info("%s is finished: %d of %d epochs; raise num_epochs to go on", workdir, start, config.num_epochs)
        return
    logging.info("%s", describe(parts, config))
    with saver, parts.reward, metrics.Writer(workdir, start) as writer, Signals() as signals:
        progress = metrics.Progress(config.num_epochs, start)
        for epoch in range(start, config.num_epochs):
            try:
                progress.phase("sampling")
                state, behaviour = refresh(state, parts.traits, epoch)
                branch = branch_step(parts, config, epoch)
                rollout = parts.collector.collect(epoch, behaviour, parts.model.frozen, parts.uncond, branch)
            except (RewardError, ValueError) as error:  # the reward, or the user's prompt function
                if epoch == start and isinstance(error, ValueError):
                    raise
                save(saver, parts, state, stats, epoch, -math.inf)
                raise RunFailure(f"epoch {epoch}: {error}; saved, the same command goes on from here") from error
            progress.phase("updating")
            state, row = update(parts, config, state, stats, rollout, epoch)
            row = {"epoch": epoch, "reward_queries": (epoch + 1) * len(rollout.prompts)} | row
            writer.write(row)
            if config.log.images_every and epoch % config.log.images_every == 0:
                shown = slice(config.log.num_images)
                writer.images(epoch, rollout.images[shown], rollout.prompts[shown], rollout.samples.rewards[shown])
            stopping = signals.received or epoch + 1 == config.num_epochs
            save(saver, parts, state, stats, epoch + 1, row["reward/mean"], force=bool(stopping))
            progress.update(row)
            if signals.received:
                raise Interrupted(signals.received, f"stopped after epoch {epoch}; the same command goes on from there")
        progress.close()
    finish(workdir)


def update(
    parts: Parts, config: ConfigDict, state: TrainState, stats: PromptStats, rollout: Rollout, epoch: int
) -> tuple[TrainState, dict[str, Any]]:
    """All updates of one epoch: ``(state, row of metrics)``."""
    start = time.perf_counter()
    samples, options = rollout.samples, config.train
    advantages = parts.algorithm.advantages(
        samples.rewards.astype(np.float64), samples.prompt_ids, stats, config.algorithm
    )
    if parts.traits.standardized:
        advantages = np.clip(advantages, -options.adv_clip_max, options.adv_clip_max)
    samples = samples.replace(advantages=advantages.astype(np.float32))
    rng, trained = generator(config.seed, epoch, _SHUFFLE), parts.collector.trained_steps
    if options.recompute_log_prob == "on":
        samples = samples.replace(log_prob=recompute(parts, state, samples, rng, options.batch_size, trained))
    log: list[dict[str, jax.Array]] = []

    def train_on(state: TrainState, samples: Samples, batch_size: int) -> TrainState:
        for batch in batching.minibatches(
            rng,
            samples,
            batch_size,
            trained,
            parts.traits,
            timestep_fraction=options.timestep_fraction,
            step_sampling=options.step_sampling,
        ):
            batch = sharding.put_batch(batch, parts.mesh)
            state, out = parts.learner.update(state, parts.model.reference, parts.model.frozen, parts.uncond, batch)
            log.append(out)
        return state

    kept = parts.algorithm.select(advantages, samples.group_ids, config.algorithm) if parts.traits.branching else None
    for _ in range(options.num_inner_epochs):
        state = train_on(state, samples if kept is None else samples[kept], options.batch_size)
    replayed = parts.replay.retrieve(samples, epoch, rng)
    if replayed is not None:
        state = train_on(state, replayed, len(replayed))
    parts.replay.add(samples, epoch)
    values = jax.device_get(log)
    if not all(np.isfinite(list(out.values())).all() for out in values):
        raise RunFailure(f"epoch {epoch}: the loss or its gradient is not finite; lower train.learning_rate")
    row = {f"train/{key}": float(np.mean([out[key] for out in values])) for key in values[0]}
    if "ratio_deviation" in values[0]:
        row["train/ratio_first_update_deviation"] = float(values[0]["ratio_deviation"])
    row |= describe_rewards(rollout) | {"train/advantage_abs": float(np.abs(advantages).mean())}
    row |= {"replay/samples": 0 if replayed is None else len(replayed), "replay/bytes": parts.replay.nbytes}
    row |= {"time/rollout_s": rollout.rollout_s, "time/reward_s": rollout.reward_s}
    return state, row | {"time/update_s": time.perf_counter() - start}


def describe_rewards(rollout: Rollout) -> dict[str, float]:
    """Mean, spread and parts of an epoch's rewards."""
    rewards = rollout.samples.rewards
    row = {f"reward/{name}": float(getattr(rewards, name)()) for name in ("mean", "std", "min", "max")}
    row |= {f"reward/{name}": nan_mean(part) for name, part in rollout.parts.items()}
    return row | {"sample/distinct_prompts": len(set(rollout.prompts))}


def recompute(
    parts: Parts, state: TrainState, samples: Any, rng: np.random.Generator, batch_size: int, trained: np.ndarray
) -> np.ndarray:
    """The samples' log-probs by the learner's own network calls.

    In bfloat16 the sampler's larger batch rounds differently than the update's microbatch, which moves the ratio of the
    first update off 1 by more than the clip range.
    """
    columns = np.flatnonzero(trained).astype(np.int32)
    log_prob = samples.log_prob.copy()
    for start in range(0, len(samples), batch_size):
        rows = slice(start, start + batch_size)
        batch = batching.minibatch(rng, samples[rows], np.tile(columns, (len(samples[rows]), 1)))
        terms = parts.learner.log_prob(
            state.params, parts.model.reference, parts.model.frozen, parts.uncond, sharding.put_batch(batch, parts.mesh)
        )
        log_prob[rows, columns] = jax.device_get(terms.log_prob)
    return log_prob


def nan_mean(values: np.ndarray) -> float:
    """Mean of what is not NaN; NaN if nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def refresh(state: TrainState, traits: Traits, epoch: int) -> tuple[TrainState, Params]:
    """``(state, parameters that sample this epoch)``: the trained ones, or their copy of some epochs ago."""
    if traits.refresh_every == 1:
        return state, state.params
    if traits.refresh_every and epoch % traits.refresh_every == 0:
        state = state.replace(behaviour=jax.tree.map(jnp.copy, state.params))
    return state, state.behaviour


def branch_step(parts: Parts, config: ConfigDict, epoch: int) -> int:
    """How many steps the samples of a prompt share in this epoch (B2-DiffuRL's stage); 0 for all others."""
    if not parts.traits.branching:
        return 0
    steps = config.sample.num_steps
    return steps - parts.algorithm.interval(epoch, config.num_epochs, steps, config.algorithm)


def saved_arrays(parts: Parts, state: TrainState, stats: PromptStats) -> dict[str, Any]:
    """Everything that a run needs to go on, beside its config and the number of its epoch."""
    return {"state": state, "prompt_stats": stats.state_dict(), "replay": parts.replay.state_dict()}


def save(
    saver: checkpoint.Checkpointer,
    parts: Parts,
    state: TrainState,
    stats: PromptStats,
    epochs: int,
    reward: float,
    force: bool = True,
) -> None:
    """Starts saving the state after ``epochs`` finished epochs."""
    saver.save(epochs, saved_arrays(parts, state, stats), {}, reward, force)


def restore(saver: checkpoint.Checkpointer, parts: Parts, stats: PromptStats) -> tuple[TrainState, int]:
    """``(state, finished epochs)`` of the latest checkpoint, or the initial state and 0."""
    state = parts.learner.init(parts.model.params)
    found = saver.restore(saved_arrays(parts, state, stats))
    if found is None:
        return state, 0
    epochs, arrays, _ = found
    stats.load_state_dict(arrays["prompt_stats"])
    parts.replay.load_state_dict(arrays["replay"])
    return arrays["state"], epochs


def refuse_other_run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes ``config.json``; a folder that holds another run is refused, naming what differs."""
    path = workdir / "config.json"
    if path.exists() and (faults := configs.diff_that_matters(configs.from_json(path.read_text()), config)):
        raise ValueError("\n".join(faults))
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(configs.to_json(config))


def finish(workdir: pathlib.Path) -> None:
    """Draws the curve and says how far the reward rose and where everything is."""
    rows = metrics.read_metrics(workdir)
    metrics.plot_curve(workdir / "reward.png", {workdir.name: rows})
    first, last = rows[0], rows[-1]
    rise = last["reward/mean"] - first["reward/mean"]
    logging.info(
        "reward %.4g -> %.4g (%+.4g: %+.2f standard deviations of the first epoch) in %d queries. "
        "In %s: reward.png, samples/, metrics.jsonl, TensorBoard events, checkpoints/",
        *(first["reward/mean"], last["reward/mean"], rise, rise / max(first["reward/std"], 1e-12)),
        *(last["reward_queries"], workdir),
    )


class Signals:
    """Notes SIGTERM and SIGINT so that the epoch in progress can finish; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> Signals:
        self._old = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise Interrupted(number, "stopped at once; the last saved epoch stands")
        self.received = number
        logging.warning("received %s: saving after this epoch; once more stops at once", signal.Signals(number).name)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
