"""Steps count by the noise they add: the standard deviation of the reverse step.

Source: "Selective Timestep Weighting" (anonymous), section 4.2; the choice of TempFlow (He et al. 2025,
arXiv:2508.04324). It falls towards the end of the trajectory and is the same for every trajectory.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from ddpo_jax.diffusion.transition import Transition


def default_config() -> ConfigDict:
    """There are no options."""
    return ConfigDict()


def weights(latents: Float[Array, "N T1 h w c"], transition: Transition, config: ConfigDict) -> Float[Array, "N T"]:
    """``std_t`` of the transition, the same row for each of the N trajectories."""
    return jnp.tile(transition.std, (latents.shape[0], 1))
