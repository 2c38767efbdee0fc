"""DPOK: policy gradient with a learned value function as baseline and a KL penalty to the pretrained model per step.

Paper: Fan et al. 2023, arXiv:2305.16381; a baseline in "Selective Timestep Weighting" (anonymous), section 5.
The loss of a step has two parts: reward_weight * ratio * (r - V(x_t, prompt, t)), and kl_coef * KL(policy ||
pretrained). The KL is ||mu - mu_ref||^2 / (2 std^2) as a mean over dimensions, since both Gaussians have the same
variance. V regresses on the final reward with an optimizer of its own and is a constant here. ``noise_mse`` and
``clamp`` are what the public code computes in place of the KL and of the PPO surrogate.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.ops import options, surrogate
from ddpo_jax.ops.advantages import PromptStats
from ddpo_jax.types import Batch, StepTerms, Traits

CHOICES = {"kl_form": ("gaussian", "noise_mse"), "surrogate": ("clip", "clamp")}


def default_config() -> ConfigDict:
    """Options of this algorithm."""
    return ConfigDict(
        {
            "reward_weight": 10.0,  # factor of the policy gradient: 10 for one prompt, 1000 for many
            "kl_coef": 0.01,  # factor of the KL penalty: 0.01 to 0.1
            "kl_form": "gaussian",  # "gaussian": KL of the step's Gaussians; "noise_mse": mean squared noise difference
            "surrogate": "clip",  # "clip": PPO's; "clamp": no gradient outside the range, in either direction
            "value_learning_rate": 1e-4,  # AdamW of the value network
            "value_updates": 5,  # updates of the value network for one of the policy
        }
    )


def traits(config: ConfigDict) -> Traits:
    """What the losses read. The loss takes the raw rewards and subtracts V itself."""
    positive = ("reward_weight", "value_learning_rate", "value_updates")
    options.check(config, choices=CHOICES, positive=positive, non_negative=("kl_coef",))
    penalty = "kl" if config.kl_form == "gaussian" else "noise_mse"
    return Traits(
        terms=frozenset({"log_prob", "value", penalty}),
        standardized=False,
        value_updates=config.value_updates,
        value_learning_rate=config.value_learning_rate,
    )


def advantages(rewards: np.ndarray, prompt_ids: np.ndarray, stats: PromptStats, config: ConfigDict) -> np.ndarray:
    """Reward minus the rollout's mean [N], for the metrics. The baseline of the loss, and of replay, is V."""
    rewards = np.asarray(rewards, np.float64)
    return rewards - rewards.mean()


def loss(terms: StepTerms, batch: Batch, config: ConfigDict) -> jax.Array:
    """Policy gradient of a step [N, S]; V is a constant in it."""
    advantage = batch.rewards[:, None] - jax.lax.stop_gradient(terms.value)
    policy = surrogate.clipped if config.surrogate == "clip" else surrogate.clamped
    return config.reward_weight * policy(terms.log_prob, batch.old_log_prob, advantage, batch.clip_range)


def penalty(terms: StepTerms, batch: Batch, config: ConfigDict) -> jax.Array:
    """What the distance to the pretrained model costs a step [N, S]."""
    return config.kl_coef * (terms.kl if config.kl_form == "gaussian" else terms.noise_mse)


def value_loss(terms: StepTerms, batch: Batch, config: ConfigDict) -> jax.Array:
    """Squared error of V against the final reward [N, S], for the value network alone."""
    return jnp.square(terms.value - batch.rewards[:, None])
