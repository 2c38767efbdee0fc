"""A Gaussian over the position of a step in the trajectory: what the three Gaussian weightings share.

"Selective Timestep Weighting" (anonymous), section 4.2 and Fig. 4, gives no numbers. Here a position runs from 0 (the
noisiest step) to 1 (the last), the centres are 0, 1/2 and 1, so that "early" falls and "late" rises all along, and the
width is 1/4.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from ddpo_jax.diffusion.transition import Transition
from ddpo_jax.errors import InputError


def options(centre: float) -> ConfigDict:
    """The options of a Gaussian weighting."""
    return ConfigDict(
        {
            "centre": centre,  # position of the step that counts most: 0 is the noisiest step, 1 the last
            "width": 0.25,  # standard deviation, in the same unit
        }
    )


def check(config: ConfigDict, num_steps: int) -> None:
    """Refuses options that give no Gaussian.

    Raises:
      InputError: one line for each wrong option.
    """
    faults = []
    if not math.isfinite(config.centre):
        faults.append(f"weighting.centre: received {config.centre!r}; it must be a finite number; use 0.5")
    if not 0.01 <= config.width < math.inf:  # a narrower one leaves every step but one with a weight of 0
        faults.append(f"weighting.width: received {config.width!r}; it must be at least 0.01; use 0.25")
    if faults:
        raise InputError("\n".join(faults))


def weights(latents: Float[Array, "N T1 h w c"], transition: Transition, config: ConfigDict) -> Float[Array, "N T"]:
    """``exp(-((position - centre) / width)^2 / 2)``, the same row for each of the N trajectories."""
    check(config, transition.num_steps)
    position = jnp.linspace(0.0, 1.0, transition.num_steps, dtype=jnp.float32)
    row = jnp.exp(-0.5 * jnp.square((position - config.centre) / config.width))
    return jnp.tile(row, (latents.shape[0], 1))
