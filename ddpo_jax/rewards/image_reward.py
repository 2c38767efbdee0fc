"""ImageReward (Xu et al. 2023, arXiv:2304.05977): how people would rate an image for its prompt.

Network: BLIP's ViT-L/16 at 224 pixels, read by BERT-base with cross-attention in every layer; the first token ([CLS])
goes through five linear layers to r; the score is (r - 0.16717362830052426) / 1.0333394966054072. Preprocessing:
shortest side to 224 by Pillow's bicubic filter, central square, CLIP's mean and standard deviation; 35 tokens of the
prompt. The unit is a standard deviation of the network's scores on its authors' data, 0 their mean.

Anchors: 0.5812, 0.2745, -1.4132, -2.0296 for the four example images of the authors' repository with their prompt;
Stable Diffusion 1.5 averages 0.48 on the 45 animals of Black et al. 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from ddpo_jax.models.blip.networks import ImageReward
from ddpo_jax.rewards._shared import blip as _blip
from ddpo_jax.rewards._shared.batches import in_batches

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the network's output on its authors' data
FILES = ("ImageReward.pt", "ImageReward.safetensors")
PUBLISHED = "image_reward"  # in the catalogue of weights


def default_config() -> ConfigDict:
    """Options."""
    config = ConfigDict()
    config.blip = ""  # folder with ImageReward.pt and vocab.txt, or such a file there; empty = the published files
    config.weights_dir = ""  # folder with the published files; empty = $DDPO_WEIGHTS, the caches, then the hub
    config.dtype = "float32"  # of the network's products: float32, as published, or bfloat16: faster, less exact
    config.batch_size = 16  # images per call of the network
    config.device = "mesh"  # mesh = the devices of the policy share every batch; host = this machine's processors
    return config


def make(config: ConfigDict) -> Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The reward; no parts.

    Raises:
      InputError: the weights are missing, damaged or of another model. When called: an empty prompt.
    """
    model, tokenizer, size = _blip.load(ImageReward, config, FILES, PUBLISHED)

    def score(model: ImageReward, images: Array, ids: Array, mask: Array) -> Array:
        return model(_blip.pixels(images), ids, mask)

    run = in_batches(model, score, config, lambda images: _blip.shortest_side(images, size))

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]):
        del metadata
        _blip.check_captions(prompts)
        return (run(images, *tokenizer(prompts)) - MEAN) / STD, {}

    return reward
