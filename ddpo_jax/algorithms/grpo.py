"""Group relative policy optimisation: the clipped surrogate with the reward standardised within a prompt's K samples.

Papers: Shao et al. 2024, arXiv:2402.03300; for diffusion "Selective Timestep Weighting" (anonymous), section 3, where
DDPO's surrogate has A = (r - mean) / std.
Shao et al. also add a KL penalty to a reference model; here there is none, as in DDPO.
There is no value network and no memory of earlier epochs: the group is the baseline. A group of equal rewards teaches
nothing (A = 0).
"""

from __future__ import annotations

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.ops import surrogate
from ddpo_jax.ops.advantages import PromptStats, group_zscore, require_groups
from ddpo_jax.types import Batch, StepTerms, Traits


def default_config() -> ConfigDict:
    """There are no options; K is prompts.samples_per_prompt."""
    return ConfigDict()


def traits(config: ConfigDict) -> Traits:
    """The baseline is that of a group, so a prompt needs several samples."""
    return Traits(terms=frozenset({"log_prob"}), group=True)


def advantages(rewards: np.ndarray, prompt_ids: np.ndarray, stats: PromptStats, config: ConfigDict) -> np.ndarray:
    """``(r - mean) / std`` over the samples of the prompt in this rollout [N]."""
    require_groups(prompt_ids, "algorithm grpo")
    return group_zscore(rewards, prompt_ids)


def loss(terms: StepTerms, batch: Batch, config: ConfigDict) -> jax.Array:
    """Clipped surrogate per step [N, S]."""
    return surrogate.clipped(terms.log_prob, batch.old_log_prob, batch.advantages[:, None], batch.clip_range)
