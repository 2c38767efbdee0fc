"""Sampling trajectories: one ``lax.scan`` over denoising steps that keeps all latents and log-probabilities."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddpo_jax.diffusion.policy import Policy
from ddpo_jax.ops import gaussian, random
from ddpo_jax.types import Params, Trajectory


def sample(
    policy: Policy,
    params: Params,
    frozen: Params,
    keys: Array,
    context: Float[Array, "N L D"],
    uncond: Float[Array, "L D"],
    latent_shape: tuple[int, int, int],
    root_keys: Array | None = None,
    branch_step: Int[Array, ""] | int = 0,
) -> Trajectory:
    """Denoises N samples from noise.

    Args:
      policy: noise process of T steps, network and guidance.
      params, frozen: of the network.
      keys: one PRNG key per sample [N].
      context: prompt embeddings.
      uncond: embedding of the empty prompt.
      latent_shape: (h, w, c).
      root_keys: one key per sample; samples with equal root keys (and prompts) share the initial noise and the
        steps before ``branch_step``, then part (the branching of Hu et al. 2025, arXiv:2503.11240).
      branch_step: first step whose noise comes from ``keys``; 0 shares only the initial noise.

    Returns:
      The trajectory; log_prob is 0 at a step without noise, which has no density (see ``Transition.trainable``).
    """
    roots = keys if root_keys is None else root_keys
    initial = random.normal(random.step_keys(roots, random.INITIAL_NOISE), latent_shape)

    def noise_keys(index: Array) -> Array:
        return jnp.where(index < branch_step, random.step_keys(roots, index), random.step_keys(keys, index))

    _, path, log_prob = _denoise(policy, params, frozen, initial, noise_keys, context, uncond)
    return Trajectory(latents=jnp.concatenate([initial[None], path]).swapaxes(0, 1), log_prob=log_prob.T)


def resume(
    policy: Policy,
    params: Params,
    frozen: Params,
    keys: Array,
    context: Float[Array, "N L D"],
    uncond: Float[Array, "L D"],
    latents: Float[Array, "N h w c"],
    start: Int[Array, ""] | int,
) -> Float[Array, "N h w c"]:
    """Denoises latents that are at step ``start`` to the end; the rest as of ``sample``. Returns the final latents."""
    final, _, _ = _denoise(
        policy, params, frozen, latents, lambda index: random.step_keys(keys, index), context, uncond, start
    )
    return final


def _denoise(
    policy: Policy,
    params: Params,
    frozen: Params,
    latents: Float[Array, "N h w c"],
    noise_keys: Callable[[Array], Array],
    context: Float[Array, "N L D"],
    uncond: Float[Array, "L D"],
    start: Int[Array, ""] | int | None = None,
) -> tuple[Float[Array, "N h w c"], Float[Array, "T N h w c"], Float[Array, "T N"]]:
    """``(final latents, latents after each step, log_prob of each step)``; steps before ``start`` change nothing.

    Without ``start`` the program holds no choice at each step.
    """

    def denoise(latents: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
        steps = jnp.full(latents.shape[0], index)
        mean, std, _ = policy.step(params, frozen, latents, steps, context, uncond)
        noise = random.normal(noise_keys(index), latents.shape[1:])
        next_latents = mean + std[:, None, None, None] * noise
        noisy = std > 0
        log_prob = gaussian.log_prob(next_latents, mean, jnp.where(noisy, std, 1.0))
        return next_latents, (next_latents, jnp.where(noisy, log_prob, 0.0))

    def skip(latents: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
        return latents, (latents, jnp.zeros(latents.shape[0]))

    def body(latents: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
        return denoise(latents, index) if start is None else jax.lax.cond(index < start, skip, denoise, latents, index)

    final, (path, log_prob) = jax.lax.scan(body, latents, jnp.arange(policy.transition.num_steps))
    return final, path, log_prob
