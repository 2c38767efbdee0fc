"""Running means and maxima: pytrees that hold a sum and its denominator, in the manner of ``clu.metrics``. Merging
microbatches of different sizes gives the figure of the whole and not an average of averages.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float


@struct.dataclass
class Mean:
    """A mean as (sum, count); merging is exact. All zeros is the neutral element."""

    total: Float[Array, ""]
    count: Float[Array, ""]

    @classmethod
    def empty(cls) -> Mean:
        """The mean of no values."""
        return cls(total=jnp.zeros(()), count=jnp.zeros(()))

    @classmethod
    def of(cls, values: jax.typing.ArrayLike, mask: jax.typing.ArrayLike | None = None) -> Mean:
        """The mean of all ``values``, or of those where ``mask`` (same shape, 0 or 1, or weights) is not zero.

        Values under a zero of the mask do not matter, even if they are NaN.
        """
        values = jnp.asarray(values, jnp.float32)
        if mask is None:
            return cls(total=values.sum(), count=jnp.float32(values.size))
        mask = jnp.broadcast_to(jnp.asarray(mask, jnp.float32), values.shape)
        return cls(total=jnp.where(mask != 0, values * mask, 0.0).sum(), count=mask.sum())

    def merge(self, other: Mean) -> Mean:
        """The mean of both sets of values together."""
        return Mean(total=self.total + other.total, count=self.count + other.count)

    def over(self, axes: str | tuple[str, ...]) -> Mean:
        """Inside ``shard_map``: the mean over all devices of mesh axes."""
        return Mean(total=jax.lax.psum(self.total, axes), count=jax.lax.psum(self.count, axes))

    def compute(self) -> Float[Array, ""]:
        """The mean; NaN if nothing was counted."""
        return self.total / self.count


@struct.dataclass
class Max:
    """A running maximum. Minus infinity is the neutral element."""

    value: Float[Array, ""]

    @classmethod
    def empty(cls) -> Max:
        """The maximum of no values."""
        return cls(value=jnp.float32(-jnp.inf))

    @classmethod
    def of(cls, values: jax.typing.ArrayLike) -> Max:
        """The maximum of all ``values``."""
        return cls(value=jnp.asarray(values, jnp.float32).max())

    def merge(self, other: Max) -> Max:
        """The larger of the two."""
        return Max(value=jnp.maximum(self.value, other.value))

    def over(self, axes: str | tuple[str, ...]) -> Max:
        """Inside ``shard_map``: the maximum over all devices of mesh axes."""
        return Max(value=jax.lax.pmax(self.value, axes))

    def compute(self) -> Float[Array, ""]:
        """The maximum."""
        return self.value
