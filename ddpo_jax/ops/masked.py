"""Sums over the trained entries of an array; entries whose mask is 0 never reach value or gradient."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddpo_jax.types import AnyArray


def fill(values: Float[AnyArray, "..."], mask: Float[AnyArray, "..."]) -> Float[Array, "..."]:
    """``values`` where ``mask`` is not 0, else 0. Masked entries, inf and nan included, have no gradient."""
    return jnp.where(mask != 0, values, jnp.zeros((), values.dtype))


def total(values: Float[AnyArray, "..."], mask: Float[AnyArray, "..."], axis: int | None = None) -> Float[Array, "..."]:
    """Sum of ``values * mask`` along ``axis`` (all of them by default)."""
    return jnp.sum(fill(values, mask) * mask, axis=axis)


def spread(values: Float[Array, "..."], count: AnyArray) -> Float[Array, "..."]:
    """Scale ``values`` so that their plain mean over all entries is ``sum(values) / count``.

    A coupled loss is reduced by its plain mean in the learner; this keeps padding from diluting that mean.
    """
    count = jnp.asarray(count, values.dtype)
    return values * (values.size / jnp.where(count == 0, jnp.ones_like(count), count))


def trained(mask: Float[AnyArray, "N S"]) -> Float[Array, " N"]:
    """1 for every sample with a trained step, 0 for padding."""
    return jnp.any(mask != 0, axis=1).astype(mask.dtype)


def prompt_pairs(prompt_ids: Int[AnyArray, " N"], mask: Float[AnyArray, "N S"]) -> Float[Array, "N N"]:
    """1 for every unordered pair (a, b), a < b, of samples of the same prompt that both have a trained step."""
    used = trained(mask)
    same = (prompt_ids[:, None] == prompt_ids[None, :]).astype(mask.dtype)
    return jnp.triu(same * used[:, None] * used[None, :], k=1)
