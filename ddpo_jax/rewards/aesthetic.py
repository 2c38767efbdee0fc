"""Aesthetic score (LAION improved-aesthetic-predictor): a linear head on the L2-normalised CLIP image embedding.

Preprocessing: shortest side to the tower's size (224 for L/14), bicubic as Pillow does it, centre crop, CLIP's mean and
standard deviation. The published head on CLIP L/14 gives about 1 to 10. The miniature's head has the same layers and
was trained on a stated rating of the miniature's world (``ddpo_jax.mini.rating``).

To check an installation: the published head alone gives 4.883285 to the constant unit vector and 4.545052 to the first
basis vector; Stable Diffusion 1.5 averages 5.44 on the papers' 45 animals.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.models import aesthetic_head, keys, weights
from ddpo_jax.models.clip import CLIPVisionProjected
from ddpo_jax.rewards._shared import clip as _clip
from ddpo_jax.rewards._shared.batches import in_batches

AUTO = {"weights": ("mini", "laion")}
PUBLISHED = "aesthetic_head"  # LAION's head in the catalogue of weights


def default_config() -> ConfigDict:
    """Options."""
    config = ConfigDict()
    config.weights = "auto"  # mini = embedded miniature; laion = CLIP L/14 and LAION's head; auto = by the model
    config.clip = ""  # CLIP folder, hub id or file; empty = the miniature's, or openai/clip-vit-large-patch14
    config.head = ""  # head: a .pth or .safetensors file; empty = the miniature's, or LAION's
    config.weights_dir = ""  # folder with the published files; empty = $DDPO_WEIGHTS, the caches, then the hub
    config.dtype = "float32"  # of the tower's products: float32, or bfloat16: faster, but good to 2 digits only
    config.batch_size = 32  # images per call of the network
    config.device = "mesh"  # mesh = the devices of the policy share every batch; host = this machine's processors
    return config


class _Networks(nnx.Module):
    def __init__(self, vision: CLIPVisionProjected, head: aesthetic_head.AestheticHead):
        self.vision, self.head = vision, head


def make(config: ConfigDict) -> Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The reward; no parts.

    Raises:
      InputError: weights are missing, are not the published ones under their name, or do not fit together.
    """
    _clip.check("reward.weights", config.weights, AUTO["weights"])
    head_file = _head_file(config)  # looked for first: the CLIP may have to be downloaded
    vision, processor = _clip.load_vision(config, _clip.L14)
    head = load_head(head_file, vision.config.projection_dim)

    def score(networks: _Networks, images: Array) -> Array:
        embeddings = networks.vision(processor(images))
        return aesthetic_head.score(networks.head, embeddings.astype(jnp.float32))

    run = in_batches(_Networks(vision, head), score, config, processor.crop)

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]):
        del prompts, metadata
        return run(images), {}

    return reward


def _head_file(config: ConfigDict) -> Path:
    if not config.head and config.weights == "mini":
        return _clip.embedded("aesthetic", "reward.weights", "mini") / "head.safetensors"
    if not config.head:
        return weights.find_weights(PUBLISHED, config.weights_dir)
    path = Path(config.head).expanduser()
    if not path.is_file():
        known = weights.entry(PUBLISHED)
        raise InputError(
            f"reward.head={config.head!r}: no such file; give LAION's {known.file} "
            f"(repository {known.repo}), or use reward.weights=mini"
        )
    return path


def load_head(path: Path, embed_dim: int) -> aesthetic_head.AestheticHead:
    """The head in a file; one with the published name must be the published file, byte for byte.

    Args:
      path: of the file; head.safetensors may have other widths than the published ones, in a config.json beside it.
      embed_dim: width of the CLIP's embeddings.

    Raises:
      InputError: it is another file, or does not read embeddings of that width.
    """
    with _clip.blamed("reward.head", path):
        if path.name == weights.entry(PUBLISHED).file:
            weights.verify(path, PUBLISHED)
        head_config = aesthetic_head.AestheticHeadConfig(embed_dim)
        if (beside := path.parent / "config.json").exists() and path.name == "head.safetensors":
            head_config = aesthetic_head.AestheticHeadConfig.from_file(beside)
        if head_config.embed_dim != embed_dim:
            raise InputError(
                f"it reads embeddings of width {head_config.embed_dim}, but reward.clip gives {embed_dim}; "
                "give the CLIP that the head was trained on"
            )
        return keys.load(aesthetic_head.AestheticHead, head_config, weights.read_file(path))
