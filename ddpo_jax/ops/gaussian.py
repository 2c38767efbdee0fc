"""Diagonal Gaussians with one standard deviation per sample: log-density and KL, averaged over latent dimensions."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _per_sample(std: jax.typing.ArrayLike, event_dims: int) -> jax.Array:
    std = jnp.asarray(std)
    return std.reshape(std.shape + (1,) * event_dims) if std.ndim else std


def log_prob(
    value: Float[Array, "..."], mean: Float[Array, "..."], std: jax.typing.ArrayLike, event_dims: int = 3
) -> Float[Array, "..."]:
    """Mean over the last ``event_dims`` axes of ``-(value - mean)^2 / (2 std^2) - log std - log(2 pi) / 2``.

    ``value`` was drawn, not computed: it is under stop-gradient. ``std`` (> 0) has the leading shape, or is a scalar.
    """
    std = _per_sample(std, event_dims)
    z = (jax.lax.stop_gradient(value) - mean) / std
    density = -0.5 * jnp.square(z) - jnp.log(std) - 0.5 * math.log(2.0 * math.pi)
    return jnp.mean(density, axis=tuple(range(-event_dims, 0)))


def kl(
    mean: Float[Array, "..."], ref_mean: Float[Array, "..."], std: jax.typing.ArrayLike, event_dims: int = 3
) -> Float[Array, "..."]:
    """KL(N(mean, std^2) || N(ref_mean, std^2)) = mean over the last axes of ``(mean - ref_mean)^2 / (2 std^2)``."""
    z = (mean - ref_mean) / _per_sample(std, event_dims)
    return 0.5 * jnp.mean(jnp.square(z), axis=tuple(range(-event_dims, 0)))
