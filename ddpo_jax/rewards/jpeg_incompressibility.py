"""The size of the image as JPEG in kB (1000 bytes): the larger, the better (Black et al. 2023, section 5).

No network. A black 512x512 image is 4.723 kB; Stable Diffusion 1.5 on unseen animals averages 118.75 kB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.rewards._shared import jpeg as _jpeg


def default_config() -> ConfigDict:
    """No options."""
    return ConfigDict()


def make(config: ConfigDict) -> Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]:
    """The reward; part ``jpeg_kb`` is the size itself."""
    del config

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]):
        del prompts, metadata
        size = _jpeg.kilobytes(images)
        return size, {"jpeg_kb": size}

    return reward
