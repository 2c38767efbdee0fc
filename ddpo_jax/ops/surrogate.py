"""Policy-gradient surrogates: minimising them ascends the expected reward. They are element-wise, not reduced."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpo_jax.types import AnyArray


def ratio(log_prob: Float[Array, "..."], old_log_prob: Float[AnyArray, "..."]) -> Float[Array, "..."]:
    """Importance ratio ``exp(log_prob - old_log_prob)``; exactly 1 where both are equal."""
    return jnp.exp(log_prob - old_log_prob)


def clipped(
    log_prob: Float[Array, "..."],
    old_log_prob: Float[AnyArray, "..."],
    advantages: Float[AnyArray, "..."],
    clip_range: float,
) -> Float[Array, "..."]:
    """PPO surrogate ``max(-A r, -A clip(r, 1 - c, 1 + c))`` (Schulman et al. 2017, Eq. 7; Gupta et al. 2025, Eq. 3).

    The gradient vanishes only where a move in the direction of the advantage has already left the trust region.

    Args:
      log_prob: log-probabilities under the current policy, of any shape.
      old_log_prob: those under the policy that sampled, of the same shape.
      advantages: broadcastable to that shape.
      clip_range: c, on the ratio.

    Returns:
      The loss, not reduced, of the shape and dtype of ``log_prob``.
    """
    value = ratio(log_prob, old_log_prob)
    limited = jnp.clip(value, 1.0 - clip_range, 1.0 + clip_range)
    return jnp.maximum(-advantages * value, -advantages * limited)


def clamped(
    log_prob: Float[Array, "..."],
    old_log_prob: Float[AnyArray, "..."],
    advantages: Float[AnyArray, "..."],
    clip_range: float,
) -> Float[Array, "..."]:
    """Clamp-only surrogate ``-A clip(r, 1 - c, 1 + c)``: no gradient outside the range, in either direction.

    The public code of DPOK (Fan et al. 2023) computes this. Unlike ``clipped`` it also drops samples that should be
    pulled back.
    """
    return jnp.clip(ratio(log_prob, old_log_prob), 1.0 - clip_range, 1.0 + clip_range) * -advantages


def score_function(log_prob: Float[Array, "..."], advantages: Float[AnyArray, "..."]) -> Float[Array, "..."]:
    """Likelihood-ratio (REINFORCE) loss ``-A log_prob``, which holds for samples of the current policy only."""
    return log_prob * -advantages
