"""Advantage estimators against numbers worked out by hand."""

import numpy as np
import pytest

from ddpo_jax.ops import advantages as adv

REWARDS = np.array([1.0, 2.0, 6.0, 10.0, 20.0])
IDS = np.array([7, 7, 7, 3, 3])  # prompt 7: 1 2 6, mean 3; prompt 3: 10 20, mean 15


def test_zscore():
    # mean 4, deviations -3 -1 0 0 4, variance 26 / 5 = 5.2
    rewards = np.array([1.0, 3.0, 4.0, 4.0, 8.0])
    np.testing.assert_allclose(adv.zscore(rewards, eps=0), np.array([-3, -1, 0, 0, 4]) / np.sqrt(5.2), rtol=1e-14)
    # eps is added to the standard deviation: [0, 2] has mean 1 and std 1
    np.testing.assert_allclose(adv.zscore(np.array([0.0, 2.0]), eps=1.0), [-0.5, 0.5])
    np.testing.assert_array_equal(adv.zscore(np.full(4, 3.0)), np.zeros(4))  # not NaN


def test_group_mean_and_zscore():
    np.testing.assert_allclose(adv.group_mean_baseline(REWARDS, IDS), [-2, -1, 3, -5, 5])
    # prompt 7: variance (4 + 1 + 9) / 3 = 14 / 3; prompt 3: std 5
    std = np.sqrt(14 / 3)
    np.testing.assert_allclose(adv.group_zscore(REWARDS, IDS, eps=0), [-2 / std, -1 / std, 3 / std, -1, 1])
    # a group of equal rewards gives 0
    np.testing.assert_array_equal(adv.group_zscore(np.array([4.0, 4.0]), np.array([1, 1])), [0, 0])


def test_decoupled_rewards_add_up_whatever_their_scale():
    # prompt 7: r = 1 2 6 and -r; prompt 3: 10 20, and in thousands 5 1; z-scores of the first as above
    std = np.sqrt(14 / 3)
    first = np.array([-2 / std, -1 / std, 3 / std, -1, 1])
    second = np.array([2 / std, 1 / std, -3 / std, 1, -1])
    scores = {"a": REWARDS, "b": np.array([-1.0, -2.0, -6.0, 5000.0, 1000.0])}
    found = adv.decoupled(scores, {"a": 3.0, "b": 0.5}, IDS)
    np.testing.assert_allclose(found, 3 * first + 0.5 * second, rtol=2e-6)  # eps is 1e-6 of a deviation of 1
    scaled = {"a": 1e3 * REWARDS + np.where(IDS == 7, 9e3, -4e5), "b": scores["b"]}
    np.testing.assert_allclose(adv.decoupled(scaled, {"a": 3.0, "b": 0.5}, IDS), found, rtol=2e-6)
    # a reward that is the same for all images of a prompt has no say there
    same = {"a": np.array([1.0, 2.0, 6.0, 7.0, 7.0]), "b": np.full(5, 8.0)}
    np.testing.assert_allclose(adv.decoupled(same, {"a": 1.0, "b": 5.0}, IDS), [*first[:3], 0, 0], rtol=2e-6)


def test_deviation():
    np.testing.assert_allclose(adv.deviation(REWARDS), np.sqrt(47.36))  # mean 7.8: (1 + 4 + 36 + 100 + 400) / 5 - 60.84
    np.testing.assert_allclose(adv.deviation(REWARDS, IDS), np.sqrt(12.8))  # (4 + 1 + 9 + 25 + 25) / 5


def test_leave_one_out():
    # 1 - (2 + 6) / 2 = -3; 2 - (1 + 6) / 2 = -1.5; 6 - (1 + 2) / 2 = 4.5; 10 - 20; 20 - 10
    np.testing.assert_allclose(adv.leave_one_out(REWARDS, IDS), [-3, -1.5, 4.5, -10, 10])
    with pytest.raises(ValueError, match=r"prompts.samples_per_prompt: received 1 sample of prompt id 3"):
        adv.leave_one_out(REWARDS[:4], IDS[:4])


