"""Stable Diffusion in its published sizes with random weights, or with shapes in place of weights.

Speed and memory do not depend on what the weights are, so neither takes a download.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float
from ml_collections import ConfigDict

from ddpo_jax.models import keys
from ddpo_jax.models.pipeline import Pipeline
from ddpo_jax.models.unet import UNet2DCondition, UNetConfig
from ddpo_jax.models.vae import AutoencoderKL, VAEConfig
from ddpo_jax.training.build import Model, split_model

_VAE = VAEConfig(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
)


@dataclasses.dataclass(frozen=True)
class Size:
    """What the speed of a pipeline depends on."""

    unet: UNetConfig
    vae: VAEConfig
    text_params: int  # of the text encoder
    tokens: int = 77  # of a prompt
    prediction_type: str = "epsilon"

    @property
    def latent_dims(self) -> int:
        """Numbers in the latents of one sample."""
        side = self.unet.sample_size
        h, w = (side, side) if isinstance(side, int) else side or (0, 0)
        return h * w * self.unet.in_channels


SIZES = {  # both at 512 x 512 pixels
    "sd15": Size(UNetConfig(sample_size=64, cross_attention_dim=768), _VAE, 123_060_480),
    "sd21": Size(
        UNetConfig(
            sample_size=64,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        ),
        _VAE,
        340_387_840,
        prediction_type="v_prediction",
    ),
}


class RandomPipeline(Pipeline):
    """A pipeline without text encoder and tokenizer: a prompt's embedding is noise that its characters seed."""

    def __init__(self, size: Size, dtype: str, seed: int | None = None):
        """Args:
        size: of the networks.
        dtype: compute type; parameters are float32.
        seed: of the weights; None leaves shapes in their place.
        """
        self.unet = keys.abstract(UNet2DCondition, size.unet, dtype=jnp.dtype(dtype))
        self.vae = keys.abstract(AutoencoderKL, size.vae, dtype=jnp.dtype(dtype))
        self.configs = {
            "scheduler": {
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "set_alpha_to_one": False,
                "steps_offset": 1,
                "prediction_type": size.prediction_type,
            }
        }
        self.revision = None
        self._size, self._decoders = size, {}
        if seed is not None:
            for number, module in enumerate((self.unet, self.vae)):
                randomise(module, jax.random.fold_in(jax.random.key(seed), number))

    @property
    def context_shape(self) -> tuple[int, int]:
        """(L, D) of a prompt's embedding."""
        return self._size.tokens, self._size.unet.cross_attention_dim

    def embed(self, prompts: Sequence[str]) -> Float[np.ndarray, "N L D"]:
        """Standard normal noise."""
        rows = [np.random.default_rng([*prompt.encode()]).standard_normal(self.context_shape) for prompt in prompts]
        return np.stack(rows).astype(np.float32)


def randomise(module: nnx.Module, key: jax.Array) -> None:
    """Gives every parameter of an abstract module a value that keeps activations of order one.

    Kernels are normal with variance 1 / fan-in, scales of norms 1, biases 0.
    """
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    filled = []
    for number, (path, leaf) in enumerate(state):
        shape = leaf.get_value().shape
        if len(shape) == 1:
            value = jnp.full(shape, 1.0 if path[-1] == "scale" else 0.0, jnp.float32)
        else:
            noise = jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32)
            value = noise / math.sqrt(math.prod(shape[:-1]))
        filled.append((path, leaf.replace(value)))
    nnx.update(module, nnx.from_flat_state(filled))


def random_model(config: ConfigDict, size: Size, *, shapes_only: bool = False) -> Model:
    """A model of ``size`` as ``build.load_model`` would have it.

    Args:
      config: resolved; ``model`` and ``revision`` are not read.
      size: of the networks.
      shapes_only: shapes in place of the UNet's and the VAE's arrays; nothing of their size is allocated.
    """
    return split_model(config, RandomPipeline(size, config.dtype, None if shapes_only else config.seed))
