"""Which steps of a trajectory an update trains, and with what weight: numpy on the host, random by a generator only."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from ddpo_jax.errors import InputError


def normalise(weights: Float[np.ndarray, "N T"], trained: Bool[np.ndarray, " T"]) -> Float[np.ndarray, "N T"]:
    """Timestep weights with mean 1 over the trained steps of every trajectory, 0 elsewhere.

    The scale of a weighting scheme then never changes the learning rate ("Selective Timestep Weighting" (anonymous),
    Fig. 4: "all normalized to mean 1").

    Raises:
      InputError: if a trajectory's weights are negative, not finite or all zero.
    """
    weights = np.where(trained, np.asarray(weights, np.float64), 0.0)
    total = weights.sum(axis=1, keepdims=True)
    if not np.isfinite(weights).all() or (weights < 0).any() or (total <= 0).any():
        raise InputError(
            "weighting: received weights that are negative, not finite or zero for a whole trajectory; "
            "must be >= 0 with a positive sum; use another weighting.name"
        )
    return (weights * trained.sum() / total).astype(np.float32)


def uniform_subset(
    rng: np.random.Generator, num_samples: int, trained: Bool[np.ndarray, " T"], count: int
) -> Int[np.ndarray, "N S"]:
    """``count`` different trained steps of every sample, in an order that is drawn for each sample independently."""
    steps = np.tile(np.flatnonzero(trained), (num_samples, 1))
    return rng.permuted(steps, axis=1)[:, :count].astype(np.int32)


def importance_subset(
    rng: np.random.Generator, weights: Float[np.ndarray, "N T"], count: int
) -> Int[np.ndarray, "N S"]:
    """``count`` steps of every sample drawn with probability proportional to its weights, by systematic sampling.

    With weights of mean 1 over T' trained steps, the expected number of draws of step t is ``count * w_t / T'``.
    Hence the plain mean of a quantity g over the draws has expectation ``1/T' sum_t w_t g_t``: the weighted mean over
    all steps, unbiased, at ``count / T'`` of its cost. One uniform offset per sample (rather than ``count``
    independent draws) gives the same expectation with less variance.
    """
    cumulative = np.cumsum(weights, axis=1, dtype=np.float64)
    cumulative /= cumulative[:, -1:]
    points = (np.arange(count) + rng.random((len(weights), 1))) / count
    steps = (points[:, :, None] >= cumulative[:, None, :]).sum(axis=2)
    last = weights.shape[1] - 1 - np.argmax(weights[:, ::-1] > 0, axis=1)  # guards the rounding of the final 1.0
    return np.minimum(steps, last[:, None]).astype(np.int32)