def test_softmax_weights():
    # exp of log 1, log 3: 1 / 4 and 3 / 4, times 2
    np.testing.assert_allclose(adv.softmax_weights(np.log([1.0, 3.0])), [0.5, 1.5])
    # two prompts, each normalised on its own: (1, 3) / 4 * 2 and (2, 2, 4) / 8 * 3; order mixed
    logits = np.log([2.0, 1.0, 2.0, 3.0, 4.0])
    ids = np.array([9, 5, 9, 5, 9])
    np.testing.assert_allclose(adv.softmax_weights(logits, ids), [0.75, 0.5, 0.75, 1.5, 1.5])
    # far beyond the range of exp, either way
    np.testing.assert_allclose(adv.softmax_weights(np.array([-1e5, -1e5 + np.log(3.0)])), [0.5, 1.5])
    np.testing.assert_allclose(adv.softmax_weights(np.array([1e5, 0.0])), [2.0, 0.0])


def test_prompt_stats_takes_rewards_first_and_falls_back_to_the_batch():
    stats = adv.PromptStats()
    stats.update(np.array([1.0, 3.0, 8.0]), np.array([1, 1, 2]), buffer_size=3)
    # prompt 1 has 2 >= min_count rewards: mean 2, std 1. Prompt 2 has 1: batch mean 4, std sqrt((9 + 1 + 16) / 3)
    got = stats.zscore(np.array([1.0, 3.0, 8.0]), np.array([1, 1, 2]), min_count=2, eps=0)
    np.testing.assert_allclose(got, [-1, 1, 4 / np.sqrt(26 / 3)])
    # next batch: prompt 1 holds 1 3 5 (mean 3, variance 8 / 3); prompt 2 holds 8 10 (mean 9, std 1)
    stats.update(np.array([5.0, 10.0]), np.array([1, 2]), buffer_size=3)
    got = stats.zscore(np.array([5.0, 10.0]), np.array([1, 2]), min_count=2, eps=0)
    np.testing.assert_allclose(got, [2 / np.sqrt(8 / 3), 1.0])
    # the ring drops the oldest: 3 5 13, mean 7
    stats.update(np.array([13.0]), np.array([1]), buffer_size=3)
    mean, std, count = stats.statistics(np.array([13.0]), np.array([1]), min_count=2)
    np.testing.assert_allclose([mean[0], std[0] ** 2, count[0]], [7, (16 + 4 + 36) / 3, 3])


def test_prompt_stats_forgets_by_update():
    stats = adv.PromptStats()
    for reward in (1.0, 2.0, 4.0):  # with a history of 2 the third update leaves 2 and 4
        stats.update(np.array([reward]), np.array([0]), history=2)
    assert stats.statistics(np.zeros(1), np.array([0]), min_count=1)[0] == 3.0
    # a prompt that was away for two updates keeps only its new reward
    stats.update(np.array([0.0]), np.array([5]), history=2)
    stats.update(np.array([0.0]), np.array([5]), history=2)
    stats.update(np.array([9.0]), np.array([0]), history=2)
    assert stats.statistics(np.zeros(1), np.array([0]), min_count=1)[0] == 9.0


def test_prompt_stats_refuses_rewards_that_are_not_finite():
    with pytest.raises(ValueError, match="1 of 2 rewards are not finite"):
        adv.PromptStats().update(np.array([1.0, np.nan]), np.array([0, 0]), buffer_size=4)


@pytest.mark.parametrize("updates", [0, 1, 7])
def test_prompt_stats_state_round_trip(updates):
    rng = np.random.default_rng(0)
    first, second = adv.PromptStats(), adv.PromptStats()
    batches = [(rng.normal(size=6), rng.integers(2**40, 2**40 + 3, 6)) for _ in range(updates + 3)]
    for rewards, ids in batches[:updates]:
        first.update(rewards, ids, buffer_size=5, history=4)
    second.update(np.ones(2), np.zeros(2, int))  # replaced by what is loaded
    second.load_state_dict(first.state_dict())
    for rewards, ids in batches[updates:]:  # both go on alike
        for stats in (first, second):
            stats.update(rewards, ids, buffer_size=5, history=4)
        np.testing.assert_array_equal(first.zscore(rewards, ids, min_count=3), second.zscore(rewards, ids, min_count=3))
    for key, value in first.state_dict().items():
        np.testing.assert_array_equal(value, second.state_dict()[key], strict=True)
