"""Reward-weighted regression (RWR): denoising loss on the policy's own samples, weighted by exp(temperature * reward).

Papers: Black et al. 2023, arXiv:2305.13301, section 4.1 (w_RWR); Gao et al. 2025, section 3.1, Algorithm 1. They give
no temperature; the public code has 0.2 in units of the reward, which for JPEG sizes of Stable Diffusion (tens of kB
apart) picks a few samples and for rewards on a scale of 1 weighs all samples alike. Hence a unit that follows the
reward. Gao et al. normalise the weights within a prompt (``softmax_over="prompt"``); the public code does so except
for the JPEG rewards, whose weights it normalises over the batch, the default here.
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
from ddpo_jax.ops.advantages import PromptStats, deviation, require_groups, softmax_weights
from ddpo_jax.types import Batch, StepTerms, Traits

CHOICES = {"softmax_over": ("batch", "prompt"), "reward_unit": ("deviation", "reward")}
EPS = 1e-6  # of a deviation: equal rewards have equal weights


def default_config() -> ConfigDict:
    """Options of this algorithm."""
    return ConfigDict(
        {
            # beta of the papers, an inverse temperature: weight ~ exp(temperature * reward / unit). In deviations, for
            # normal rewards, exp(-temperature^2) of the samples carry the weight: 37 % at 1, 10 % at 1.5
            "temperature": 1.0,
            # "deviation": standard deviation of the rewards that the softmax runs over, for a reward of any scale;
            # "reward": that of the reward itself, as the papers write it
            "reward_unit": "deviation",
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
    """Weights [N]: softmax of temperature * reward, times the number of samples it runs over; their mean is 1.

    Within prompts the deviation is one for all of them, that of a sample from its prompt's mean: a prompt whose samples
    hardly differ keeps weights that hardly do.
    """
    groups = None
    if config.softmax_over == "prompt":
        require_groups(prompt_ids, "algorithm rwr")
        groups = prompt_ids
    unit = deviation(rewards, groups) + EPS if config.reward_unit == "deviation" else 1.0
    return softmax_weights(config.temperature * np.asarray(rewards, np.float64) / unit, groups)


def loss(terms: StepTerms, batch: Batch, config: ConfigDict) -> jax.Array:
    """Weighted denoising loss [N, S]."""
    return terms.denoise_mse * batch.advantages[:, None]
