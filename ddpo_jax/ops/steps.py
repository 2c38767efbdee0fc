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
    rng: np.random.Generator, wanted: Bool[np.ndarray, "N T"], trained: Bool[np.ndarray, " T"], count: int
) -> Int[np.ndarray, "N S"]:
    """``count`` different trained steps of every sample, in an order that is drawn for each sample independently.

    Steps that a sample does not want come after all that it does.
    """
    steps = rng.permuted(np.tile(np.flatnonzero(trained), (len(wanted), 1)), axis=1)
    last = ~np.take_along_axis(wanted, steps, axis=1)
    return np.take_along_axis(steps, np.argsort(last, axis=1, kind="stable"), axis=1)[:, :count].astype(np.int32)


def inclusion(
    weights: Float[np.ndarray, "N T"], wanted: Bool[np.ndarray, "N T"], trained: Bool[np.ndarray, " T"], count: int
) -> Float[np.ndarray, "N T"]:
    """The probability with which each step is among ``count`` different ones: proportional to its weight, at most 1.

    It is ``min(1, c w_t)`` with the c for which a trajectory's probabilities add up to ``count``. Where fewer than
    ``count`` steps have a weight, other wanted steps are taken equally often, and after those any trained ones.

    Args:
      weights: >= 0; only those of wanted steps matter.
      wanted: the steps of each trajectory that count.
      trained: the steps that may be drawn at all.
      count: from 1 to the number of trained steps.
    """
    wanted = wanted & trained
    tiers = np.broadcast_to(trained, wanted.shape), wanted, np.where(wanted, np.asarray(weights, np.float64), 0.0)
    certain = np.zeros(wanted.shape, bool)
    while True:  # each pass finds steps whose share is 1 or more, or ends
        share = np.zeros(wanted.shape)
        for tier in tiers:
            free = np.where(certain, 0.0, tier)
            share = np.where(free.any(axis=1, keepdims=True), free, share)
        total = share.sum(axis=1, keepdims=True)
        left = count - certain.sum(axis=1, keepdims=True)
        probability = np.where(certain, 1.0, left * share / np.where(total == 0, 1.0, total))
        over = (probability > 1 - 1e-12) & ~certain
        if not over.any():
            return probability
        certain |= over


def importance_subset(
    rng: np.random.Generator,
    weights: Float[np.ndarray, "N T"],
    wanted: Bool[np.ndarray, "N T"],
    trained: Bool[np.ndarray, " T"],
    count: int,
) -> tuple[Int[np.ndarray, "N S"], Float[np.ndarray, "N S"]]:
    """``count`` different steps of every sample, drawn with probability proportional to its weights, and a correction.

    The plain mean of ``correction * g`` over the drawn steps has the expectation ``1/T' sum_t g_t`` over a sample's T'
    wanted steps (Horvitz and Thompson): with g times the weight it estimates the weighted mean without bias, at
    ``count / T'`` of its cost. With ``count = T'`` every step is there once and the correction is 1: nothing is
    estimated. Of fewer than ``count`` wanted steps each is there once, and the caller's mask hides the others.

    One uniform offset per sample picks the steps (systematic sampling). No step is drawn twice: where its weight calls
    for that, it is taken once and for certain, and the draws that it does not need go to the others. For weights that
    fall by a third from one of 10 steps to the next and independent g of equal variance, 5 draws have 0.38 of the
    variance that they have with repetition, and 10 draws none at all, since they are all steps (computed in
    tests/ops/test_ops_steps.py).

    Args:
      rng: of the offsets.
      weights, wanted, trained, count: as of ``inclusion``.

    Returns:
      The steps, in the order of the trajectory, and ``min(count, T') / (T' probability of the step)``.
    """
    probability = inclusion(weights, wanted, trained, count)
    cumulative = np.cumsum(probability, axis=1)
    cumulative *= count / cumulative[:, -1:]
    points = np.arange(count) + rng.random((len(weights), 1))
    steps = (points[:, :, None] >= cumulative[:, None, :]).sum(axis=2)
    last = weights.shape[1] - 1 - np.argmax(probability[:, ::-1] > 0, axis=1)  # guards the rounding of the total
    steps = np.minimum(steps, last[:, None]).astype(np.int32)
    size = np.maximum((wanted & trained).sum(axis=1, keepdims=True), 1)
    correction = np.minimum(count, size) / (size * np.take_along_axis(probability, steps, axis=1))
    return steps, correction.astype(np.float32)
