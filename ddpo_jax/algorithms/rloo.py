"""REINFORCE leave-one-out: each of a prompt's K samples is compared with the mean of the other K - 1.

Papers: Gupta et al. 2025, arXiv:2503.00897, Eq. 9 with the baseline of Eq. 14; Kool et al. 2019.
Unlike the mean of all K, the baseline does not contain the sample that it judges, so the gradient stays unbiased. There
is no importance ratio, so a rollout serves one update.
"""

from __future__ import annotations

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.ops import surrogate
from ddpo_jax.ops.advantages import PromptStats, leave_one_out
from ddpo_jax.types import Batch, StepTerms, Traits


def default_config() -> ConfigDict:
    """There are no options; K is prompts.samples_per_prompt."""
    return ConfigDict()


def traits(config: ConfigDict) -> Traits:
    """On-policy. The baseline is that of a group; the advantages are in units of the reward."""
    return Traits(terms=frozenset({"log_prob"}), on_policy=True, group=True, standardized=False)


def advantages(rewards: np.ndarray, prompt_ids: np.ndarray, stats: PromptStats, config: ConfigDict) -> np.ndarray:
    """Reward minus the mean reward of the prompt's other samples [N]."""
    return leave_one_out(rewards, prompt_ids)


def loss(terms: StepTerms, batch: Batch, config: ConfigDict) -> jax.Array:
    """Score-function loss ``-A log_prob`` [N, S]."""
    return surrogate.score_function(terms.log_prob, batch.advantages[:, None])
