"""The updates of one epoch: advantages, minibatches, replay, and what the metrics say of them."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpo_jax import sharding
from ddpo_jax.errors import RunFailure
from ddpo_jax.hosts import rows as hosts
from ddpo_jax.ops import random, steps
from ddpo_jax.ops.advantages import PromptStats, decoupled, zscore
from ddpo_jax.ops.random import Stream
from ddpo_jax.rewards._shared.check import STATISTICS
from ddpo_jax.rollout.collector import Rollout
from ddpo_jax.training import batching
from ddpo_jax.training.build import Parts
from ddpo_jax.training.learner import Minibatch, TrainState, ValuedMinibatch
from ddpo_jax.training.value import ValueLearner
from ddpo_jax.types import Params, ScoredSamples, Traits


@dataclasses.dataclass(frozen=True)
class Updates:
    """What an epoch's updates report.

    Attributes:
      metrics: of every update, in order, by name.
      replayed: how many samples of earlier epochs were trained on.
      pairs: how many (sample, step) pairs were trained, over all updates.
      recomputed: how many log-probs were computed again before them.
    """

    metrics: list[dict[str, np.ndarray]]
    replayed: int
    pairs: int
    recomputed: int = 0


def refresh(state: TrainState, traits: Traits, epoch: int) -> tuple[TrainState, Params]:
    """``(state, parameters that sample this epoch)``: the trained ones, or their copy of some epochs ago."""
    if traits.refresh_every == 1:
        return state, state.params
    if traits.refresh_every and epoch % traits.refresh_every == 0:
        state = dataclasses.replace(state, behaviour=jax.tree.map(jnp.copy, state.params))
    return state, state.behaviour


def branch_step(parts: Parts, config: ConfigDict, epoch: int) -> int:
    """How many steps the samples of a prompt share in this epoch (B2-DiffuRL's stage); 0 for all others."""
    if not parts.traits.branching:
        return 0
    num_steps = config.sample.num_steps
    return num_steps - parts.algorithm.interval(epoch, config.num_epochs, num_steps, config.algorithm)


def update(
    parts: Parts, config: ConfigDict, state: TrainState, stats: PromptStats, rollout: Rollout, epoch: int
) -> tuple[TrainState, dict[str, Any]]:
    """All updates of one epoch: ``(state, row of metrics)``.

    Raises:
      RunFailure: a loss or its gradient is not finite.
    """
    start = time.perf_counter()
    samples = assign(parts, config, stats, rollout)
    state, updates = optimise(parts, config, state, samples, epoch)
    row = report(parts, rollout, samples, updates)
    return state, row | {"time/update_s": time.perf_counter() - start}


def assign(parts: Parts, config: ConfigDict, stats: PromptStats, rollout: Rollout) -> ScoredSamples:
    """The rollout's samples with their advantages, timestep weights and the steps that may be trained.

    Where the parts of the reward are standardised (``reward.normalise``), their sum takes the place of the rewards.
    """
    rewards = rollout.rewards.astype(np.float64)
    if weights := parts.reward.decoupled:
        rewards = decoupled(rollout.parts, weights, rollout.prompt_ids)
    if weights and parts.traits.standardized:
        # The last step of GDPO. The algorithm's own deviation, that of a prompt's sums, would make a prompt on which
        # the rewards cancel out as important as one on which they agree.
        advantages = zscore(rewards)
    else:
        advantages = parts.algorithm.advantages(rewards, rollout.prompt_ids, stats, config.algorithm)
    if parts.traits.standardized:
        advantages = np.clip(advantages, -config.train.adv_clip_max, config.train.adv_clip_max)
    trained = parts.trained_steps & (np.arange(config.sample.num_steps) >= rollout.branch_step)
    return ScoredSamples(
        latents=rollout.latents,
        log_prob=rollout.log_prob,
        weights=steps.normalise(rollout.weights, trained),
        mask=np.tile(trained.astype(np.float32), (len(rollout.prompts), 1)),
        context=rollout.context,
        prompt_ids=rollout.prompt_ids,
        group_ids=rollout.group_ids,
        rewards=rewards.astype(np.float32),
        advantages=advantages,
    )


def optimise(
    parts: Parts, config: ConfigDict, state: TrainState, samples: ScoredSamples, epoch: int
) -> tuple[TrainState, Updates]:
    """Trains on the epoch's samples and on those that replay brings back, then hands the epoch's to replay.

    Raises:
      RunFailure: a loss or its gradient is not finite.
    """
    rng, options = random.generator(config.seed, epoch, Stream.SHUFFLE), config.train
    log: list[dict[str, jax.Array]] = []
    pairs = 0
    unweighted_penalty = hasattr(parts.algorithm, "penalty") and not config.weighting.kl

    def train_on(state: TrainState, samples: ScoredSamples, batch_size: int) -> TrainState:
        nonlocal pairs
        for batch in batching.minibatches(
            rng,
            samples,
            batch_size,
            parts.trained_steps,
            parts.traits,
            timestep_fraction=options.timestep_fraction,
            step_sampling=options.step_sampling,
            unweighted_penalty=unweighted_penalty,
        ):
            pairs += int(np.count_nonzero(batch.mask))
            batch = sharding.put_batch(hosts.home(hosts.settled(batch)), parts.mesh)
            state, batch, fitted = fit_value(parts, state, batch)
            state, out = parts.learner.update(state, parts.model.reference, parts.model.frozen, parts.uncond, batch)
            log.append(out | fitted)
        return state

    recomputed = 0
    if options.recompute_log_prob == "on":
        recomputed = len(samples) * int(parts.trained_steps.sum())
        log_prob = recompute(parts, state, samples, rng, options.batch_size)
        samples = dataclasses.replace(samples, log_prob=log_prob)
    if parts.traits.branching:  # what the algorithm drops is not replayed either
        samples = samples[parts.algorithm.select(samples.advantages, samples.group_ids, config.algorithm)]
    for _ in range(options.num_inner_epochs):
        state = train_on(state, samples, options.batch_size)
    replayed = parts.replay.retrieve(samples, epoch, rng)
    if replayed is not None:
        together = config.replay.updates == "one"
        state = train_on(state, replayed, parts.replay.count if together else options.batch_size)
    if parts.value is not None:
        advantages = value_advantages(parts.value, parts, state, samples, options.batch_size)
        samples = dataclasses.replace(samples, advantages=advantages)
    parts.replay.add(samples, epoch)
    metrics = jax.device_get(log)
    if not all(np.isfinite(list(out.values())).all() for out in metrics):
        raise RunFailure(
            f"epoch {epoch}: the loss or its gradient is not finite; the epochs before it are saved. "
            "The same command would get here again: lower train.learning_rate and use another --workdir"
        )
    return state, Updates(metrics, 0 if replayed is None else len(replayed), pairs, recomputed)


def report(parts: Parts, rollout: Rollout, samples: ScoredSamples, updates: Updates) -> dict[str, Any]:
    """The epoch's row of metrics, but for the time of the updates."""
    first = updates.metrics[0] if updates.metrics else {}  # nothing where the algorithm kept no sample
    row = {f"train/{key}": float(np.mean([out[key] for out in updates.metrics])) for key in first}
    if "ratio_deviation" in first:
        row["train/ratio_first_update_deviation"] = float(first["ratio_deviation"])
    row |= {f"reward/{name}": float(getattr(rollout.rewards, name)()) for name in STATISTICS}
    row |= {f"reward/{name}": nan_mean(part) for name, part in rollout.parts.items()}
    row |= {"sample/distinct_prompts": len(set(rollout.prompts))}
    row |= {"train/advantage_abs": float(np.abs(samples.advantages).mean())}
    calls = samples.log_prob.size + updates.recomputed + parts.traits.pair_calls * updates.pairs
    row |= {"compute/denoiser_calls": calls}
    row |= {"replay/samples": updates.replayed, "replay/bytes": parts.replay.nbytes}
    return row | {"time/rollout_s": rollout.rollout_s, "time/reward_s": rollout.reward_s}


def fit_value(parts: Parts, state: TrainState, batch: Minibatch) -> tuple[TrainState, Minibatch, dict[str, jax.Array]]:
    """Updates the value network, where there is one, and gives the minibatch its predictions."""
    if parts.value is None:
        return state, batch, {}
    value, metrics = state.value, {}
    for _ in range(parts.traits.value_updates):
        value, metrics = parts.value.update(value, batch)
    valued = ValuedMinibatch(**vars(batch), values=parts.value.predict(value, batch))
    return dataclasses.replace(state, value=value), valued, metrics


def value_advantages(
    value: ValueLearner, parts: Parts, state: TrainState, samples: ScoredSamples, batch_size: int
) -> np.ndarray:
    """The advantages [N] that the loss trains on where a learned value is its baseline, by which replay ranks samples.

    They are the reward minus the value, as a mean over the trained steps.
    """
    columns = np.flatnonzero(parts.trained_steps).astype(np.int32)
    values = np.zeros_like(samples.rewards)
    for rows in hosts.batches(len(samples), batch_size):
        batch = batching.minibatch(np.random.default_rng(0), samples[rows], np.tile(columns, (len(rows), 1)))
        predicted = value.predict(state.value, sharding.put_batch(hosts.home(batch), parts.mesh))
        values[rows] = sharding.fetch(predicted).mean(axis=1)
    return samples.rewards - values


def recompute(
    parts: Parts, state: TrainState, samples: ScoredSamples, rng: np.random.Generator, batch_size: int
) -> np.ndarray:
    """The log-probs of the samples under the policy that drew them, by the learner's own network calls.

    In bfloat16 the sampler's larger batch rounds differently than the update's microbatch, which moves the ratio of the
    first update off 1 by more than the clip range.
    """
    columns = np.flatnonzero(parts.trained_steps).astype(np.int32)
    log_prob = samples.log_prob.copy()
    sampler = state.params if parts.traits.refresh_every == 1 else state.behaviour
    for rows in hosts.batches(len(samples), batch_size):
        batch = batching.minibatch(rng, samples[rows], np.tile(columns, (len(rows), 1)))
        batch = sharding.put_batch(hosts.home(batch), parts.mesh)
        terms = parts.learner.log_prob(sampler, parts.model.reference, parts.model.frozen, parts.uncond, batch)
        log_prob[np.ix_(rows, columns)] = sharding.fetch(terms.log_prob)
    return log_prob


def nan_mean(values: np.ndarray) -> float:
    """Mean of what is not NaN; NaN if nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan
