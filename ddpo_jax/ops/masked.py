"""Sums and means over the trained entries of an array; entries whose mask is 0 never reach value or gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def fill(values: Float[Array, "..."], mask: Float[Array, "..."]) -> Float[Array, "..."]:
    """``values`` where ``mask`` is not 0, else 0; what stands at masked entries (inf and nan too) has no gradient."""
    return jnp.where(mask != 0, values, jnp.zeros((), values.dtype))


def total(values: Float[Array, "..."], mask: Float[Array, "..."], axis: int | None = None) -> Float[Array, "..."]:
    """Sum of ``values * mask`` along ``axis`` (all of them by default)."""
    return jnp.sum(fill(values, mask) * mask, axis=axis)


def mean(values: Float[Array, "..."], mask: Float[Array, "..."], axis: int | None = None) -> Float[Array, "..."]:
    """Mean of ``values`` weighted by ``mask`` along ``axis``; 0 where nothing is left."""
    count = jnp.sum(jnp.broadcast_to(mask, values.shape), axis=axis)
    return total(values, mask, axis) / jnp.where(count == 0, jnp.ones_like(count), count)


def spread(values: Float[Array, "..."], count: jax.Array) -> Float[Array, "..."]:
    """Scale ``values`` so that their plain mean over all entries is ``sum(values) / count``.

    A coupled loss is reduced by its plain mean in the learner; this keeps padding from diluting that mean.
    """
    count = jnp.asarray(count, values.dtype)
    return values * (values.size / jnp.where(count == 0, jnp.ones_like(count), count))
