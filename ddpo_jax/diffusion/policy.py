"""The diffusion model as a policy over denoising steps: what the sampler and the learner share, so that both compute
the same log-probability from the same lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddpo_jax.diffusion import ddim
from ddpo_jax.diffusion.guidance import guided
from ddpo_jax.diffusion.schedule import Schedule
from ddpo_jax.errors import InputError
from ddpo_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Policy:
    """Network, guidance and schedule.

    Attributes:
      network: ``(params, latents [B,h,w,c], timesteps [B], context [B,L,D]) -> [B,h,w,c]``; the sampler's and the
        learner's callers put it in with the frozen parameters bound (``bind``).
      schedule: the denoising steps.
      guidance_scale: of classifier-free guidance; 1 turns it off.
      stop_uncond_gradient: no gradient through the unconditional branch.
    """

    schedule: Schedule
    guidance_scale: float
    stop_uncond_gradient: bool = False
    network: Callable[[Params, Array, Array, Array], Array] | None = None

    def bind(self, network: Callable[[Params, Params, Array, Array, Array], Array], frozen: Params) -> Policy:
        """This policy with a network ``(trained, frozen, latents, timesteps, context)`` whose frozen part is given."""
        return dataclasses.replace(self, network=lambda params, *inputs: network(params, frozen, *inputs))

    def model_output(
        self,
        params: Params,
        latents: Float[Array, "B h w c"],
        timesteps: Int[Array, " B"],
        context: Float[Array, "B L D"],
        uncond: Float[Array, "L D"],
    ) -> Float[Array, "B h w c"]:
        """The guided network output in float32."""
        bound = self.network
        if bound is None:
            raise InputError("policy: it has no network; call bind(network, frozen) first")

        def network(*inputs: Array) -> Array:
            return bound(params, *inputs)

        return guided(network, latents, timesteps, context, uncond, self.guidance_scale, self.stop_uncond_gradient)

    def step(
        self,
        params: Params,
        latents: Float[Array, "B h w c"],
        index: Int[Array, " B"],
        context: Float[Array, "B L D"],
        uncond: Float[Array, "L D"],
    ) -> tuple[Float[Array, "B h w c"], Float[Array, " B"], Float[Array, "B h w c"]]:
        """``(mean, std, model_output)`` of the Gaussian over the next latents at step ``index`` of each sample."""
        output = self.model_output(params, latents, self.schedule.timesteps[index], context, uncond)
        mean, std = ddim.step(self.schedule, output, latents, index)
        return mean, std, output


def per_sample_normal(keys: Array, shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """Standard normal noise [B, *shape], each sample from its own key: independent of batch size and mesh."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
