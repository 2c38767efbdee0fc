"""Scored samples -> the minibatches of an epoch: which samples go together, and which of their steps are trained."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int

from ddpo_jax.learner import Minibatch
from ddpo_jax.ops import steps
from ddpo_jax.types import Samples


def order(rng: np.random.Generator, group_ids: Int[np.ndarray, " N"], whole_groups: bool) -> Int[np.ndarray, " N"]:
    """A random order of the samples; with ``whole_groups`` the samples of a group stay next to each other."""
    if not whole_groups:
        return rng.permutation(len(group_ids))
    _, group = np.unique(group_ids, return_inverse=True)
    rank = rng.permutation(group.max() + 1)
    return np.argsort(rank[group], kind="stable")


def minibatches(
    rng: np.random.Generator,
    samples: Samples,
    batch_size: int,
    trained: Bool[np.ndarray, " T"],
    *,
    timestep_fraction: float,
    whole_groups: bool,
) -> Iterator[Minibatch]:
    """One pass over the samples in random order, ``batch_size`` at a time.

    Args:
      rng: of the order, the trained steps and the noise of ``denoise_mse``.
      samples: N of them; ``batch_size`` divides N.
      batch_size: samples of one update.
      trained: the steps that may be trained.
      timestep_fraction: the part of them that is, drawn for each sample on its own.
      whole_groups: a minibatch holds all samples of a group or none.
    """
    count = max(1, round(timestep_fraction * int(trained.sum())))
    for rows in order(rng, samples.group_ids, whole_groups).reshape(-1, batch_size):
        yield minibatch(rng, samples[rows], steps.uniform_subset(rng, batch_size, trained, count))


def minibatch(rng: np.random.Generator, samples: Samples, chosen: Int[np.ndarray, "N S"]) -> Minibatch:
    """The samples as one minibatch that trains the chosen steps of each."""
    n = len(samples)
    _, dense = np.unique(samples.prompt_ids, return_inverse=True)  # device integers have 32 bits
    return Minibatch(
        latents=samples.latents,
        context=samples.context,
        old_log_prob=samples.log_prob,
        advantages=samples.advantages,
        rewards=samples.rewards,
        prompt_ids=dense.astype(np.int32),
        sample_weight=np.ones(n, np.float32),
        steps=chosen,
        step_weight=np.take_along_axis(samples.weights, chosen, axis=1),
        mask=np.ones(chosen.shape, np.float32),
        seeds=rng.integers(2**31, size=n, dtype=np.int32),
    )
