"""From a rollout to scored samples and a row of metrics, without a network: numbers small enough to do by hand."""

import dataclasses
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from ddpo_jax.rollout.collector import Rollout
from ddpo_jax.training import epoch
from ddpo_jax.types import Traits

N, T = 4, 4
REWARDS = np.float32([1, 2, 3, 10])
WEIGHTS = np.float32([[1, 2, 3, 4], [0, 1, 1, 5], [2, 2, 2, 2], [8, 0, 2, 1]])
CONFIG = ConfigDict({"train": {"adv_clip_max": 2.0}, "sample": {"num_steps": T}, "algorithm": {"scale": 0.5}})


def rollout(branch_step=0):
    mark = np.arange(N, dtype=np.float32)
    return Rollout(
        latents=np.zeros((N, T + 1, 2, 2, 1), np.float32) + mark[:, None, None, None, None],
        log_prob=np.zeros((N, T), np.float32) + mark[:, None],
        weights=WEIGHTS,
        branch_step=branch_step,
        prompts=["a", "a", "b", "b"],
        context=np.zeros((N, 2, 3), np.float32) + mark[:, None, None],
        prompt_ids=np.array([5, 5, 6, 6]),
        group_ids=np.array([0, 0, 1, 1]),
        images=np.zeros((N, 2, 2, 3), np.uint8),
        rewards=REWARDS,
        parts={"kb": np.float32([1, np.nan, 3, np.nan]), "nothing": np.full(N, np.nan, np.float32)},
        rollout_s=3.0,
        reward_s=2.0,
    )


def parts(*, standardized=True, trained=(True,) * T, decoupled=()):
    """An algorithm whose advantages are the rewards above their mean, times its option."""
    seen = []

    def advantages(rewards, prompt_ids, stats, config):
        seen.append((rewards.dtype, prompt_ids.tolist(), stats))
        return config.scale * (rewards - rewards.mean())

    return types.SimpleNamespace(
        algorithm=types.SimpleNamespace(advantages=advantages, seen=seen),
        traits=Traits(terms=frozenset({"log_prob"}), standardized=standardized),
        trained_steps=np.array(trained),
        replay=types.SimpleNamespace(nbytes=17),
        reward=types.SimpleNamespace(decoupled=dict(decoupled)),
    )


def test_advantages_are_the_algorithms_and_clipped_where_they_are_standardized():
    made = parts()
    found = epoch.assign(made, CONFIG, "stats", rollout())
    assert made.algorithm.seen == [(np.float64, [5, 5, 6, 6], "stats")]
    np.testing.assert_array_equal(found.advantages, [-1.5, -1, -0.5, 2])  # 3 is clipped
    plain = epoch.assign(parts(standardized=False), CONFIG, "stats", rollout())
    np.testing.assert_array_equal(plain.advantages, [-1.5, -1, -0.5, 3])


def test_standardised_parts_take_the_place_of_the_rewards():
    """By hand: within prompt a the z-scores are -1, 1 and -1, 1; within b 0, 0 and -1, 1."""
    given = rollout()
    given.parts.update(small=np.float32([1, 3, 10, 10]), large=np.float32([0, 2000, 1000, 5000]))
    weights = {"small": 2.0, "large": -0.5}
    total = np.array([-1.5, 1.5, 0.5, -0.5])  # 2 z(small) - z(large) / 2
    made = parts(standardized=False, decoupled=weights)
    found = epoch.assign(made, CONFIG, "stats", given)
    assert made.algorithm.seen == [(np.float64, [5, 5, 6, 6], "stats")]
    np.testing.assert_allclose(found.rewards, total, rtol=2e-6)
    np.testing.assert_allclose(found.advantages, 0.5 * total, rtol=2e-6)
    # advantages in standard deviations are GDPO's: sqrt((2.25 + 2.25 + 0.25 + 0.25) / 4) of the whole batch
    found = epoch.assign(parts(decoupled=weights), CONFIG, None, given)
    np.testing.assert_allclose(found.advantages, total / np.sqrt(1.25), rtol=3e-6)
    assert epoch.report(parts(), given, found, epoch.Updates([], 0, 0))["reward/mean"] == 4  # of the plain sum


def test_what_was_sampled_stays_as_it_is():
    given, found = rollout(), epoch.assign(parts(), CONFIG, None, rollout())
    for name in ("latents", "log_prob", "context", "prompt_ids", "group_ids", "rewards"):
        np.testing.assert_array_equal(getattr(found, name), getattr(given, name))


@pytest.mark.parametrize(
    "trained, branch_step, mask",
    [
        ((True,) * 4, 0, [1, 1, 1, 1]),
        ((True, True, True, False), 0, [1, 1, 1, 0]),  # a step without density
        ((True,) * 4, 2, [0, 0, 1, 1]),  # the samples of a prompt share the first two
        ((True, True, True, False), 2, [0, 0, 1, 0]),
    ],
)
def test_weights_have_mean_one_over_the_steps_that_may_be_trained(trained, branch_step, mask):
    found = epoch.assign(parts(trained=trained), CONFIG, None, rollout(branch_step))
    np.testing.assert_array_equal(found.mask, np.tile(np.float32(mask), (N, 1)))
    kept = WEIGHTS * mask
    np.testing.assert_allclose(found.weights, kept * sum(mask) / kept.sum(1, keepdims=True), rtol=1e-6)


def test_the_row_of_an_epoch():
    made = parts()
    samples = epoch.assign(made, CONFIG, None, rollout())
    metrics = [{"loss": np.float32(1), "ratio_deviation": np.float32(0.25)}, {"loss": 2.0, "ratio_deviation": 0.75}]
    row = epoch.report(made, rollout(), samples, epoch.Updates(metrics, replayed=3, pairs=5))
    assert np.isnan(row.pop("reward/nothing"))
    assert row == {
        "train/loss": 1.5,
        "train/ratio_deviation": 0.5,
        "train/ratio_first_update_deviation": 0.25,
        "reward/mean": 4.0,
        "reward/std": pytest.approx(np.sqrt((9 + 4 + 1 + 36) / 4)),
        "reward/min": 1.0,
        "reward/max": 10.0,
        "reward/kb": 2.0,
        "sample/distinct_prompts": 2,
        "train/advantage_abs": 1.25,
        "compute/denoiser_calls": 4 * 4 + 3 * 5,  # of the rollout, and forward and backward of the trained pairs
        "replay/samples": 3,
        "replay/bytes": 17,
        "time/rollout_s": 3.0,
        "time/reward_s": 2.0,
    }
    # log-probs computed again; the terms of a coupled loss and those of the pretrained model take a pass each
    made.traits = dataclasses.replace(made.traits, separable=False, terms=frozenset({"log_prob", "ref_log_prob"}))
    more = epoch.report(made, rollout(), samples, epoch.Updates(metrics, replayed=3, pairs=5, recomputed=12))
    assert more["compute/denoiser_calls"] == 4 * 4 + 12 + 5 * 5
    nothing = epoch.report(
        made, rollout(), samples, epoch.Updates([], replayed=0, pairs=0)
    )  # the algorithm kept no sample
    assert not {"train/loss", "train/ratio_first_update_deviation"} & nothing.keys()
