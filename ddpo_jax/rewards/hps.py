"""Human Preference Score v2 and v2.1: cosine of image and prompt in a CLIP H/14 that was trained on people's choices.

Wu et al. 2023, arXiv:2306.09341. The score is the plain cosine; the paper's tables show a hundred times it. The two
versions are different weights on different scales and must not be compared with each other. Weights:
``HPS_v2_compressed.pt`` and ``HPS_v2.1_compressed.pt`` (open_clip state dicts) of the hub repository ``xswu/HPSv2``.

Preprocessing differs from other CLIPs: pixels become floats in [0, 1]; the longer side is resized to 224, bicubic on
floats; zeros fill the rest of the square; only then CLIP's mean and standard deviation. The resize is antialiased as
in current torchvision; before version 0.17, with which v2's figures below were made, it was not by default
(``antialias=False``), which changes the scores. Prompts are cleaned as open_clip does, but for what ftfy mends beside
quotes: HTML entities are replaced, curly quotes straightened.

To check an installation: Stable Diffusion 1.4 averages 0.2695 by v2 and 0.2535 by v2.1 on the paper's prompts, and
0.2855 by v2 on the papers' 45 animals. With the miniature's CLIP it is that one's cosine.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.models import clip, preprocess
from ddpo_jax.rewards._shared import clip as _clip

AUTO = {"weights": ("mini", "full")}
STRAIGHT = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
VERSIONS = {"v2": _clip.Published("hps_v2", clip.H14), "v2.1": _clip.Published("hps_v2_1", clip.H14)}


def default_config() -> ConfigDict:
    """Options."""
    config = ConfigDict()
    config.weights = "auto"  # mini = the embedded miniature's CLIP; full = HPS; auto = by the model
    config.version = "v2.1"  # of HPS: v2 or v2.1; their scores are not comparable
    config.clip = ""  # the version's .pt file, or its folder; empty = the one that weights names
    config.weights_dir = ""  # folder with the published files; empty = $DDPO_WEIGHTS, the caches, then the hub
    config.antialias = True  # resize as torchvision >= 0.17 does by default; False as before
    config.dtype = "float32"  # of the network's products: float32, or bfloat16: faster, but good to 2 digits only
    config.batch_size = 16  # images, and prompts, per call of the network
    config.device = "mesh"  # mesh = the devices of the policy share every batch; host = this machine's processors
    return config


def make(config: ConfigDict) -> Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The reward; no parts.

    Raises:
      InputError: weights are missing, of another version or another network, or an option is wrong.
    """
    _clip.check("reward.weights", config.weights, AUTO["weights"])
    _clip.check("reward.version", config.version, VERSIONS)
    published, file = VERSIONS[config.version], Path(config.clip).name
    for version, other in VERSIONS.items():
        if version != config.version and file == other.file:
            raise InputError(
                f"reward.version={config.version!r}: received the weights of {version} in reward.clip={config.clip!r}; "
                f"give {published.file}, or set reward.version={version}"
            )
    model, tokenizer, _ = _clip.load_clip(config, published, exact=config.weights == "full")
    size = model.config.vision.image_size
    cosine = _clip.cosine(model, tokenizer, config, lambda images: pixels(images, size, config.antialias))

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]):
        del metadata
        return cosine(images, [cleaned(prompt) for prompt in prompts]), {}

    return reward


def cleaned(prompt: str) -> str:
    """HTML entities replaced (twice, as open_clip does) and quotes made straight."""
    return html.unescape(html.unescape(prompt.translate(STRAIGHT)))


def pixels(images: UInt8[Array, "N H W 3"], size: int, antialias: bool = True) -> Float[Array, "N size size 3"]:
    """Images as the network's input: floats, longer side to ``size``, zero-padded to a square, normalised."""
    height, width = preprocess.longest_side(images.shape[1], images.shape[2], size)
    resized = preprocess.resize_float(images.astype(jnp.float32) / 255.0, height, width, antialias)
    return preprocess.normalize(preprocess.pad_to_square(resized))
