"""The diffusion model as a policy over denoising steps: what the sampler and the learner share, so that both compute
the same log-probability from the same lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxtyping import Array, Float, Int, Num

from ddpo_jax.diffusion.guidance import guided
from ddpo_jax.diffusion.transition import Transition
from ddpo_jax.types import Params

NetworkFn = Callable[[Params, Params, Array, Array, Array], Array]  # (trained, frozen, latents, timesteps, context)


@dataclasses.dataclass(frozen=True)
class Policy:
    """Noise process, network and guidance; the parameters are given with each call.

    Attributes:
      transition: the noise process.
      network: ``(trained, frozen, latents [B,h,w,c], timesteps [B], context [B,L,D]) -> [B,h,w,c]``.
      guidance_scale: of classifier-free guidance; 1 turns it off.
      stop_uncond_gradient: no gradient through the unconditional branch.
    """

    transition: Transition
    network: NetworkFn
    guidance_scale: float
    stop_uncond_gradient: bool = False

    def model_output(
        self,
        params: Params,
        frozen: Params,
        latents: Float[Array, "B h w c"],
        timesteps: Num[Array, " B"],
        context: Float[Array, "B L D"],
        uncond: Float[Array, "L D"],
    ) -> Float[Array, "B h w c"]:
        """The guided network output in float32."""

        def network(*inputs: Array) -> Array:
            return self.network(params, frozen, *inputs)

        return guided(network, latents, timesteps, context, uncond, self.guidance_scale, self.stop_uncond_gradient)

    def step(
        self,
        params: Params,
        frozen: Params,
        latents: Float[Array, "B h w c"],
        index: Int[Array, " B"],
        context: Float[Array, "B L D"],
        uncond: Float[Array, "L D"],
    ) -> tuple[Float[Array, "B h w c"], Float[Array, " B"], Float[Array, "B h w c"]]:
        """``(mean, std, model_output)`` of the Gaussian over the next latents at step ``index`` of each sample."""
        output = self.model_output(params, frozen, latents, self.transition.timesteps[index], context, uncond)
        mean, std = self.transition.step(output, latents, index)
        return mean, std, output

    def predicted(
        self,
        params: Params,
        frozen: Params,
        latents: Float[Array, "B h w c"],
        index: Int[Array, " B"],
        context: Float[Array, "B L D"],
        uncond: Float[Array, "L D"],
    ) -> Float[Array, "B h w c"]:
        """The clean latents that the network predicts from ``latents`` at step ``index`` of each sample."""
        output = self.model_output(params, frozen, latents, self.transition.timesteps[index], context, uncond)
        return self.transition.predictions(output, latents, index)[0]
