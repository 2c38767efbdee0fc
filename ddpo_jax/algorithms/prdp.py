"""Proximal reward difference prediction (PRDP): log-ratio differences learn to predict reward differences.

Paper: Deng et al. 2024, arXiv:2402.08714, Eq. 14; proximal updates Eq. 17 to 21; Algorithm 1.
The policy that maximises reward - beta * KL(policy || pretrained) is the one whose rhat, the sum over steps of
log(policy / pretrained), equals r / beta up to a constant of the prompt. Two samples of a prompt cancel the constant:
the loss of a pair is (rhat_a - rhat_b - (r_a - r_b) / beta)^2, a supervised regression that is zero exactly at the
optimum. A second loss is the same with the rhat_t of every step clipped to +-epsilon around its value at sampling time.
The larger of the two is taken, which removes the incentive to move far. The initial noise of the two samples differs
and no policy chooses it; that leaves a remainder of loss.

The paper does not say whether log(policy / pretrained) of a step is the sum over the latent dimensions, as its Eq. 4
has it, or their mean, as DDPO's public code computes it. The mean is inferred: with the sum and its beta of 10 (section
4.4) the optimum of Eq. 7 gains Var(r) / 10 only, which is 0.013 of the miniature's aesthetic score against the changed
pictures of their Fig. 8, and one ordinary update overshoots the target by three orders of magnitude. beta and the clip
are then meant for means over dimensions; with ``log_prob_reduction="sum"`` the clip is ``train.clip_range`` times their
number.

The paper gives beta for the aesthetic score alone, and any other reward has another scale. So beta is stated in
deviations of the reward within a prompt, measured on every rollout; 25 of them are about what 10 is for the miniature's
aesthetic score, whose deviation is 0.4.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.ops import masked, options
from ddpo_jax.ops.advantages import PromptStats, deviation, group_mean_baseline, require_groups
from ddpo_jax.types import Batch, StepTerms, Traits

CHOICES = {"log_prob_reduction": ("mean", "sum"), "reward_unit": ("deviation", "reward")}
EPS = 1e-6  # of a deviation: equal rewards are equal targets


def default_config() -> ConfigDict:
    """Options of this algorithm."""
    return ConfigDict(
        {
            "kl_coef": 25.0,  # beta: how many units of the reward make a difference of 1 in rhat
            # "deviation": standard deviation within prompts, for a reward of any scale; "reward": that of the reward
            "reward_unit": "deviation",
            "log_prob_reduction": "mean",  # of rhat over latent dimensions; or "sum": the true log-density ratio
            "proximal": True,  # False leaves the clip out (Deng et al. 2024, Fig. 3, left)
            "refresh_every": 1,  # epochs between snapshots of the sampler; 1: online; 0: offline, the pretrained model
        }
    )


def traits(config: ConfigDict) -> Traits:
    """The loss couples the steps and the samples of a prompt. It is a regression: any sampler's data will do."""
    options.check(config, choices=CHOICES, positive=("kl_coef",), non_negative=("refresh_every",))
    held: tuple[str, ...] = ()
    if config.proximal and config.refresh_every == 0:
        held = (
            "algorithm.proximal: received True; offline (refresh_every=0) the clip holds the policy within "
            "train.clip_range of the pretrained model; False is usual",
        )
    return Traits(
        terms=frozenset({"log_prob", "ref_log_prob"}),
        separable=False,
        group=True,
        standardized=False,
        refresh_every=config.refresh_every,
        doubts=held,
    )


def advantages(rewards: np.ndarray, prompt_ids: np.ndarray, stats: PromptStats, config: ConfigDict) -> np.ndarray:
    """Reward minus the mean of the prompt [N], in units of the reward. Differences of these are the loss's targets."""
    require_groups(prompt_ids, "algorithm prdp")
    unit = deviation(rewards, prompt_ids) + EPS if config.reward_unit == "deviation" else 1.0
    return group_mean_baseline(rewards, prompt_ids) / unit


def loss(terms: StepTerms, batch: Batch, config: ConfigDict) -> jax.Array:
    """Squared errors [N, N] of all pairs of a prompt, zero elsewhere, scaled so that their mean is over the pairs."""
    dims = batch.num_dims if config.log_prob_reduction == "sum" else 1
    pairs = masked.prompt_pairs(batch.prompt_ids, batch.mask)

    def squared_errors(rhat: jax.Array) -> jax.Array:
        total = masked.total(rhat, batch.mask, axis=1) - batch.advantages / config.kl_coef
        return jnp.square(total[:, None] - total[None, :])

    rhat = dims * (terms.log_prob - terms.ref_log_prob)
    errors = squared_errors(rhat)
    if config.proximal:
        old, epsilon = dims * (batch.old_log_prob - terms.ref_log_prob), dims * batch.clip_range
        errors = jnp.maximum(errors, squared_errors(jnp.clip(rhat, old - epsilon, old + epsilon)))
    return masked.spread(errors * pairs, pairs.sum())
