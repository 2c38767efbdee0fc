"""Every random stream of a run, in one place: generators on the host, keys on the devices.

Nothing random is carried from one epoch to the next, so a run that resumes needs only the number of its epoch. The
values below are part of what a seed means: a run that changes one of them draws other images.
"""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

FIXED_EPOCH = 2**31 - 1  # the noise of the run's fixed images, which is that of no epoch of training
INITIAL_NOISE = 1 << 20  # index of a sample's initial noise, beyond the index of any step


class Stream(enum.IntEnum):
    """What the host's generators are for."""

    PROMPTS = 0  # the prompts of an epoch
    SHUFFLE = 1  # the order of the samples and what else an epoch's updates draw
    FIXED_PROMPTS = 2  # the prompts whose images show a run's progress
    MEASURED_PROMPTS = 2  # the prompts of a measurement, which has no run beside it
    EVALUATION = 3  # the prompts on which every run is evaluated


def generator(seed: int, epoch: int, stream: Stream) -> np.random.Generator:
    """The host's random numbers of one epoch and one purpose."""
    return np.random.default_rng([seed, epoch, int(stream)])


def epoch_key(seed: int, epoch: int) -> Array:
    """The key from which all noise of an epoch follows."""
    return jax.random.fold_in(jax.random.key(seed), np.int32(epoch))


def sample_keys(key: Array, ids: Int[Array, " N"]) -> Array:
    """The key of each sample [N]: it follows from the sample's number alone, not from its batch or device."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)


def step_keys(keys: Array, index: Int[Array, ""] | int) -> Array:
    """The key of each sample [N] for the noise of one step, or for ``INITIAL_NOISE``."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)


def normal(keys: Array, shape: tuple[int, ...]) -> Float[Array, "N ..."]:
    """Standard normal noise [N, *shape], each sample's from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
