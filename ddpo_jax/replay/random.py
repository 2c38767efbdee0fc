"""Past trajectories come back, drawn uniformly and without replacement: what hard-mining is compared with.

Source: "Selective Timestep Weighting" (anonymous), section 4.3, Fig. 7d.
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
    """A random number in [0, 1) for each sample [N]."""
    return rng.random(len(rewards))
