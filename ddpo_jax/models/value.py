"""The value network: expected final reward of a denoising trajectory from (latents, prompt, timestep)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ddpo_jax.models.layers import Conv, LayerNorm, Linear, timestep_embedding


class ValueNetwork(nnx.Module):
    """Two strided convolutions averaged over the image, the averaged prompt embedding and the timestep -> one number.

    All in float32. Latents of diffusion models have about unit scale at every step; text embeddings have outlying
    features, so their average is normalised. The last layer starts at zero, and so does the value.

    Args:
      channels: of the latents.
      context_dim: of the text embeddings.
      width: of the hidden layers.
      rngs: of the random initialisation.
    """

    def __init__(self, channels: int, context_dim: int, *, width: int = 64, rngs: nnx.Rngs):
        self.width = width
        self.conv_1 = Conv(channels, width, 3, stride=2, padding=1, rngs=rngs)
        self.conv_2 = Conv(width, width, 3, stride=2, padding=1, rngs=rngs)
        self.prompt_norm = LayerNorm(context_dim)
        self.prompt_proj = Linear(context_dim, width, rngs=rngs)
        self.time_proj = Linear(width, width, rngs=rngs)
        self.hidden = Linear(3 * width, 2 * width, rngs=rngs)
        self.out = nnx.Linear(2 * width, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(
        self, latents: Float[Array, "B h w c"], timesteps: Int[Array, " B"], context: Float[Array, "B L D"]
    ) -> Float[Array, " B"]:
        """The value of each sample.

        Args:
          latents: before the step.
          timesteps: the scheduler's values (0-999).
          context: text embeddings.
        """
        image = nnx.silu(self.conv_2(nnx.silu(self.conv_1(latents)))).mean(axis=(1, 2))
        prompt = nnx.silu(self.prompt_proj(self.prompt_norm(context.mean(axis=1))))
        time = nnx.silu(self.time_proj(timestep_embedding(timesteps, self.width)))
        return self.out(nnx.silu(self.hidden(jnp.concatenate([image, prompt, time], axis=-1))))[:, 0]
