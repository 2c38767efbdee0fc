"""Steps count by how far they moved this trajectory's latents: the mean of ``|z_t - z_{t-1}|``.

Source: "Selective Timestep Weighting" (anonymous), section 4.2.
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
    """Mean absolute difference of the latents before and after each step."""
    return jnp.mean(jnp.abs(jnp.diff(latents, axis=1)), axis=(2, 3, 4))
