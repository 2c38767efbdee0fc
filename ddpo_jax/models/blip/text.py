"""BLIP's text transformer: BERT (Devlin et al. 2019, arXiv:1810.04805; post-LN, exact GELU) with cross-attention.

Every layer attends to its own tokens, then to the tokens of an image or of an encoded question. Attribute names are
those of transformers' ``BlipTextModel`` and ``BlipTextLMHeadModel``, so `models.keys` maps their state dicts by rule.
Masks are true where there is a token and false where there is padding, which is never attended to.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ddpo_jax.models.attention import attention
from ddpo_jax.models.layers import LayerNorm, Linear

LAYER_NORM_EPS = 1e-12


@dataclasses.dataclass(frozen=True)
class BlipTextConfig:
    """Sizes; the defaults are those of BERT-base reading the tokens of ViT-B."""

    vocab_size: int = 30524  # of BERT's uncased vocabulary, and [DEC] and [ENC]
    hidden_size: int = 768
    context_size: int = 768  # width of the tokens that cross-attention reads
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12  # transformers' default of 8 is not what was trained
    max_position_embeddings: int = 512


class _Embeddings(nnx.Module):
    def __init__(self, config: BlipTextConfig, dtype: Any, rngs: nnx.Rngs):
        width, init = config.hidden_size, nnx.initializers.normal(0.02)
        self.word_embeddings = nnx.Embed(config.vocab_size, width, embedding_init=init, dtype=dtype, rngs=rngs)
        self.position_embeddings = nnx.Embed(
            config.max_position_embeddings, width, embedding_init=init, dtype=dtype, rngs=rngs
        )
        self.LayerNorm = LayerNorm(width, epsilon=LAYER_NORM_EPS, dtype=dtype)

    def __call__(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        return self.LayerNorm(self.word_embeddings(ids) + self.position_embeddings(jnp.arange(ids.shape[1])))


class _Heads(nnx.Module):
    """Attention of x to a context, before the output projection."""

    def __init__(self, config: BlipTextConfig, context_size: int, dtype: Any, rngs: nnx.Rngs):
        self.query = Linear(config.hidden_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.key = Linear(context_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.value = Linear(context_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.heads = config.num_attention_heads

    def __call__(
        self, x: Float[Array, "B L D"], context: Float[Array, "B M E"], mask: Bool[Array, "B M"] | None, causal: bool
    ) -> Float[Array, "B L D"]:
        q, k, v = (
            projected.reshape(*projected.shape[:2], self.heads, -1)
            for projected in (self.query(x), self.key(context), self.value(context))
        )
        seen = None if mask is None else mask[:, None, None, :]
        return attention(q, k, v, causal=causal, mask=seen).reshape(x.shape)


class _AddAndNorm(nnx.Module):
    """LayerNorm(residual + Linear(x))."""

    def __init__(self, inputs: int, config: BlipTextConfig, dtype: Any, rngs: nnx.Rngs):
        self.dense = Linear(inputs, config.hidden_size, dtype=dtype, rngs=rngs)
        self.LayerNorm = LayerNorm(config.hidden_size, epsilon=LAYER_NORM_EPS, dtype=dtype)

    def __call__(self, x: Float[Array, "B L I"], residual: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.LayerNorm(self.dense(x) + residual)


class _Attention(nnx.Module):
    def __init__(self, config: BlipTextConfig, context_size: int, dtype: Any, rngs: nnx.Rngs):
        self.self = _Heads(config, context_size, dtype, rngs)
        self.output = _AddAndNorm(config.hidden_size, config, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: Float[Array, "B M E"],
        mask: Bool[Array, "B M"] | None,
        causal: bool = False,
    ) -> Float[Array, "B L D"]:
        return self.output(self.self(x, context, mask, causal), x)


class _Intermediate(nnx.Module):
    def __init__(self, config: BlipTextConfig, dtype: Any, rngs: nnx.Rngs):
        self.dense = Linear(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L I"]:
        return jax.nn.gelu(self.dense(x), approximate=False)


class _Layer(nnx.Module):
    def __init__(self, config: BlipTextConfig, dtype: Any, rngs: nnx.Rngs):
        self.attention = _Attention(config, config.hidden_size, dtype, rngs)
        self.crossattention = _Attention(config, config.context_size, dtype, rngs)
        self.intermediate = _Intermediate(config, dtype, rngs)
        self.output = _AddAndNorm(config.intermediate_size, config, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        mask: Bool[Array, "B L"] | None,
        context: Float[Array, "B M E"],
        context_mask: Bool[Array, "B M"] | None,
        causal: bool,
    ) -> Float[Array, "B L D"]:
        x = self.attention(x, x, mask, causal)
        x = self.crossattention(x, context, context_mask)
        return self.output(self.intermediate(x), x)


class _Encoder(nnx.Module):
    def __init__(self, config: BlipTextConfig, dtype: Any, rngs: nnx.Rngs):
        self.layer = nnx.List([_Layer(config, dtype, rngs) for _ in range(config.num_hidden_layers)])


class BlipText(nnx.Module):
    """Text transformer; parameters are named as those of transformers' `BlipTextModel` without its pooler."""

    def __init__(self, config: BlipTextConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = _Embeddings(config, dtype, rngs)
        self.encoder = _Encoder(config, dtype, rngs)

    def __call__(
        self,
        ids: Int[Array, "B L"],
        mask: Bool[Array, "B L"] | None,
        context: Float[Array, "B M E"],
        context_mask: Bool[Array, "B M"] | None = None,
        *,
        causal: bool = False,
    ) -> Float[Array, "B L D"]:
        """Token ids and what they attend to -> the tokens after the last layer.

        Args:
          ids: of the tokens; at most ``max_position_embeddings`` of them.
          mask: false where ``ids`` is padding; None means there is none.
          context: tokens that cross-attention reads, of width ``context_size``.
          context_mask: false where ``context`` is padding; None means there is none.
          causal: a token sees itself and the tokens before it only, as a decoder does.

        Raises:
          ValueError: too many tokens.
        """
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"token ids have length {ids.shape[1]}, more than the {self.config.max_position_embeddings} positions"
            )
        x = self.embeddings(ids)
        for layer in self.encoder.layer:
            x = layer(x, mask, context, context_mask, causal)
        return x


