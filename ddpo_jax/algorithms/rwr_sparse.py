"""Sparse reward-weighted regression: the denoising loss on samples of the policy whose reward reaches a threshold.

Papers: Black et al. 2023, arXiv:2305.13301, section 4.1 (w_sparse); Gao et al. 2025, section 3.2, Algorithm 2.
The weight is 1[r >= C]: the policy imitates its best samples.
"""

from __future__ import annotations

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.ops import options
from ddpo_jax.ops.advantages import PromptStats
from ddpo_jax.types import Batch, StepTerms, Traits

CHOICES = {"threshold_by": ("percentile", "constant")}


def default_config() -> ConfigDict:
    """Options of this algorithm."""
    return ConfigDict(
        {
            "threshold_by": "percentile",  # "percentile": C is one of the rollout's rewards; "constant": C is the value
            "threshold": 90.0,  # the percentile, 0 to 100; or C itself, in units of the reward
            "refresh_every": 1,  # epochs between snapshots of the sampler; 1: online; 0: offline, the pretrained model
        }
    )


def traits(config: ConfigDict) -> Traits:
    """It is a regression: any sampler's data will do."""
    options.check(config, choices=CHOICES, non_negative=("refresh_every",))
    if config.threshold_by == "percentile" and not 0 <= config.threshold <= 100:
        raise InputError(options.fault(config, "threshold", "a percentile must be 0 to 100", "90.0"))
    return Traits(terms=frozenset({"denoise_mse"}), standardized=False, refresh_every=config.refresh_every)


def advantages(rewards: np.ndarray, prompt_ids: np.ndarray, stats: PromptStats, config: ConfigDict) -> np.ndarray:
    """Weights 0 or 1 [N]. The percentile is the nearest reward not below it, so the sample that sets it is kept."""
    rewards = np.asarray(rewards, np.float64)
    threshold = config.threshold
    if config.threshold_by == "percentile":
        threshold = np.percentile(rewards, config.threshold, method="higher")
    return (rewards >= threshold).astype(np.float64)


def loss(terms: StepTerms, batch: Batch, config: ConfigDict) -> jax.Array:
    """Denoising loss of the samples that are kept [N, S]."""
    return terms.denoise_mse * batch.advantages[:, None]
