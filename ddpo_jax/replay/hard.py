"""Historical hard-mining: the past trajectories with the largest absolute advantage come back.

Source: "Selective Timestep Weighting" (anonymous), section 4.3, Algorithm 1. These trajectories hold the denoising
steps that changed the reward most, for better or worse.
"""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

SOURCE = "past"


def default_config() -> ConfigDict:
    """The rule has no options of its own; ``replay.k`` and ``replay.history`` apply."""
    return ConfigDict()


def priority(
    rewards: np.ndarray, advantages: np.ndarray, age: np.ndarray, rng: np.random.Generator, config: ConfigDict
) -> np.ndarray:
    """``|advantage|`` [N]."""
    return np.abs(np.asarray(advantages, np.float64))
