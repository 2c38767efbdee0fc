"""REINFORCE with baseline correction: the reward minus what this prompt earned recently.

Paper: Gupta et al. 2025, arXiv:2503.00897, Eq. 8. Its section 7.1 gives the baseline: the average reward of the prompt,
kept in a buffer as Black et al. 2023, arXiv:2305.13301, keep it.
A baseline that does not depend on the sample leaves the expected gradient alone and lowers its variance. The buffer
holds the sample itself as one of many, which shrinks the gradient a little and does not turn it.
"""

from __future__ import annotations

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.ops import options, surrogate
from ddpo_jax.ops.advantages import PromptStats
from ddpo_jax.types import Batch, StepTerms, Traits


def default_config() -> ConfigDict:
    """Options of this algorithm."""
    return ConfigDict(
        {
            "buffer_size": 32,  # rewards remembered for each prompt
            "min_count": 16,  # with fewer, the mean of the whole batch
        }
    )


def traits(config: ConfigDict) -> Traits:
    """On-policy. The advantages are in units of the reward."""
    options.check(config, positive=("buffer_size", "min_count"))
    return Traits(terms=frozenset({"log_prob"}), on_policy=True, prompt_stats=True, standardized=False)


def advantages(rewards: np.ndarray, prompt_ids: np.ndarray, stats: PromptStats, config: ConfigDict) -> np.ndarray:
    """Reward minus the mean of the prompt's buffer [N]; the buffers take the new rewards first."""
    stats.update(rewards, prompt_ids, buffer_size=config.buffer_size)
    return np.asarray(rewards, np.float64) - stats.statistics(rewards, prompt_ids, config.min_count)[0]


def loss(terms: StepTerms, batch: Batch, config: ConfigDict) -> jax.Array:
    """Score-function loss ``-A log_prob`` [N, S]."""
    return surrogate.score_function(terms.log_prob, batch.advantages[:, None])
