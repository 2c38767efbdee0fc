"""D3PO: direct preference optimisation on every denoising step of two samples that started from the same noise.

Paper: Yang et al. 2024, arXiv:2311.13231.
Of two samples of a prompt the one with the higher reward is preferred (h = +1 for it and -1 for the other; both are 0
if they tie). With q = clip(policy / pretrained, 1 - c, 1 + c) of a step, the loss is
-log sigmoid(beta * (h_a log q_a + h_b log q_b)): it makes the preferred action likelier than under the pretrained
model. With more than two samples of a prompt, every pair counts.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.ops import masked, options
from ddpo_jax.ops.advantages import PromptStats, group_mean_baseline, require_groups
from ddpo_jax.types import Batch, StepTerms, Traits

CHOICES = {"log_prob_reduction": ("mean", "sum")}


def default_config() -> ConfigDict:
    """Options of this algorithm."""
    return ConfigDict(
        {
            "beta": 0.1,  # how fast the sigmoid saturates: larger stays nearer to the pretrained model
            "clip_range": 0.1,  # c, on the ratio to the pretrained model (train.clip_range is not read)
            "log_prob_reduction": "mean",  # over latent dimensions: "mean" as public code, or "sum", the density ratio
        }
    )


def traits(config: ConfigDict) -> Traits:
    """The loss couples the samples of a prompt. Its reference is the pretrained model: any sampler's pairs will do."""
    options.check(config, choices=CHOICES, positive=("beta", "clip_range"))
    if config.clip_range >= 1:
        raise InputError(options.fault(config, "clip_range", "it must be below 1 (a ratio is positive)", "0.1"))
    terms = frozenset({"log_prob", "ref_log_prob"})
    return Traits(terms, separable=False, group=True, standardized=False, shared_noise=True)


def advantages(rewards: np.ndarray, prompt_ids: np.ndarray, stats: PromptStats, config: ConfigDict) -> np.ndarray:
    """Reward minus the mean of the prompt [N], which ranks samples for replay; the loss reads the rewards."""
    require_groups(prompt_ids, "algorithm d3po")
    return group_mean_baseline(rewards, prompt_ids)


def loss(terms: StepTerms, batch: Batch, config: ConfigDict) -> jax.Array:
    """Losses [N, N, S] of all pairs of a prompt, zero elsewhere, scaled so that the mean is over pairs and steps."""
    dims = batch.num_dims if config.log_prob_reduction == "sum" else 1
    log_ratio = dims * masked.fill(terms.log_prob - terms.ref_log_prob, batch.mask)
    log_q = jnp.clip(log_ratio, math.log1p(-config.clip_range), math.log1p(config.clip_range))
    preferred = jnp.sign(batch.rewards[:, None] - batch.rewards[None, :])  # h_a of pair (a, b); h_b is its negative
    value = -jax.nn.log_sigmoid(config.beta * preferred[:, :, None] * (log_q[:, None, :] - log_q[None, :, :]))
    pairs = masked.prompt_pairs(batch.prompt_ids, batch.mask)[:, :, None] * batch.mask[:, None] * batch.mask[None]
    return masked.spread(value * pairs, pairs.sum())
