"""Proximal reward difference prediction (PRDP): log-ratio differences learn to predict reward differences.

Paper: 002 Eq. 14, proximal updates Eq. 17-21, Algorithm 1.
The policy that maximises reward - beta * KL(policy || pretrained) is the one whose rhat, the sum over steps of
log(policy / pretrained), equals r / beta up to a constant of the prompt. Two samples of a prompt cancel the constant:
the loss of a pair is (rhat_a - rhat_b - (r_a - r_b) / beta)^2, a supervised regression, zero exactly at the optimum.
The larger of it and the same with every step's rhat_t clipped to +-epsilon around its value at sampling time removes
the incentive to move far. (A pair's different initial noise, which no policy chooses, leaves a remainder of loss.)

beta and the clip are meant for sums over latent dimensions. epsilon is train.clip_range, which is on their mean, times
their number where ``log_prob_reduction`` is "sum".
"""

from __future__ import annotations

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
            "kl_coef": 10.0,  # beta, in units of the reward (002 section 4.4: 10 for the aesthetic reward)
            "log_prob_reduction": "sum",  # of rhat over latent dimensions: "sum" is the log-density ratio, or "mean"
            "proximal": True,  # False leaves the clip out (002 Figure 3, left)
            "refresh_every": 1,  # epochs between snapshots of the sampler; 1: online; 0: offline, the pretrained model
        }
    )


def traits(config: ConfigDict) -> Traits:
    """Coupled over the steps and over the samples of a prompt; a regression, so any sampler's data will do."""
    options.check(config, choices=CHOICES, positive=("kl_coef",), non_negative=("refresh_every",))
    if config.proximal and config.refresh_every == 0:
        rule = "offline (refresh_every=0) the clip would hold the policy at the pretrained model"
        raise InputError(options.fault(config, "proximal", rule, "False"))
    terms = frozenset({"log_prob", "ref_log_prob"})
    return Traits(terms, separable=False, group=True, standardized=False, refresh_every=config.refresh_every)


def advantages(rewards: np.ndarray, prompt_ids: np.ndarray, stats: PromptStats, config: ConfigDict) -> np.ndarray:
    """Reward minus the mean of the prompt [N]: it ranks samples for replay; the loss reads the rewards."""
    require_groups(prompt_ids, "algorithm prdp")
    return group_mean_baseline(rewards, prompt_ids)


def loss(terms: StepTerms, batch: Batch, config: ConfigDict) -> jax.Array:
    """Squared errors [N, N] of all pairs of a prompt, zero elsewhere, scaled so that the mean is over the pairs."""
    dims = batch.num_dims if config.log_prob_reduction == "sum" else 1
    pairs = masked.prompt_pairs(batch.prompt_ids, batch.mask)

    def squared_errors(rhat: jax.Array) -> jax.Array:
        total = masked.total(rhat, batch.mask, axis=1) - batch.rewards / config.kl_coef
        return jnp.square(total[:, None] - total[None, :])

    rhat = dims * (terms.log_prob - terms.ref_log_prob)
    errors = squared_errors(rhat)
    if config.proximal:
        old, epsilon = dims * (batch.old_log_prob - terms.ref_log_prob), dims * batch.clip_range
        errors = jnp.maximum(errors, squared_errors(jnp.clip(rhat, old - epsilon, old + epsilon)))
    return masked.spread(errors * pairs, pairs.sum())
