"""CLIP score: cosine of the image's and its prompt's embedding (Radford et al., arXiv:2103.00020).

``scale`` "1" gives the cosine (0.29 to 0.31 for good images, with OpenAI's B/32 or L/14), "100" a hundred times that,
"clipscore" 2.5 max(cosine, 0) (CLIPScore, arXiv:2104.08718). Preprocessing as the CLIP processor: shortest side to the
tower's size, bicubic as Pillow does it, centre crop. Prompts longer than the text tower are cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.models.clip import normalize
from ddpo_jax.models.tokenizer import Tokenizer
from ddpo_jax.rewards import _clip

AUTO = {"weights": ("mini", "openai")}
SCALES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "1": lambda cosine: cosine,
    "100": lambda cosine: 100 * cosine,
    "clipscore": lambda cosine: 2.5 * np.maximum(cosine, 0),
}


def default_config() -> ConfigDict:
    """Options."""
    config = ConfigDict()
    config.weights = "auto"  # mini = the embedded miniature; openai = OpenAI's B/32; auto = by the model
    config.clip = ""  # CLIP folder or hub id with tokenizer (B/32, L/14, ...); empty = the one that weights names
    config.scale = "1"  # 1 = cosine; 100 = 100 cosine; clipscore = 2.5 max(cosine, 0)
    config.batch_size = 32  # images, and prompts, per call of the network
    return config


def make(config: ConfigDict) -> Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The reward; part ``clip_cosine`` is the unscaled cosine.

    Raises:
      InputError: weights are missing or do not fit the folder's config, or an option is wrong.
    """
    if config.weights not in AUTO["weights"]:
        raise InputError(
            f"reward.weights={config.weights!r}: must be {' or '.join(AUTO['weights'])}; auto follows the model"
        )
    if config.scale not in SCALES:
        raise InputError(f"reward.scale={config.scale!r}: must be one of {', '.join(SCALES)}")
    folder = _clip.chosen_folder(config, _clip.B32)
    model, processor = _clip.load_clip(folder)
    tokenizer = Tokenizer.from_folder(folder)
    scale = SCALES[config.scale]
    embed_images = _clip.in_batches(model, lambda m, x: normalize(m.image_features(processor(x))), config.batch_size)
    embed_texts = _clip.in_batches(model, lambda m, ids: normalize(m.text_features(ids)), config.batch_size)

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]):
        del metadata
        distinct = sorted(set(prompts))  # samples of a prompt share its embedding
        rows = np.searchsorted(distinct, prompts)
        cosine = np.sum(embed_images(images) * embed_texts(tokenizer(distinct))[rows], axis=-1)
        return scale(cosine), {"clip_cosine": cosine}

    return reward
