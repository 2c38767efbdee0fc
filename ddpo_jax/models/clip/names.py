"""open_clip's tensor names -> those of transformers, which are ours (`models.keys`).

open_clip keeps query, key and value of a layer in one tensor and its projections as [in, out]; its image tower is
called ``visual``, its text tower has no prefix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from ddpo_jax.errors import InputError

_TOWER = {"visual.": "vision_model.", "": "text_model."}
_BLOCK = re.compile(r"(visual\.|)transformer\.resblocks\.(\d+)\.(ln_1|ln_2|attn|mlp)\.(.+)")
_LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn": "self_attn", "mlp": "mlp"}
_IN_LAYER = {"c_fc": "fc1", "c_proj": "fc2"}
_OUTSIDE = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
_TRANSPOSED = {"text_projection", "visual.proj"}


def to_transformers(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A CLIP's tensors by transformers' names, whichever of the two naming schemes they have.

    Args:
      tensors: a state dict of open_clip or of transformers, or a training checkpoint that holds one under
        ``state_dict`` beside other things, as those of HPSv2 do (names then begin with ``state_dict.``).

    Returns:
      views of the same arrays. Names of neither scheme are kept, so that loading them says what is unexpected.

    Raises:
      InputError: a layer's joint query, key and value cannot be split in three.
    """
    nested = {name.removeprefix("state_dict."): x for name, x in tensors.items() if name.startswith("state_dict.")}
    tensors = nested or dict(tensors)
    if "visual.conv1.weight" not in tensors:
        return tensors
    renamed: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        block = _BLOCK.fullmatch(name)
        if block:
            tower, index, part, rest = block.groups()
            path = f"{_TOWER[tower]}encoder.layers.{index}.{_LAYER[part]}."
            if rest in ("in_proj_weight", "in_proj_bias"):
                if len(value) % 3:
                    raise InputError(f"{name}: received {len(value)} rows; query, key and value have as many each")
                for letter, third in zip("qkv", np.split(value, 3), strict=True):
                    renamed[f"{path}{letter}_proj.{rest.removeprefix('in_proj_')}"] = third
                continue
            first, dot, leaf = rest.partition(".")
            renamed[path + (_IN_LAYER[first] if first in _IN_LAYER else first) + dot + leaf] = value
        else:
            renamed[_OUTSIDE[name] if name in _OUTSIDE else name] = value.T if name in _TRANSPOSED else value
    return renamed
