"""Reads BLIP's published tensors, under the names of the original code or of transformers, and the sizes they imply.

| original                       | transformers, and ours                     |
|--------------------------------|--------------------------------------------|
| visual_encoder.cls_token       | vision_model.embeddings.class_embedding    |
| visual_encoder.pos_embed       | vision_model.embeddings.position_embedding |
| visual_encoder.patch_embed.proj | vision_model.embeddings.patch_embedding   |
| visual_encoder.blocks.3.norm1  | vision_model.encoder.layers.3.layer_norm1  |
| visual_encoder.blocks.3.attn.qkv | vision_model.encoder.layers.3.self_attn.qkv |
| visual_encoder.blocks.3.attn.proj | vision_model.encoder.layers.3.self_attn.projection |
| visual_encoder.norm            | vision_model.post_layernorm                |

The text parts have one naming. ImageReward's file has ``blip.`` before every name but those of its head. No config.json
is read: the number of heads and the epsilons that transformers' conversions state are not those of the training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ddpo_jax.errors import InputError
from ddpo_jax.models import keys
from ddpo_jax.models.blip.networks import BlipConfig
from ddpo_jax.models.blip.text import BlipTextConfig
from ddpo_jax.models.blip.vision import BlipVisionConfig

M = TypeVar("M", bound=nnx.Module)

HEAD_SIZE = 64  # features of an attention head, in every published BLIP
_RENAMED = [
    (r"^(?:blip|model)\.", ""),
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.", r"vision_model.encoder.layers.\1."),
    (r"^(vision_model\.encoder\.layers\.\d+)\.norm([12])\.", r"\1.layer_norm\2."),
    (r"^(vision_model\.encoder\.layers\.\d+)\.attn\.proj\.", r"\1.self_attn.projection."),
    (r"^(vision_model\.encoder\.layers\.\d+)\.attn\.qkv\.", r"\1.self_attn.qkv."),
]
_UNUSED = ("vision_proj.", "text_proj.")  # of the contrastive pre-training; ImageReward's file still holds them
_PREDICTIONS = "text_decoder.cls.predictions."


def canonical(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under our names, without those that inference does not use.

    The decoder's output layer shares its weight with the word embeddings and its bias with ``predictions.bias``; a file
    that stores a shared tensor once is completed.
    """
    renamed = {}
    for name, value in tensors.items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        if not name.startswith(_UNUSED):
            renamed[name] = value
    shared = {"weight": "text_decoder.bert.embeddings.word_embeddings.weight", "bias": _PREDICTIONS + "bias"}
    for last, source in shared.items():
        if source in renamed:
            renamed.setdefault(f"{_PREDICTIONS}decoder.{last}", renamed[source])
    renamed.pop(_PREDICTIONS + "bias", None)
    return renamed


def sizes(tensors: Mapping[str, np.ndarray], where: str) -> BlipConfig:
    """The sizes that the shapes of ``canonical`` tensors imply.

    Args:
      tensors: under our names.
      where: what is being read, for the message.

    Raises:
      InputError: they are not a BLIP's.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in tensors or tensors[name].ndim != axes:
            found = f"has the shape {list(tensors[name].shape)}" if name in tensors else "is missing"
            raise InputError(f"{where}: received weights of another model ({name} {found}); they must be a BLIP's")
        return tensors[name].shape

    def layers(prefix: str) -> int:
        found = [re.match(re.escape(prefix) + r"\.(\d+)\.", name) for name in tensors]
        return max((int(match[1]) + 1 for match in found if match), default=0)

    vision, text = "vision_model", "text_encoder"
    width, _, patch, _ = shape(f"{vision}.embeddings.patch_embedding.weight", 4)
    positions = shape(f"{vision}.embeddings.position_embedding", 3)[1]
    side = round(max(positions - 1, 0) ** 0.5)
    vocab_size, hidden_size = shape(f"{text}.embeddings.word_embeddings.weight", 2)
    if side * side + 1 != positions or width % HEAD_SIZE or hidden_size % HEAD_SIZE:
        raise InputError(
            f"{where}: received {positions} image positions, widths {width} and {hidden_size}; a BLIP has a square of "
            f"positions and one more, and widths that are multiples of {HEAD_SIZE}"
        )
    first_vision, first_text = f"{vision}.encoder.layers.0", f"{text}.encoder.layer.0"
    return BlipConfig(
        BlipVisionConfig(
            image_size=side * patch,
            patch_size=patch,
            hidden_size=width,
            intermediate_size=shape(f"{first_vision}.mlp.fc1.weight", 2)[0],
            num_hidden_layers=layers(f"{vision}.encoder.layers"),
            num_attention_heads=width // HEAD_SIZE,
        ),
        BlipTextConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            context_size=shape(f"{first_text}.crossattention.self.key.weight", 2)[1],
            intermediate_size=shape(f"{first_text}.intermediate.dense.weight", 2)[0],
            num_hidden_layers=layers(f"{text}.encoder.layer"),
            num_attention_heads=hidden_size // HEAD_SIZE,
            max_position_embeddings=shape(f"{text}.embeddings.position_embeddings.weight", 2)[0],
        ),
    )


def load(
    cls: type[M], tensors: Mapping[str, np.ndarray], *, dtype: Any = jnp.float32, where: str
) -> tuple[M, BlipConfig]:
    """Builds ``cls``, one of ``networks``, around a file's tensors.

    Args:
      cls: its class.
      tensors: under either naming.
      dtype: of the computation; parameters stay float32.
      where: what is being read, for the message.

    Returns:
      The network and its sizes.

    Raises:
      InputError: the tensors are not those of ``cls``; the message lists what is missing, unexpected or misshapen.
    """
    renamed = canonical(tensors)
    config = sizes(renamed, where)
    try:
        return keys.load(cls, config, renamed, dtype=dtype, where=where), config
    except ValueError as error:
        raise InputError(str(error)) from error
