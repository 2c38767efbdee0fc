"""Policy-gradient surrogates: minimising them ascends the expected reward. All are element-wise and unreduced."""

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
    """PPO surrogate ``max(-A r, -A clip(r, 1 - c, 1 + c))`` (Schulman et al. 2017 Eq. 7; DDPO; LOOP Eq. 13).

    The gradient vanishes only where a move in the direction of the advantage has already left the trust region.

    Args:
      log_prob: current log-probabilities, any shape.
      old_log_prob: of the policy that sampled, same shape.
      advantages: broadcastable to that shape.
      clip_range: c, on the ratio.

    Returns: the unreduced loss, same shape and dtype as ``log_prob``.
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

    It is what DPOK's public code computes. Unlike ``clipped`` it also drops samples that should be pulled back.
    """
    return jnp.clip(ratio(log_prob, old_log_prob), 1.0 - clip_range, 1.0 + clip_range) * -advantages


def score_function(log_prob: Float[Array, "..."], advantages: Float[AnyArray, "..."]) -> Float[Array, "..."]:
    """Likelihood-ratio (REINFORCE) loss ``-A log_prob``; valid for samples of the current policy only."""
    return log_prob * -advantages
