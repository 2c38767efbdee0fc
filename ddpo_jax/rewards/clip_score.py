"""CLIP score: cosine of the image's and its prompt's embedding (Radford et al. 2021, arXiv:2103.00020).

With OpenAI's B/32 or L/14, the miniature's own CLIP, or any other CLIP folder. ``scale`` "1" gives the cosine, "100" a
hundred times that, "clipscore" 2.5 max(cosine, 0) (CLIPScore, Hessel et al. 2021, arXiv:2104.08718, Eq. 1). That their
code begins every caption with "A photo depicts" is left to the prompts.

Preprocessing as the CLIP processor: shortest side to the tower's size, bicubic as Pillow does it, centre crop. Prompts
longer than the text tower are cut.

To check an installation: good images have a cosine of 0.29 to 0.31.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.rewards._shared import clip as _clip

AUTO = {"weights": ("mini", "B/32")}
WEIGHTS = {"mini": _clip.B32, "B/32": _clip.B32, "L/14": _clip.L14}  # what a file of weights is, where one is given
SCALES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "1": lambda cosine: cosine,
    "100": lambda cosine: 100 * cosine,
    "clipscore": lambda cosine: 2.5 * np.maximum(cosine, 0),
}


def default_config() -> ConfigDict:
    """Options."""
    config = ConfigDict()
    config.weights = "auto"  # mini = the embedded miniature; B/32, L/14 = OpenAI's; auto = mini or B/32, by the model
    config.clip = ""  # CLIP folder or hub id with tokenizer; empty = the one that weights names
    config.weights_dir = ""  # folder with the published files; empty = $DDPO_WEIGHTS, the caches, then the hub
    config.scale = "1"  # 1 = cosine; 100 = 100 cosine; clipscore = 2.5 max(cosine, 0)
    config.dtype = "float32"  # of the network's products: float32, or bfloat16: faster, but good to 2 digits only
    config.batch_size = 32  # images, and prompts, per call of the network
    config.device = "mesh"  # mesh = the devices of the policy share every batch; host = this machine's processors
    return config


def make(config: ConfigDict) -> Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The reward; part ``clip_cosine`` is the unscaled cosine.

    Raises:
      InputError: weights are missing or do not fit the folder's config, or an option is wrong.
    """
    _clip.check("reward.weights", config.weights, WEIGHTS)
    _clip.check("reward.scale", config.scale, SCALES)
    model, tokenizer, processor = _clip.load_clip(config, WEIGHTS[config.weights])
    scale = SCALES[config.scale]
    cosines = _clip.cosine(model, tokenizer, config, processor, processor.crop)

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]):
        del metadata
        cosine = cosines(images, prompts)
        return scale(cosine), {"clip_cosine": cosine}

    return reward
