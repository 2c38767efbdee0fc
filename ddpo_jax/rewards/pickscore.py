"""PickScore: exp(logit scale) times the cosine of image and prompt in a CLIP H/14 trained on people's choices.

Kirstain et al. 2023, arXiv:2305.01569. Weights: ``yuvalkirstain/PickScore_v1`` (transformers' format). Preprocessing
as the CLIP processor: shortest side to 224, bicubic as Pillow does it, centre crop. The logit scale is a parameter of
the network, close to 100; PRDP (Deng et al. 2024, arXiv:2402.08714) divides the score by 100, which is ``scale=0.01``.

To check an installation: Stable Diffusion 1.4 averages 21.79 on the papers' 45 animals, 0.2179 at ``scale=0.01``. With
the miniature's CLIP it is that one's logit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.models import clip
from ddpo_jax.rewards._shared import clip as _clip

AUTO = {"weights": ("mini", "full")}
PUBLISHED = _clip.Published("pickscore", clip.H14)


def default_config() -> ConfigDict:
    """Options."""
    config = ConfigDict()
    config.weights = "auto"  # mini = the embedded miniature's CLIP; full = PickScore; auto = by the model
    config.clip = ""  # folder or hub id, or the file model.safetensors; empty = the one that weights names
    config.weights_dir = ""  # folder with the published files; empty = $DDPO_WEIGHTS, the caches, then the hub
    config.scale = 1.0  # factor of the score; 0.01 = as PRDP
    config.dtype = "float32"  # of the network's products: float32, or bfloat16: faster, but good to 2 digits only
    config.batch_size = 16  # images, and prompts, per call of the network
    config.device = "mesh"  # mesh = the devices of the policy share every batch; host = this machine's processors
    return config


def make(config: ConfigDict) -> Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The reward; part ``pickscore_cosine`` is the cosine alone.

    Raises:
      InputError: weights are missing or of another network, or an option is wrong.
    """
    _clip.check("reward.weights", config.weights, AUTO["weights"])
    if not (math.isfinite(config.scale) and config.scale > 0):
        raise InputError(f"reward.scale={config.scale}: must be a positive number; 1 or 0.01 are in use")
    model, tokenizer, processor = _clip.load_clip(config, PUBLISHED, exact=config.weights == "full")
    factor = config.scale * float(np.exp(np.asarray(model.logit_scale[...])))
    cosines = _clip.cosine(model, tokenizer, config, processor, processor.crop)

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]):
        del metadata
        cosine = cosines(images, prompts)
        return factor * cosine, {"pickscore_cosine": cosine}

    return reward
