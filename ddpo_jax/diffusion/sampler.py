"""Sampling trajectories: one ``lax.scan`` over denoising steps that keeps all latents and log-probabilities."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddpo_jax.diffusion.policy import Policy, per_sample_normal
from ddpo_jax.ops import gaussian
from ddpo_jax.types import Params, Trajectory

_INITIAL = 1 << 20  # key index of the initial noise, beyond any step index


def sample(
    policy: Policy,
    params: Params,
    keys: Array,
    context: Float[Array, "N L D"],
    uncond: Float[Array, "L D"],
    latent_shape: tuple[int, int, int],
    root_keys: Array | None = None,
    branch_step: Int[Array, ""] | int = 0,
) -> Trajectory:
    """Denoises N samples from noise.

    Args:
      policy: network, guidance and schedule of T steps.
      params: of the network.
      keys: one PRNG key per sample [N].
      context: prompt embeddings.
      uncond: embedding of the empty prompt.
      latent_shape: (h, w, c).
      root_keys: one key per sample; samples with equal root keys (and prompts) share the initial noise and the
        steps before ``branch_step``, then part (B2-DiffuRL's branching).
      branch_step: first step whose noise comes from ``keys``; 0 shares only the initial noise.

    Returns:
      The trajectory; log_prob is 0 at a step without noise, which has no density (see ``Schedule.trainable``).
    """
    roots = keys if root_keys is None else root_keys
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    initial = per_sample_normal(fold(roots, _INITIAL), latent_shape)

    def denoise(latents: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
        steps = jnp.full(latents.shape[0], index)
        mean, std, _ = policy.step(params, latents, steps, context, uncond)
        step_keys = jnp.where(index < branch_step, fold(roots, index), fold(keys, index))
        next_latents = mean + std[:, None, None, None] * per_sample_normal(step_keys, latent_shape)
        noisy = std > 0
        log_prob = gaussian.log_prob(next_latents, mean, jnp.where(noisy, std, 1.0))
        return next_latents, (next_latents, jnp.where(noisy, log_prob, 0.0))

    _, (path, log_prob) = jax.lax.scan(denoise, initial, jnp.arange(policy.schedule.num_steps))
    latents = jnp.concatenate([initial[None], path]).swapaxes(0, 1)
    return Trajectory(latents=latents, log_prob=log_prob.T)
