"""The two transformers of CLIP and what is built of them (Radford et al. 2021, arXiv:2103.00020, Sect. 2.4).

A pre-LN transformer. OpenAI's L/14 and B/32 use QuickGELU, LAION's H/14 the exact GELU. Attribute names are those of
the transformers state dict (``text_model.encoder.layers.3.self_attn.q_proj``), so `models.keys` maps them by rule.
Dropout is never applied: the towers are used for inference, or trained from scratch without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ddpo_jax.errors import InputError
from ddpo_jax.models.clip.config import LEGACY_EOS_TOKEN_ID, CLIPConfig, CLIPTextConfig, CLIPVisionConfig


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """x * Phi(x), the exact (erf) GELU."""
    return jax.nn.gelu(x, approximate=False)


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"quick_gelu": quick_gelu, "gelu": gelu}


def _linear(inputs: int, outputs: int, std: float, dtype: Any, rngs: nnx.Rngs, use_bias: bool = True) -> nnx.Linear:
    init = nnx.initializers.normal(std)
    return nnx.Linear(inputs, outputs, use_bias=use_bias, kernel_init=init, dtype=dtype, rngs=rngs)


def _layer_norm(features: int, eps: float, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # Two-pass variance: the residual stream of CLIP has outliers that E[x²] − E[x]² rounds away.
    return nnx.LayerNorm(features, epsilon=eps, use_fast_variance=False, dtype=dtype, rngs=rngs)


class _Attention(nnx.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, causal: bool, dtype: Any, rngs: nnx.Rngs):
        width = config.hidden_size
        std = width**-0.5
        in_std = std * (2 * config.num_hidden_layers) ** -0.5
        self.q_proj = _linear(width, width, in_std, dtype, rngs)
        self.k_proj = _linear(width, width, in_std, dtype, rngs)
        self.v_proj = _linear(width, width, in_std, dtype, rngs)
        self.out_proj = _linear(width, width, std, dtype, rngs)
        self.heads, self.causal = config.num_attention_heads, causal

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        def split(y: Array) -> Array:
            return y.reshape(*y.shape[:2], self.heads, -1)

        out = jax.nn.dot_product_attention(
            split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x)), is_causal=self.causal
        )
        return self.out_proj(out.reshape(x.shape))


class _MLP(nnx.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, dtype: Any, rngs: nnx.Rngs):
        width = config.hidden_size
        out_std = width**-0.5 * (2 * config.num_hidden_layers) ** -0.5
        self.fc1 = _linear(width, config.intermediate_size, (2 * width) ** -0.5, dtype, rngs)
        self.fc2 = _linear(config.intermediate_size, width, out_std, dtype, rngs)
        self.act = _ACTIVATIONS[config.hidden_act]

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.fc2(self.act(self.fc1(x)))


class _Layer(nnx.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, causal: bool, dtype: Any, rngs: nnx.Rngs):
        self.layer_norm1 = _layer_norm(config.hidden_size, config.layer_norm_eps, dtype, rngs)
        self.self_attn = _Attention(config, causal, dtype, rngs)
        self.layer_norm2 = _layer_norm(config.hidden_size, config.layer_norm_eps, dtype, rngs)
        self.mlp = _MLP(config, dtype, rngs)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Encoder(nnx.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, causal: bool, dtype: Any, rngs: nnx.Rngs):
        self.layers = nnx.List([_Layer(config, causal, dtype, rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: Float[Array, "B L D"]) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
        """The outputs of the last layer and of the one before it (the input, if there is one layer)."""
        before = x
        for layer in self.layers:
            before, x = x, layer(x)
        return x, before


class _TextEmbeddings(nnx.Module):
    def __init__(self, config: CLIPTextConfig, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        width, length = config.hidden_size, config.max_position_embeddings
        self.token_embedding = nnx.Embed(config.vocab_size, width, embedding_init=init, dtype=dtype, rngs=rngs)
        self.position_embedding = nnx.Embed(length, width, embedding_init=init, dtype=dtype, rngs=rngs)

    def __call__(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))


class CLIPTextOutput(NamedTuple):
    last_hidden_state: Float[Array, "B L D"]  # after the final layer norm; what Stable Diffusion conditions on
    penultimate_hidden_state: Float[Array, "B L D"]  # input of the last layer, no layer norm (hidden_states[-2])
    pooled: Float[Array, "B D"]  # last_hidden_state at the end-of-text token, before any projection


class _TextTransformer(nnx.Module):
    def __init__(self, config: CLIPTextConfig, dtype: Any, rngs: nnx.Rngs):
        self.embeddings = _TextEmbeddings(config, dtype, rngs)
        self.encoder = _Encoder(config, True, dtype, rngs)
        self.final_layer_norm = _layer_norm(config.hidden_size, config.layer_norm_eps, dtype, rngs)
        self.max_length, self.eos_token_id = config.max_position_embeddings, config.eos_token_id

    def __call__(self, ids: Int[Array, "B L"]) -> CLIPTextOutput:
        if ids.shape[1] > self.max_length:
            raise InputError(
                f"token ids have length {ids.shape[1]}, more than max_position_embeddings {self.max_length}"
            )
        last, penultimate = self.encoder(self.embeddings(ids))
        last = self.final_layer_norm(last)
        if self.eos_token_id == LEGACY_EOS_TOKEN_ID:
            end = jnp.argmax(ids, axis=1)  # end-of-text has the highest id of the vocabulary
        else:
            end = jnp.argmax(ids == self.eos_token_id, axis=1)  # the first one: padding may be the same token
        pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
        return CLIPTextOutput(last, penultimate, pooled)


class _VisionEmbeddings(nnx.Module):
    def __init__(self, config: CLIPVisionConfig, dtype: Any, rngs: nnx.Rngs):
        width, patch = config.hidden_size, config.patch_size
        init = nnx.initializers.normal(0.02)
        self.class_embedding = nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (width,), jnp.float32))
        self.patch_embedding = nnx.Conv(
            config.num_channels,
            width,
            (patch, patch),
            strides=(patch, patch),
            padding="VALID",
            use_bias=False,
            kernel_init=init,
            dtype=dtype,
            rngs=rngs,
        )
        positions = (config.image_size // patch) ** 2 + 1
        self.position_embedding = nnx.Embed(positions, width, embedding_init=init, dtype=dtype, rngs=rngs)
        self.dtype = dtype

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B L D"]:
        patches = self.patch_embedding(images)
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        first = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (patches.shape[0], 1, patches.shape[2]))
        tokens = jnp.concatenate([first, patches], axis=1)
        return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))


class _VisionTransformer(nnx.Module):
    def __init__(self, config: CLIPVisionConfig, dtype: Any, rngs: nnx.Rngs):
        self.embeddings = _VisionEmbeddings(config, dtype, rngs)
        self.pre_layrnorm = _layer_norm(config.hidden_size, config.layer_norm_eps, dtype, rngs)  # upstream's spelling
        self.encoder = _Encoder(config, False, dtype, rngs)
        self.post_layernorm = _layer_norm(config.hidden_size, config.layer_norm_eps, dtype, rngs)
        self.shape = (config.image_size, config.image_size, config.num_channels)

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B D"]:
        if images.shape[1:] != self.shape:
            raise InputError(f"CLIP images must be [B, {', '.join(map(str, self.shape))}]; received {images.shape}")
        last, _ = self.encoder(self.pre_layrnorm(self.embeddings(images)))
        return self.post_layernorm(last[:, 0])


class CLIPText(nnx.Module):
    """Text tower; parameters are named as those of transformers' `CLIPTextModel`, with version 4's prefix."""

    def __init__(self, config: CLIPTextConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.text_model = _TextTransformer(config, dtype, rngs)

    def __call__(self, ids: Int[Array, "B L"]) -> CLIPTextOutput:
        """Token ids, with an end-of-text token in each row -> hidden states and the pooled feature, in `dtype`."""
        return self.text_model(ids)


class CLIPVisionProjected(nnx.Module):
    """Vision tower with its projection; parameters as those of transformers' `CLIPVisionModelWithProjection`."""

    def __init__(self, config: CLIPVisionConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        width = config.hidden_size
        self.vision_model = _VisionTransformer(config, dtype, rngs)
        self.visual_projection = _linear(width, config.projection_dim, width**-0.5, dtype, rngs, use_bias=False)

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B P"]:
        """Normalised images -> projected features, not L2-normalised."""
        return self.visual_projection(self.vision_model(images))


class CLIP(nnx.Module):
    """Both towers, the projections and the temperature; parameters as those of transformers' `CLIPModel`."""

    def __init__(self, config: CLIPConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        text, vision, out = config.text.hidden_size, config.vision.hidden_size, config.projection_dim
        self.text_model = _TextTransformer(config.text, dtype, rngs)
        self.vision_model = _VisionTransformer(config.vision, dtype, rngs)
        self.text_projection = _linear(text, out, text**-0.5, dtype, rngs, use_bias=False)
        self.visual_projection = _linear(vision, out, vision**-0.5, dtype, rngs, use_bias=False)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init_value, jnp.float32))

    def text_features(self, ids: Int[Array, "B L"]) -> Float[Array, "B P"]:
        """Projected text features, not L2-normalised."""
        return self.text_projection(self.text_model(ids).pooled)

    def image_features(self, images: Float[Array, "B H W C"]) -> Float[Array, "B P"]:
        """Projected image features of normalised images, not L2-normalised."""
        return self.visual_projection(self.vision_model(images))

    def __call__(self, ids: Int[Array, "B L"], images: Float[Array, "N H W C"]) -> Float[Array, "N B"]:
        """exp(logit_scale) * cosine of every image with every text, f32."""
        text, image = (normalize(x.astype(jnp.float32)) for x in (self.text_features(ids), self.image_features(images)))
        return jnp.exp(self.logit_scale[...]) * image @ text.T


def normalize(features: Float[Array, "B P"]) -> Float[Array, "B P"]:
    """Rows divided by their Euclidean norm."""
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)
