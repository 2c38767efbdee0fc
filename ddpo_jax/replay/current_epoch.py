"""Trajectories of the epoch just sampled come back, drawn at random: more updates without a memory.

Source: "Selective Timestep Weighting" (anonymous), appendix A.3, Fig. 9. The ablation tells whether hard-mining helps
by what it picks or merely by training more.
"""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

SOURCE = "current"


def default_config() -> ConfigDict:
    """The rule has no options of its own; ``replay.k`` applies, ``replay.history`` does not."""
    return ConfigDict()


def priority(
    rewards: np.ndarray, advantages: np.ndarray, age: np.ndarray, rng: np.random.Generator, config: ConfigDict
) -> np.ndarray:
    """A random number in [0, 1) for each sample [N]."""
    return rng.random(len(rewards))
