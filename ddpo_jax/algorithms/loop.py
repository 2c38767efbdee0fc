"""Leave-one-out PPO (LOOP): K samples per prompt and RLOO's baseline inside DDPO's clipped surrogate.

Paper: Gupta et al. 2025, arXiv:2503.00897, Eq. 13 with the baseline of Eq. 14.
There is neither a division by the standard deviation nor a KL penalty (their section 4). Eq. 13 writes the clip alone;
the surrogate here is PPO's minimum of clipped and unclipped, which their Eq. 3 gives as the PPO objective.
"""

from __future__ import annotations

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.ops import surrogate
from ddpo_jax.ops.advantages import PromptStats, leave_one_out
from ddpo_jax.types import Batch, StepTerms, Traits


def default_config() -> ConfigDict:
    """There are no options. K is prompts.samples_per_prompt (paper: 2 to 4), epsilon train.clip_range (paper: 1e-4)."""
    return ConfigDict()


def traits(config: ConfigDict) -> Traits:
    """The baseline is that of a group; the advantages are in units of the reward."""
    return Traits(terms=frozenset({"log_prob"}), group=True, standardized=False)


def advantages(rewards: np.ndarray, prompt_ids: np.ndarray, stats: PromptStats, config: ConfigDict) -> np.ndarray:
    """Reward minus the mean reward of the prompt's other samples [N], not divided by a standard deviation."""
    return leave_one_out(rewards, prompt_ids)


def loss(terms: StepTerms, batch: Batch, config: ConfigDict) -> jax.Array:
    """Clipped surrogate per step [N, S]."""
    return surrogate.clipped(terms.log_prob, batch.old_log_prob, batch.advantages[:, None], batch.clip_range)
