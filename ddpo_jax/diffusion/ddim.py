"""One denoising step as a Gaussian policy: its mean, standard deviation and log-probability, all in float32.

DDIM with noise (Song et al. 2021, Eq. 12 and 16); eta = 1 is the DDPM posterior (Ho et al. 2020, Eq. 7).
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddpo_jax.diffusion.schedule import Schedule


def predictions(
    schedule: Schedule,
    model_output: Float[Array, "B h w c"],
    latents: Float[Array, "B h w c"],
    alpha: Float[Array, " B"],
    sigma: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, "B h w c"], Float[Array, "B h w c"]]:
    """The clean latents and the noise that a network output stands for: ``(x0_hat, eps_hat)``.

    ``sigma`` is sqrt(1 - alpha), where it is known better than by the float32 difference.
    """
    signal, noise = _column(jnp.sqrt(alpha)), _column(jnp.sqrt(1 - alpha) if sigma is None else sigma)
    if schedule.prediction_type == "epsilon":
        return (latents - noise * model_output) / signal, model_output
    if schedule.prediction_type == "v_prediction":
        return signal * latents - noise * model_output, signal * model_output + noise * latents
    return model_output, (latents - signal * model_output) / noise


def step(
    schedule: Schedule,
    model_output: Float[Array, "B h w c"],
    latents: Float[Array, "B h w c"],
    index: Int[Array, " B"],
) -> tuple[Float[Array, "B h w c"], Float[Array, " B"]]:
    """The Gaussian over the next latents.

    Args:
      schedule: of T steps.
      model_output: the (guided) network output at ``latents``.
      latents: at step ``index``.
      index: the step of each sample, 0 is the noisiest.

    Returns:
      mean [B, h, w, c] and standard deviation [B] (0 where the schedule has no noise).
    """
    model_output, latents = model_output.astype(jnp.float32), latents.astype(jnp.float32)
    x0, eps = predictions(schedule, model_output, latents, schedule.alpha[index], schedule.sigma[index])
    mean = _column(jnp.sqrt(schedule.alpha_prev[index])) * x0 + _column(schedule.direction[index]) * eps
    return mean, schedule.std[index]


def add_noise(
    schedule: Schedule, clean: Float[Array, "B h w c"], noise: Float[Array, "B h w c"], timesteps: Int[Array, " B"]
) -> tuple[Float[Array, "B h w c"], Float[Array, "B h w c"]]:
    """The forward process at training timesteps: ``(noised latents, the target of the network output)``."""
    alpha = schedule.alphas_cumprod[timesteps]
    signal, sigma = _column(jnp.sqrt(alpha)), _column(jnp.sqrt(1 - alpha))
    noised = signal * clean + sigma * noise
    target = {"epsilon": noise, "v_prediction": signal * noise - sigma * clean, "sample": clean}
    return noised, target[schedule.prediction_type]


def _column(per_sample: Float[Array, " B"]) -> Float[Array, "B 1 1 1"]:
    return per_sample[:, None, None, None]
