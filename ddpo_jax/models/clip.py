"""CLIP: the text encoder of Stable Diffusion, and both towers for rewards (Radford et al. 2021, arXiv:2103.00020).

A pre-LN transformer. OpenAI's L/14 and B/32 use QuickGELU, LAION's H/14 the exact GELU. Attribute names are those of
the transformers state dict (``text_model.encoder.layers.3.self_attn.q_proj``), so `models.keys` maps them by rule.
Dropout is never applied: the towers are used for inference, or trained from scratch without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ddpo_jax.errors import InputError

# The eos id written by old configs; it was wrong, and transformers keeps the pooling rule that went with it.
LEGACY_EOS_TOKEN_ID = 2

# What a config.json may hold that says nothing about inference: provenance, initialisation, text generation.
_IGNORED = frozenset(
    """
    _name_or_path _commit_hash _attn_implementation_autoset _attn_implementation_internal _output_attentions
    architectures attn_implementation bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label initializer_factor initializer_range is_encoder_decoder
    label2id length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k
    top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
    """.split()
)
# Options of the format that exist in one value only here.
_FIXED: dict[str, Any] = {
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "add_cross_attention": False,
    "is_decoder": False,
    "pruned_heads": {},
}

C = TypeVar("C")


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """x * Phi(x), the exact (erf) GELU."""
    return jax.nn.gelu(x, approximate=False)


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"quick_gelu": quick_gelu, "gelu": gelu}


def _read(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    """Builds the dataclass `cls` from a config.json; unknown keys and unsupported values are refused by name."""
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    kept = {key: value for key, value in values.items() if key in names}
    for key, value in values.items():
        if key in names or key in _IGNORED:
            continue
        if key not in _FIXED:
            raise InputError(f"{where}: option {key!r} (value {value!r}) is not supported; remove it from config.json")
        if value != _FIXED[key]:
            raise InputError(f"{where}: {key} = {value!r} is not supported; it must be {_FIXED[key]!r}")
    return cls(**kept)


def _check_tower(config: CLIPTextConfig | CLIPVisionConfig, where: str) -> None:
    if config.hidden_act not in _ACTIVATIONS:
        raise InputError(
            f"{where}: hidden_act = {config.hidden_act!r} is not supported; it must be one of {sorted(_ACTIVATIONS)}"
        )
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"{where}: hidden_size = {config.hidden_size} must be a multiple of "
            f"num_attention_heads = {config.num_attention_heads}"
        )


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Text tower. Defaults are those of the file format (transformers omits keys that equal them)."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        _check_tower(self, "text encoder config")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLIPTextConfig:
        """Reads a `CLIPTextModel` config.json (or the `text_config` of a `CLIPModel` one)."""
        return _read(cls, values, "text encoder config")


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """Vision tower. Defaults are those of the file format."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_tower(self, "vision encoder config")
        if self.image_size % self.patch_size:
            raise InputError(
                f"vision encoder config: image_size = {self.image_size} must be a multiple of "
                f"patch_size = {self.patch_size}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLIPVisionConfig:
        """Reads a `CLIPVisionModel` config.json (or the `vision_config` of a `CLIPModel` one)."""
        return _read(cls, values, "vision encoder config")


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Both towers and their common space."""

    text: CLIPTextConfig = CLIPTextConfig()
    vision: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLIPConfig:
        """Reads a `CLIPModel` config.json. The old `*_config_dict` entries override, as in transformers."""
        towers = {}
        for name in ("text", "vision"):
            merged: dict[str, Any] = {}
            for key in (f"{name}_config", f"{name}_config_dict"):
                if key in values and values[key] is not None:
                    merged.update(values[key])
            towers[name] = merged
        handled = {"text_config", "text_config_dict", "vision_config", "vision_config_dict"}
        own = _read(_CLIPOwn, {key: value for key, value in values.items() if key not in handled}, "CLIP config")
        return cls(
            text=CLIPTextConfig.from_dict(towers["text"]),
            vision=CLIPVisionConfig.from_dict(towers["vision"]),
            projection_dim=own.projection_dim,
            logit_scale_init_value=own.logit_scale_init_value,
        )


@dataclasses.dataclass(frozen=True)
class _CLIPOwn:
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592


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


class CLIPVision(nnx.Module):
    """Vision tower without projection; parameters are named as those of transformers' `CLIPVisionModel`."""

    def __init__(self, config: CLIPVisionConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.vision_model = _VisionTransformer(config, dtype, rngs)

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B D"]:
        """Normalised images [B, image_size, image_size, 3] -> the class token after the last layer norm."""
        return self.vision_model(images)


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