class _Transform(nnx.Module):
    def __init__(self, config: BlipTextConfig, dtype: Any, rngs: nnx.Rngs):
        self.dense = Linear(config.hidden_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.LayerNorm = LayerNorm(config.hidden_size, epsilon=LAYER_NORM_EPS, dtype=dtype)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.LayerNorm(jax.nn.gelu(self.dense(x), approximate=False))


class _Predictions(nnx.Module):
    def __init__(self, config: BlipTextConfig, dtype: Any, rngs: nnx.Rngs):
        self.transform = _Transform(config, dtype, rngs)
        self.decoder = Linear(config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        return self.decoder(self.transform(x))


class _Head(nnx.Module):
    def __init__(self, config: BlipTextConfig, dtype: Any, rngs: nnx.Rngs):
        self.predictions = _Predictions(config, dtype, rngs)


class BlipDecoder(nnx.Module):
    """Causal text transformer with its head over the vocabulary; parameters as transformers' `BlipTextLMHeadModel`."""

    def __init__(self, config: BlipTextConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.bert = BlipText(config, dtype=dtype, rngs=rngs)
        self.cls = _Head(config, dtype, rngs)

    def __call__(
        self, ids: Int[Array, "B L"], context: Float[Array, "B M E"], context_mask: Bool[Array, "B M"] | None = None
    ) -> Float[Array, "B L V"]:
        """Logits of the token that follows each token; arguments as `BlipText` has them."""
        return self.cls.predictions(self.bert(ids, None, context, context_mask, causal=True))
