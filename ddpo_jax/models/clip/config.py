"""What describes a CLIP: the config.json of transformers, read strictly, and the three published sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from ddpo_jax.errors import InputError
from ddpo_jax.models import schema

ACTIVATIONS = ("gelu", "quick_gelu")
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


def _read(cls: type[C], values: Mapping[str, Any], table: Mapping[str, schema.Rule], where: str) -> C:
    """Builds the dataclass `cls` from a config.json; unknown keys and unsupported values are refused by name."""
    schema.check(where, values, table)
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
    if config.hidden_act not in ACTIVATIONS:
        raise InputError(
            f"{where}: hidden_act = {config.hidden_act!r} is not supported; it must be one of {sorted(ACTIVATIONS)}"
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
        return _read(cls, values, schema.CLIP_TEXT, "text encoder config")


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
        return _read(cls, values, schema.CLIP_VISION, "vision encoder config")


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
        schema.check("CLIP config", values, schema.CLIP)
        towers = {}
        for name in ("text", "vision"):
            merged: dict[str, Any] = {}
            for key in (f"{name}_config", f"{name}_config_dict"):
                if key in values and values[key] is not None:
                    merged.update(values[key])
            towers[name] = merged
        handled = {"text_config", "text_config_dict", "vision_config", "vision_config_dict"}
        rest = {key: value for key, value in values.items() if key not in handled}
        own = _read(_CLIPOwn, rest, schema.CLIP, "CLIP config")
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


# The published sizes. Attention heads do not follow from the width: 16 in the vision tower of H/14, of width 80 each.
B32 = CLIPConfig()
L14 = CLIPConfig(
    text=CLIPTextConfig(hidden_size=768, intermediate_size=3072, projection_dim=768, num_attention_heads=12),
    vision=CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        projection_dim=768,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
    ),
    projection_dim=768,
)
H14 = CLIPConfig(
    text=CLIPTextConfig(
        hidden_size=1024,
        intermediate_size=4096,
        projection_dim=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        hidden_act="gelu",
    ),
    vision=CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        projection_dim=1024,
        num_hidden_layers=32,
        num_attention_heads=16,
        patch_size=14,
        hidden_act="gelu",
    ),
    projection_dim=1024,
)
