"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598), used alike in sampling and in training."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

Network = Callable[[Array, Array, Array], Array]  # (latents, timesteps, context) -> output


def guided(
    network: Network,
    latents: Float[Array, "B h w c"],
    timesteps: Num[Array, " B"],
    context: Float[Array, "B L D"],
    uncond: Float[Array, "L D"],
    scale: float,
    stop_uncond_gradient: bool = False,
) -> Float[Array, "B h w c"]:
    """``uncond + scale * (cond - uncond)`` in float32; both branches run as one batch of 2B.

    With scale 1 the unconditional branch cancels and is not computed. ``stop_uncond_gradient`` treats it as data.
    """
    if scale == 1.0:
        return network(latents, timesteps, context).astype(jnp.float32)
    null = jnp.broadcast_to(uncond, context.shape)
    if stop_uncond_gradient:
        cond_out = network(latents, timesteps, context)
        uncond_out = jax.lax.stop_gradient(network(latents, timesteps, null))
    else:
        latents, timesteps = (jnp.concatenate([x, x]) for x in (latents, timesteps))
        uncond_out, cond_out = jnp.split(network(latents, timesteps, jnp.concatenate([null, context])), 2)
    cond_out, uncond_out = cond_out.astype(jnp.float32), uncond_out.astype(jnp.float32)
    return uncond_out + scale * (cond_out - uncond_out)
