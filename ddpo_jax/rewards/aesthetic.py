"""Aesthetic score (LAION improved-aesthetic-predictor): a linear head on the L2-normalised CLIP image embedding.

Preprocessing: shortest side to the tower's size (224 for L/14), bicubic as Pillow does it, centre crop, CLIP's mean and
standard deviation. The published head on CLIP L/14 gives about 1 to 10; Stable Diffusion 1.5 averages 5.44 on the
papers' 45 animals. The miniature's head has the same layers and was trained on a stated rating of the miniature's
world (``ddpo_jax.mini.rating``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.models import aesthetic_head, keys, weights
from ddpo_jax.models.clip import CLIPVisionProjected
from ddpo_jax.rewards import _clip

AUTO = {"weights": ("mini", "laion")}


def default_config() -> ConfigDict:
    """Options."""
    config = ConfigDict()
    config.weights = "auto"  # mini = embedded miniature; laion = CLIP L/14 and LAION's head; auto = by the model
    config.clip = ""  # CLIP folder or hub id; empty = the miniature's, or openai/clip-vit-large-patch14
    config.head = ""  # head: a .pth or .safetensors file; empty = the miniature's. laion needs it
    config.batch_size = 32  # images per call of the network
    return config


class _Networks(nnx.Module):
    def __init__(self, vision: CLIPVisionProjected, head: aesthetic_head.AestheticHead):
        self.vision, self.head = vision, head


def make(config: ConfigDict) -> Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The reward; no parts.

    Raises:
      InputError: weights are missing or do not fit together.
    """
    if config.weights not in AUTO["weights"]:
        raise InputError(
            f"reward.weights={config.weights!r}: must be {' or '.join(AUTO['weights'])}; auto follows the model"
        )
    head_file = _head_file(config)  # looked for first: the CLIP may have to be downloaded
    vision, processor = _clip.load_vision(_clip.chosen_folder(config, _clip.L14))
    head = _load_head(head_file, vision.config.projection_dim)

    def score(networks: _Networks, images: Array) -> Array:
        return aesthetic_head.score(networks.head, networks.vision(processor(images)))

    run = _clip.in_batches(_Networks(vision, head), score, config.batch_size)

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]):
        del prompts, metadata
        return run(images), {}

    return reward


def _head_file(config: ConfigDict) -> Path:
    if not config.head and config.weights == "mini":
        return _clip.embedded("aesthetic", "reward.weights", "mini") / "head.safetensors"
    path = Path(config.head).expanduser()
    if not config.head or not path.is_file():
        raise InputError(
            f"reward.head={config.head!r}: no such file; give LAION's sac+logos+ava1-l14-linearMSE.pth "
            "(repository christophschuhmann/improved-aesthetic-predictor), or use reward.weights=mini"
        )
    return path


def _load_head(path: Path, embed_dim: int) -> aesthetic_head.AestheticHead:
    values = {"embed_dim": embed_dim}
    if (path.parent / "config.json").is_file() and path.suffix == ".safetensors":
        values = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    head_config = aesthetic_head.AestheticHeadConfig.from_dict(values)
    if head_config.embed_dim != embed_dim:
        raise InputError(
            f"reward.head={str(path)!r}: it reads embeddings of width {head_config.embed_dim}, but reward.clip gives "
            f"{embed_dim}; give the CLIP that the head was trained on"
        )
    read = weights.read_safetensors if path.suffix == ".safetensors" else weights.read_pickle_tensors
    return keys.load(aesthetic_head.AestheticHead, head_config, read(path), where=f"reward.head={str(path)!r}")
