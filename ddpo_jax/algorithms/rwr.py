"""Reward-weighted regression (RWR): denoising loss on the policy's own samples, weighted by exp(temperature * reward).

Papers: Black et al. 2023, arXiv:2305.13301, section 4.1 (w_RWR); Gao et al. 2025, section 3.1, Algorithm 1.
The policy is seen as a one-step choice of the final latents, whose likelihood is replaced by the denoising loss: they
are noised again at random timesteps and the guided prediction is compared with that noise. A regression may reuse a
rollout for many updates; one round on samples of the pretrained model is ``refresh_every=0``. A trained step stands for
its share of the noise levels, so timestep weights weigh noise levels.
"""

from __future__ import annotations

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.ops import options
from ddpo_jax.ops.advantages import PromptStats, require_groups, softmax_weights
from ddpo_jax.types import Batch, StepTerms, Traits

CHOICES = {"softmax_over": ("batch", "prompt")}


def default_config() -> ConfigDict:
    """Options of this algorithm."""
    return ConfigDict(
        {
            "temperature": 0.2,  # beta of the papers, an inverse temperature: weight ~ exp(temperature * reward)
            "softmax_over": "batch",  # "batch": all samples of the rollout; "prompt": those of the same prompt
            "refresh_every": 1,  # epochs between snapshots of the sampler; 1: online; 0: offline, the pretrained model
        }
    )


def traits(config: ConfigDict) -> Traits:
    """It is a regression: any sampler's data will do. Per-prompt weights compare the samples of a prompt."""
    options.check(config, choices=CHOICES, positive=("temperature",), non_negative=("refresh_every",))
    return Traits(
        terms=frozenset({"denoise_mse"}),
        group=config.softmax_over == "prompt",
        standardized=False,
        refresh_every=config.refresh_every,
    )


def advantages(rewards: np.ndarray, prompt_ids: np.ndarray, stats: PromptStats, config: ConfigDict) -> np.ndarray:
    """Weights [N]: softmax of temperature * reward, times the number of samples it runs over; their mean is 1."""
    logits = config.temperature * np.asarray(rewards, np.float64)
    if config.softmax_over == "batch":
        return softmax_weights(logits)
    require_groups(prompt_ids, "algorithm rwr")
    return softmax_weights(logits, prompt_ids)


def loss(terms: StepTerms, batch: Batch, config: ConfigDict) -> jax.Array:
    """Weighted denoising loss [N, S]."""
    return terms.denoise_mse * batch.advantages[:, None]
