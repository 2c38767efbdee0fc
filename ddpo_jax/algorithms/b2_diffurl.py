"""B2-DiffuRL: DDPO's surrogate on the last steps of trajectories that branch from a common root, chosen by contrast.

Paper: Hu et al. 2025, arXiv:2503.11240; a baseline in "Selective Timestep Weighting" (anonymous), section 5.
Branching: the K samples of a prompt share the first T - s steps and only the last s are trained, so that those steps
alone explain why their rewards differ. Backward progression: s grows to T over the run. The best branch of a root is
kept if it is good and the worst if it is bad; the other branches are dropped. The rollout asks ``interval`` how many
steps to branch and ``select`` which samples to keep; the loss itself is DDPO's.
"""

from __future__ import annotations

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.ops import options, surrogate
from ddpo_jax.ops.advantages import PromptStats
from ddpo_jax.types import Batch, StepTerms, Traits


def default_config() -> ConfigDict:
    """Options of this algorithm."""
    return ConfigDict(
        {
            "clip_range": 0.1,  # on the ratio (train.clip_range is not read)
            "start_fraction": 0.7,  # of the steps, branched and trained in the first stage (14 of 20)
            "history": 8,  # earlier stages whose rewards of the prompt enter its mean and standard deviation
            "keep_above": 0.5,  # the best branch of a root is trained on if its advantage is at least this
            "keep_below": -0.5,  # the worst branch of a root is trained on if its advantage is below this
        }
    )


def traits(config: ConfigDict) -> Traits:
    """The rollout branches; the loss is separable."""
    options.check(config, positive=("clip_range", "start_fraction"), non_negative=("history",))
    if config.start_fraction > 1:
        raise InputError(options.fault(config, "start_fraction", "it must be at most 1 (all steps)", "0.7"))
    return Traits(terms=frozenset({"log_prob"}), prompt_stats=True, branching=True)


def interval(stage: int, num_stages: int, num_steps: int, config: ConfigDict) -> int:
    """Number s of last steps to branch and train in ``stage`` (from 0): s0 + floor((T - s0 + 1) stage / num_stages).

    With T = 20 and 100 stages: 14 in stages 0 to 14, 20 in stages 86 to 99.
    """
    first = max(1, round(config.start_fraction * num_steps))
    return min(num_steps, first + (num_steps - first + 1) * stage // num_stages)


def select(advantages: np.ndarray, root_ids: np.ndarray, config: ConfigDict) -> np.ndarray:
    """Which samples to train on, bool [N]: each root's best if >= keep_above, and its worst if < keep_below."""
    advantages = np.asarray(advantages, np.float64)
    keep = np.zeros(advantages.shape, bool)
    for root in np.unique(root_ids):
        branches = np.flatnonzero(np.asarray(root_ids) == root)
        best, worst = branches[advantages[branches].argmax()], branches[advantages[branches].argmin()]
        keep[best] |= advantages[best] >= config.keep_above
        keep[worst] |= advantages[worst] < config.keep_below
    return keep


def advantages(rewards: np.ndarray, prompt_ids: np.ndarray, stats: PromptStats, config: ConfigDict) -> np.ndarray:
    """z-score [N] over the prompt's rewards of this stage and the last ``history`` ones (a stage is an epoch)."""
    stats.update(rewards, prompt_ids, history=config.history + 1)
    return stats.zscore(rewards, prompt_ids, min_count=1)


def loss(terms: StepTerms, batch: Batch, config: ConfigDict) -> jax.Array:
    """Clipped surrogate per step [N, S]; the mask leaves out the shared steps."""
    return surrogate.clipped(terms.log_prob, batch.old_log_prob, batch.advantages[:, None], config.clip_range)
