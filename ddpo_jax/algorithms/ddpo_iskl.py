"""DDPO_ISKL: DDPO with importance sampling and a squared penalty on the trajectory's log-probability ratio.

Paper: Gao et al. 2025, section 3.5, Algorithm 5, line 31. To the surrogate of each trajectory it adds lambda/2 *
(l_theta - l_ref)^2, where l is the log-probability summed over the steps and ref is the pretrained model. The penalty's
gradient is lambda * (l_theta - l_ref) * grad l_theta: it acts as an advantage that pulls drifted trajectories back.
Algorithm 5 writes one importance weight per trajectory, their Eq. 2 writes one per step: ``ratio_level`` chooses. All
else is DDPO's, the advantages included: their Algorithms 4 and 5 differ in the penalty alone.

Not in the paper: that advantage knows neither the clip, which stops DDPO's own gradient, nor a baseline, so what all
trajectories have drifted adds noise to the gradient, which drifts them further. ``penalty_clip`` and
``penalty_baseline`` give it both.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.ops import masked, options, surrogate
from ddpo_jax.ops.advantages import PromptStats
from ddpo_jax.types import Batch, StepTerms, Traits

CHOICES = {"ratio_level": ("step", "trajectory"), "log_prob_reduction": ("mean", "sum")}


def default_config() -> ConfigDict:
    """Options of this algorithm. The paper does not state lambda."""
    return ConfigDict(
        {
            "buffer_size": 32,  # rewards remembered for each prompt
            "min_count": 16,  # with fewer, the statistics of the whole batch
            # lambda; with 1, a trajectory whose l (mean over dimensions) rose by 1 loses 1 standard deviation of reward
            "kl_coef": 1.0,
            "ratio_level": "step",  # "step": a ratio per denoising step; "trajectory": one for their product
            # l in the penalty: "mean" over latent dimensions as public code logs it, or their "sum", the true density
            "log_prob_reduction": "mean",
            "penalty_clip": False,  # no gradient of the penalty at steps whose ratio is outside train.clip_range
            "penalty_baseline": False,  # the penalty's advantage is lambda * (drift - its mean over the update)
        }
    )


def traits(config: ConfigDict) -> Traits:
    """The loss is coupled: the penalty sums over the steps before it squares."""
    options.check(config, choices=CHOICES, positive=("buffer_size", "min_count"), non_negative=("kl_coef",))
    return Traits(terms=frozenset({"log_prob", "ref_log_prob"}), separable=False, prompt_stats=True)


def advantages(rewards: np.ndarray, prompt_ids: np.ndarray, stats: PromptStats, config: ConfigDict) -> np.ndarray:
    """Per-prompt z-score [N]; the buffers take the new rewards first, then the statistics are read."""
    stats.update(rewards, prompt_ids, buffer_size=config.buffer_size)
    return stats.zscore(rewards, prompt_ids, min_count=config.min_count)


def loss(terms: StepTerms, batch: Batch, config: ConfigDict) -> jax.Array:
    """Surrogate of the trajectory [N], divided by the number of trained steps."""
    # masked entries become 0 before any arithmetic: whatever stands there then has no gradient
    log_prob, old_log_prob = (masked.fill(x, batch.mask) for x in (terms.log_prob, batch.old_log_prob))
    if config.ratio_level == "step":
        value = surrogate.clipped(log_prob, old_log_prob, batch.advantages[:, None], batch.clip_range)
        value = masked.total(value, batch.mask, axis=1)
    else:
        value = surrogate.clipped(log_prob.sum(1), old_log_prob.sum(1), batch.advantages, batch.clip_range)
        value = value * masked.trained(batch.mask)
    return masked.spread(value, batch.mask.sum())


def penalty(terms: StepTerms, batch: Batch, config: ConfigDict) -> jax.Array:
    """What the drift from the pretrained model costs a trajectory [N], divided by the number of trained steps."""
    log_prob, old_log_prob, ref_log_prob = (
        masked.fill(x, batch.mask) for x in (terms.log_prob, batch.old_log_prob, terms.ref_log_prob)
    )
    if config.penalty_clip:
        inside = jnp.abs(surrogate.ratio(log_prob, old_log_prob) - 1) <= batch.clip_range
        log_prob = jnp.where(inside, log_prob, jax.lax.stop_gradient(log_prob))
    dims = batch.num_dims if config.log_prob_reduction == "sum" else 1
    drift = dims * (log_prob - ref_log_prob).sum(axis=1)
    cost = 0.5 * drift**2
    if config.penalty_baseline:
        used = masked.trained(batch.mask)
        shared = masked.total(drift, used) / jnp.maximum(used.sum(), 1)
        cost = cost - jax.lax.stop_gradient(shared) * drift  # its gradient is (drift - shared) * grad l_theta
    return masked.spread(config.kl_coef * cost, batch.mask.sum())
