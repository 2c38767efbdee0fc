"""DDPO with importance sampling (DDPO_IS): clipped importance-weighted policy gradient on the denoising steps.

Papers: Black et al. 2023, arXiv:2305.13301, Eq. 4 (DDPO_IS) with the clipping of section 4.3; Gao et al. 2025, Eq. 2
and Algorithm 4.
Every denoising step is an action of a Markov decision process whose reward comes at the end. A rollout serves several
updates: the ratio of each step to the policy that sampled it corrects for the updates made since, and clipping the
ratio removes the incentive to move further than ``clip_range``. The advantage is the reward, standardised by what the
same prompt earned recently.

``ratio_level="trajectory"`` is the pseudo-code of Gao et al. 2025, Algorithm 4: one weight exp(l_theta - l_beh) for the
whole trajectory, where l is the log-probability summed over the steps. The gradient of -A*w equals that of their
-(w*A)*l_theta with w held constant.
"""

from __future__ import annotations

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.ops import masked, options, surrogate
from ddpo_jax.ops.advantages import PromptStats
from ddpo_jax.types import Batch, StepTerms, Traits

CHOICES = {"ratio_level": ("step", "trajectory")}


def default_config() -> ConfigDict:
    """Options of this algorithm."""
    return ConfigDict(
        {
            "buffer_size": 32,  # rewards remembered for each prompt (Black et al. 2023: 32; for alignment 128)
            "min_count": 16,  # with fewer, the statistics of the whole batch (the paper: 16; for alignment 32)
            "ratio_level": "step",  # "step": a ratio per denoising step; "trajectory": one for their product
        }
    )


def traits(config: ConfigDict) -> Traits:
    """What the loss reads; the trajectory-level ratio couples the steps."""
    options.check(config, choices=CHOICES, positive=("buffer_size", "min_count"))
    return Traits(terms=frozenset({"log_prob"}), separable=config.ratio_level == "step", prompt_stats=True)


def advantages(rewards: np.ndarray, prompt_ids: np.ndarray, stats: PromptStats, config: ConfigDict) -> np.ndarray:
    """Per-prompt z-score [N]; the buffers take the new rewards first, then the statistics are read."""
    stats.update(rewards, prompt_ids, buffer_size=config.buffer_size)
    return stats.zscore(rewards, prompt_ids, min_count=config.min_count)


def loss(terms: StepTerms, batch: Batch, config: ConfigDict) -> jax.Array:
    """Clipped surrogate: [N, S] with a ratio per step; [N], divided by the number of steps, with one per trajectory."""
    if config.ratio_level == "step":
        return surrogate.clipped(terms.log_prob, batch.old_log_prob, batch.advantages[:, None], batch.clip_range)
    log_prob, old_log_prob = (masked.total(x, batch.mask, axis=1) for x in (terms.log_prob, batch.old_log_prob))
    value = surrogate.clipped(log_prob, old_log_prob, batch.advantages, batch.clip_range)
    return masked.spread(value * masked.trained(batch.mask), batch.mask.sum())
