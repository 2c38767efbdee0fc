"""DDPO with the score function (DDPO_SF): one REINFORCE update on each rollout.

Papers: Black et al. 2023, arXiv:2305.13301, Eq. 3 (DDPO_SF); Gao et al. 2025, Eq. 1 and Algorithm 3.
The likelihood-ratio gradient of the expected reward is the sum over the steps of advantage times gradient of log_prob.
It holds only for samples of the current policy, hence one update per rollout; Gao et al. make four (Table 1), which is
possible and warned of. The advantage is standardised per prompt.
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
            "min_count": 16,  # with fewer, the statistics of the whole batch
        }
    )


def traits(config: ConfigDict) -> Traits:
    """On-policy: there is no importance ratio, so a rollout serves one update rightly and nothing is replayed."""
    options.check(config, positive=("buffer_size", "min_count"))
    return Traits(terms=frozenset({"log_prob"}), on_policy=True, prompt_stats=True)


def advantages(rewards: np.ndarray, prompt_ids: np.ndarray, stats: PromptStats, config: ConfigDict) -> np.ndarray:
    """Per-prompt z-score [N]; the buffers take the new rewards first, then the statistics are read."""
    stats.update(rewards, prompt_ids, buffer_size=config.buffer_size)
    return stats.zscore(rewards, prompt_ids, min_count=config.min_count)


def loss(terms: StepTerms, batch: Batch, config: ConfigDict) -> jax.Array:
    """Score-function loss ``-A log_prob`` [N, S]."""
    return surrogate.score_function(terms.log_prob, batch.advantages[:, None])
