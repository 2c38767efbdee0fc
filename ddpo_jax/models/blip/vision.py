"""BLIP's vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929; pre-LN, exact GELU).

All tokens are returned, the class token first, after the last layer norm. Attribute names are those of transformers'
``BlipVisionModel``, so `models.keys` maps its state dict by rule. Dropout is never applied.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ddpo_jax.models.attention import attention
from ddpo_jax.models.layers import Conv, LayerNorm, Linear

# Of the network as it was trained. The config.json of transformers' conversions says 1e-5, which is not it.
LAYER_NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class BlipVisionConfig:
    """Sizes; the defaults are those of ViT-B/16 at 480 pixels, which answers questions."""

    image_size: int = 480
    patch_size: int = 16
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12


class _Embeddings(nnx.Module):
    def __init__(self, config: BlipVisionConfig, dtype: Any, rngs: nnx.Rngs):
        width, patch = config.hidden_size, config.patch_size
        init, length = nnx.initializers.normal(0.02), (config.image_size // patch) ** 2 + 1
        self.class_embedding = nnx.Param(init(rngs.params(), (1, 1, width), jnp.float32))
        self.patch_embedding = Conv(3, width, patch, stride=patch, dtype=dtype, rngs=rngs)
        self.position_embedding = nnx.Param(init(rngs.params(), (1, length, width), jnp.float32))
        self.dtype = dtype

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B L D"]:
        patches = self.patch_embedding(images)
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        first = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (len(patches), 1, patches.shape[-1]))
        return jnp.concatenate([first, patches], axis=1) + self.position_embedding[...].astype(self.dtype)


class _Attention(nnx.Module):
    def __init__(self, config: BlipVisionConfig, dtype: Any, rngs: nnx.Rngs):
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, dtype=dtype, rngs=rngs)
        self.projection = Linear(config.hidden_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.heads = config.num_attention_heads

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1)
        out = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return self.projection(out.reshape(x.shape))


class _MLP(nnx.Module):
    def __init__(self, config: BlipVisionConfig, dtype: Any, rngs: nnx.Rngs):
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class _Layer(nnx.Module):
    def __init__(self, config: BlipVisionConfig, dtype: Any, rngs: nnx.Rngs):
        self.layer_norm1 = LayerNorm(config.hidden_size, epsilon=LAYER_NORM_EPS, dtype=dtype)
        self.self_attn = _Attention(config, dtype, rngs)
        self.layer_norm2 = LayerNorm(config.hidden_size, epsilon=LAYER_NORM_EPS, dtype=dtype)
        self.mlp = _MLP(config, dtype, rngs)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Encoder(nnx.Module):
    def __init__(self, config: BlipVisionConfig, dtype: Any, rngs: nnx.Rngs):
        self.layers = nnx.List([_Layer(config, dtype, rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        for layer in self.layers:
            x = layer(x)
        return x


class BlipVision(nnx.Module):
    """The vision transformer; parameters are named as those of transformers' `BlipVisionModel`."""

    def __init__(self, config: BlipVisionConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = _Embeddings(config, dtype, rngs)
        self.encoder = _Encoder(config, dtype, rngs)
        self.post_layernorm = LayerNorm(config.hidden_size, epsilon=LAYER_NORM_EPS, dtype=dtype)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B L D"]:
        """Normalised images [B, image_size, image_size, 3] -> the tokens of the class and of every patch.

        Raises:
          ValueError: the images have another size.
        """
        size = self.config.image_size
        if images.shape[1:] != (size, size, 3):
            raise ValueError(f"BLIP images must be [B, {size}, {size}, 3]; received {list(images.shape)}")
        return self.post_layernorm(self.encoder(self.embeddings(images)))
