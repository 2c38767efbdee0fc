"""Scored samples -> the minibatches of an epoch: which samples go together, and which of their steps are trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

from ddpo_jax.ops import steps
from ddpo_jax.training.learner import Minibatch
from ddpo_jax.types import ScoredSamples, Traits


def order(rng: np.random.Generator, group_ids: Int[np.ndarray, " N"], whole_groups: bool) -> Int[np.ndarray, " N"]:
    """A random order of the samples; with ``whole_groups`` the samples of a group stay next to each other."""
    if not whole_groups:
        return rng.permutation(len(group_ids))
    _, group = np.unique(group_ids, return_inverse=True)
    rank = rng.permutation(group.max() + 1)
    return np.argsort(rank[group], kind="stable")


def minibatches(
    rng: np.random.Generator,
    samples: ScoredSamples,
    batch_size: int,
    trained: Bool[np.ndarray, " T"],
    traits: Traits,
    *,
    timestep_fraction: float = 1.0,
    step_sampling: str = "uniform",
    unweighted_penalty: bool = False,
) -> Iterator[Minibatch]:
    """One pass over the samples in random order, ``batch_size`` at a time; the last one is filled with masked samples.

    Args:
      rng: of the order, the trained steps and the noise of ``denoise_mse``.
      samples: N of them.
      batch_size: samples of one update.
      trained: the steps that have a density.
      traits: of the algorithm. A coupled loss gets all steps, in the same order for every sample.
      timestep_fraction: the part of the steps that is trained, drawn for each sample on its own; with 1 every step is
        trained once, with its weight.
      step_sampling: how a part is drawn: "uniform", or "importance": with probabilities that follow the timestep
        weights, whose place in the loss a correction then takes.
      unweighted_penalty: the algorithm has a penalty that the weights leave alone. Then the draw by importance follows
        the mean of the weights and 1: a step without weight is in the penalty's mean too, and no correction is above 2.
    """
    count = max(1, round(timestep_fraction * int(trained.sum())))
    rows = order(rng, samples.group_ids, traits.group)
    missing = -len(rows) % batch_size
    present = np.concatenate([np.ones(len(rows), np.float32), np.zeros(missing, np.float32)])
    for chunk, mask in zip(
        np.concatenate([rows, np.resize(rows, missing)]).reshape(-1, batch_size),
        present.reshape(-1, batch_size),
        strict=True,
    ):
        chosen = samples[chunk]
        correction = None
        if not traits.separable:
            columns = np.tile(np.flatnonzero(trained).astype(np.int32), (batch_size, 1))
        elif step_sampling == "importance":
            shares = (chosen.weights + 1) / 2 if unweighted_penalty else chosen.weights
            columns, correction = steps.importance_subset(rng, shares, chosen.mask > 0, trained, count)
        else:
            columns = steps.uniform_subset(rng, chosen.mask > 0, trained, count)
        chosen = dataclasses.replace(chosen, mask=chosen.mask * mask[:, None])
        yield minibatch(
            rng, chosen, columns, correction, unweighted_penalty=unweighted_penalty, by_group=not traits.separable
        )


def minibatch(
    rng: np.random.Generator,
    samples: ScoredSamples,
    columns: Int[np.ndarray, "N S"],
    correction: Float[np.ndarray, "N S"] | None = None,
    *,
    unweighted_penalty: bool = False,
    by_group: bool = False,
) -> Minibatch:
    """The samples as one minibatch that trains the steps ``columns`` of each.

    Args:
      rng: of the random timesteps and noise of ``denoise_mse``.
      samples: N of them.
      columns: steps.
      correction: of steps that were not all equally likely; multiplies their weights.
      unweighted_penalty: the algorithm has a penalty that the weights leave alone.
      by_group: two draws of the same prompt count as two prompts (they do not share their noise).
    """
    n = len(samples)
    _, dense = np.unique(samples.group_ids if by_group else samples.prompt_ids, return_inverse=True)  # 32-bit
    weights = np.take_along_axis(samples.weights, columns, axis=1)
    correction = np.ones_like(weights) if correction is None else correction
    return Minibatch(
        latents=samples.latents,
        context=samples.context,
        old_log_prob=samples.log_prob,
        advantages=samples.advantages.astype(np.float32),
        rewards=samples.rewards,
        prompt_ids=dense.astype(np.int32),
        steps=columns,
        step_weight=weights * correction,
        penalty_weight=correction if unweighted_penalty else weights * correction,
        mask=np.take_along_axis(samples.mask, columns, axis=1),
        seeds=rng.integers(2**31, size=n, dtype=np.int32),
    )
