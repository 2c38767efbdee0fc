"""DDIM as a noise process: each denoising step is a Gaussian whose mean and standard deviation are known, in float32.

DDIM with noise (Song et al. 2021, arXiv:2010.02502, Eq. 12 and 16); eta = 1 is the posterior of DDPM (Ho et al. 2020,
arXiv:2006.11239, Eq. 7).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from ddpo_jax.diffusion import schedule


@struct.dataclass
class DDIM(schedule.NoiseLevels):
    """A member of ``Transition``; see there for what each method means."""

    def predictions(
        self, model_output: Float[Array, "B h w c"], latents: Float[Array, "B h w c"], index: Int[Array, " B"]
    ) -> tuple[Float[Array, "B h w c"], Float[Array, "B h w c"]]:
        """``(clean latents, noise)``, by the prediction type that the network was trained with."""
        alpha, sigma = self.alpha[index], self.sigma[index]
        signal, noise = _column(jnp.sqrt(alpha)), _column(sigma)
        if self.prediction_type == "epsilon":
            return (latents - noise * model_output) / signal, model_output
        if self.prediction_type == "v_prediction":
            return signal * latents - noise * model_output, signal * model_output + noise * latents
        return model_output, (latents - signal * model_output) / noise

    def step(
        self, model_output: Float[Array, "B h w c"], latents: Float[Array, "B h w c"], index: Int[Array, " B"]
    ) -> tuple[Float[Array, "B h w c"], Float[Array, " B"]]:
        """``(mean, std)``; std is 0 where the schedule has no noise."""
        model_output, latents = model_output.astype(jnp.float32), latents.astype(jnp.float32)
        clean, noise = self.predictions(model_output, latents, index)
        mean = _column(jnp.sqrt(self.alpha_prev[index])) * clean + _column(self.direction[index]) * noise
        return mean, self.std[index]

    def add_noise(
        self, clean: Float[Array, "B h w c"], noise: Float[Array, "B h w c"], timesteps: Int[Array, " B"]
    ) -> tuple[Float[Array, "B h w c"], Float[Array, "B h w c"]]:
        """``(noised latents, target of the network output)``."""
        alpha = self.alphas_cumprod[timesteps]
        signal, sigma = _column(jnp.sqrt(alpha)), _column(jnp.sqrt(1 - alpha))
        noised = signal * clean + sigma * noise
        target = {"epsilon": noise, "v_prediction": signal * noise - sigma * clean, "sample": clean}
        return noised, target[self.prediction_type]


def make(config: Mapping[str, Any], num_steps: int, eta: float) -> DDIM:
    """The DDIM steps that a scheduler config describes; arguments and errors are those of ``schedule.make``."""
    return DDIM(**vars(schedule.make(config, num_steps, eta)))


def _column(per_sample: Float[Array, " B"]) -> Float[Array, "B 1 1 1"]:
    return per_sample[:, None, None, None]
