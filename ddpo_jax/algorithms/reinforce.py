"""REINFORCE without a baseline: the log-probability of each step, weighted by the reward itself.

Paper: Gupta et al. 2025, arXiv:2503.00897, Eq. 7.
It is the plainest unbiased policy gradient and the reference point of their comparison: rewards that are all positive
push every sample up, so its variance is large.
"""

from __future__ import annotations

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.ops import surrogate
from ddpo_jax.ops.advantages import PromptStats
from ddpo_jax.types import Batch, StepTerms, Traits


def default_config() -> ConfigDict:
    """There are no options."""
    return ConfigDict()


def traits(config: ConfigDict) -> Traits:
    """On-policy. The advantages are raw rewards, which a clip in standard deviations must not touch."""
    return Traits(terms=frozenset({"log_prob"}), on_policy=True, standardized=False)


def advantages(rewards: np.ndarray, prompt_ids: np.ndarray, stats: PromptStats, config: ConfigDict) -> np.ndarray:
    """The rewards [N]."""
    return np.array(rewards, np.float64)


def loss(terms: StepTerms, batch: Batch, config: ConfigDict) -> jax.Array:
    """Score-function loss ``-r log_prob`` [N, S]."""
    return surrogate.score_function(terms.log_prob, batch.advantages[:, None])
