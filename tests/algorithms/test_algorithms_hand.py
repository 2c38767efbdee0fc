"""Losses and advantages of every algorithm on a few numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ddpo_jax.find import find
from ddpo_jax.ops.advantages import PromptStats
from ddpo_jax.types import Batch, StepTerms

REWARDS, IDS = np.array([1.0, 2.0, 6.0, 10.0, 20.0]), np.array([7, 7, 7, 3, 3])


def advantages(name, rewards=REWARDS, ids=IDS, stats=None, **options):
    module = find("algorithms", name)
    config = module.default_config()
    config.update(options)
    return module.advantages(rewards, ids, stats or PromptStats(), config)


def loss(name, terms, batch, **options):
    module = find("algorithms", name)
    config = module.default_config()
    config.update(options)
    terms = StepTerms(**{k: jnp.asarray(v) for k, v in terms.items()})
    parts = [getattr(module, part) for part in ("loss", "penalty") if hasattr(module, part)]
    return np.asarray(sum(part(terms, batch, config) for part in parts))


def make_batch(old=((0.0, 0.0), (0.0, 0.0)), adv=(1.0, -2.0), rewards=(3.0, 1.0), mask=None, **fields):
    old = jnp.asarray(old)
    mask = jnp.ones(old.shape) if mask is None else jnp.asarray(mask)
    ids = jnp.zeros(len(old), jnp.int32)
    fields = {"clip_range": 0.1, "num_dims": 1} | fields
    return Batch(old, jnp.asarray(adv), jnp.asarray(rewards), ids, mask, **fields)


# two samples, two steps; ratios 1.05 1.5 / 1.05 0.5 to a policy whose log-probs are 0
LOG_PROB = np.log([[1.05, 1.5], [1.05, 0.5]])


@pytest.mark.parametrize("name", ["ddpo", "loop", "grpo", "b2_diffurl"])
def test_clipped_surrogate(name):
    # A = 1: max(-1.05, -1.05), max(-1.5, -1.1); A = -2: max(2.1, 2.1), max(1, 1.8)
    want = [[-1.05, -1.1], [2.1, 1.8]]
    np.testing.assert_allclose(loss(name, {"log_prob": LOG_PROB}, make_batch()), want, rtol=1e-6)


def test_ddpo_trajectory_ratio():
    # weights 1.05 * 1.5 = 1.575 -> clipped 1.1; 1.05 * 0.5 = 0.525 -> max(2 * 0.525, 2 * 0.9) = 1.8
    # mean of the entries = (-1.1 + 1.8) / 4 pairs
    out = loss("ddpo", {"log_prob": LOG_PROB}, make_batch(), ratio_level="trajectory")
    np.testing.assert_allclose(out.mean(), 0.7 / 4, rtol=1e-6)
    # without the second pair of the second sample: weight 1.05, so (-1.1 + 2.1) / 3 pairs
    out = loss("ddpo", {"log_prob": LOG_PROB}, make_batch(mask=[[1, 1], [1, 0.0]]), ratio_level="trajectory")
    np.testing.assert_allclose(out.mean(), 1.0 / 3, rtol=1e-6)


@pytest.mark.parametrize("name", ["ddpo_sf", "reinforce", "reinforce_bc", "rloo"])
def test_score_function(name):
    out = loss(name, {"log_prob": [[0.5, -1.0], [2.0, 3.0]]}, make_batch())
    np.testing.assert_allclose(out, [[-0.5, 1.0], [4.0, 6.0]])


def test_ddpo_iskl_penalty():
    terms = {"log_prob": LOG_PROB, "ref_log_prob": LOG_PROB - np.array([[0.1, 0.2], [0.0, -0.4]])}
    # surrogates sum to -2.15 and 3.9; drifts 0.3 and -0.4: 0.5 * 2 * (0.09 + 0.16) = 0.25; over 4 pairs
    np.testing.assert_allclose(loss("ddpo_iskl", terms, make_batch(), kl_coef=2.0).mean(), (1.75 + 0.25) / 4, rtol=1e-5)
    # of the sum over 10 dimensions the drift is 10 times, the penalty 100 times as large
    out = loss("ddpo_iskl", terms, make_batch(num_dims=10), kl_coef=2.0, log_prob_reduction="sum")
    np.testing.assert_allclose(out.mean(), (1.75 + 25) / 4, rtol=1e-5)
    # trajectory level: -1.1 + 1.8 as above
    out = loss("ddpo_iskl", terms, make_batch(), kl_coef=2.0, ratio_level="trajectory")
    np.testing.assert_allclose(out.mean(), (0.7 + 0.25) / 4, rtol=1e-5)


def test_ddpo_iskl_penalty_with_clip_and_baseline():
    """Gradients of the penalty alone; the clip range is 0.1, so the ratios 1.5 and 0.5 are outside."""
    ref = jnp.asarray(LOG_PROB - np.array([[0.1, 0.2], [0.0, -0.4]]), jnp.float32)

    def gradient(ref=ref, **options):
        module = find("algorithms", "ddpo_iskl")
        config = module.default_config()
        config.update({"kl_coef": 8.0} | options)  # 4 pairs, so 2 for the sum

        def cost(log_prob):
            return module.penalty(StepTerms(log_prob=log_prob, ref_log_prob=ref), make_batch(), config).mean()

        return jax.grad(cost)(jnp.asarray(LOG_PROB, jnp.float32))

    outside = np.abs(np.exp(LOG_PROB) - 1) > 0.1
    np.testing.assert_allclose(gradient(), [[0.6, 0.6], [-0.8, -0.8]], rtol=1e-5)  # drifts 0.3, -0.4
    clipped = np.where(outside, 0, [[0.6, 0.6], [-0.8, -0.8]])
    assert 0 < outside.sum() < 4
    np.testing.assert_allclose(gradient(penalty_clip=True), clipped, rtol=1e-5)
    # their mean is -0.05, so 0.35 and -0.35; what both drift alike is of no consequence
    for shift in (0.0, 7.0):
        got = gradient(ref - shift, penalty_baseline=True)
        np.testing.assert_allclose(got, [[0.7, 0.7], [-0.7, -0.7]], rtol=1e-4)


def test_dpok():
    value = [[2.0, 2.5], [3.0, 1.0]]  # r - V: 1, 0.5; -2, 0
    terms = {"log_prob": LOG_PROB, "value": value, "kl": [[0.1, 0.2], [0.3, 0.4]]}
    # -1.05, -0.5 * 1.1; 2.1, 0; times 10; plus 0.5 * kl
    want = [[-10.5 + 0.05, -5.5 + 0.1], [21 + 0.15, 0.2]]
    np.testing.assert_allclose(loss("dpok", terms, make_batch(), kl_coef=0.5), want, rtol=1e-6)
    # the penalty is a part of its own, which timestep weights leave alone
    penalty = find("algorithms", "dpok").penalty(
        StepTerms(kl=jnp.asarray([[0.1, 0.2]])), None, ConfigDict({"kl_form": "gaussian", "kl_coef": 0.5})
    )
    np.testing.assert_allclose(penalty, [[0.05, 0.1]], rtol=1e-6)
    # clamp differs where the ratio is below the range and A < 0: r 0.5 counts as 0.9, whatever the sign
    terms = {"log_prob": LOG_PROB, "value": [[2.0, 4.0], [3.0, 3.0]], "noise_mse": [[0.1, 0.2], [0.3, 0.4]]}
    out = loss("dpok", terms, make_batch(), kl_coef=0.5, kl_form="noise_mse", surrogate="clamp", reward_weight=1.0)
    np.testing.assert_allclose(out, [[-1.05 + 0.05, 1.1 + 0.1], [2.1 + 0.15, 1.8 + 0.2]], rtol=1e-6)
    # the clip instead counts 1.5 where A = -1
    out = loss("dpok", terms | {"kl": terms["noise_mse"]}, make_batch(), kl_coef=0.5, reward_weight=1.0)
    np.testing.assert_allclose(out[0, 1], 1.5 + 0.1, rtol=1e-6)


def test_prdp():
    # rhat by step: 0.3 0.1 | -0.2 0.4; sums 0.4, 0.2. Rewards 1 off the mean, beta 10: target 0.2. Zero loss.
    terms = {"log_prob": [[0.3, 0.1], [-0.2, 0.4]], "ref_log_prob": np.zeros((2, 2))}

    def mean_loss(old, num_dims=1, **options):
        batch = make_batch(old, adv=(1.0, -1.0), num_dims=num_dims)
        return loss("prdp", terms, batch, **({"kl_coef": 10.0} | options)).mean()

    old = np.array([[0.3, 0.1], [-0.2, 0.4]])
    np.testing.assert_allclose(mean_loss(old), 0, atol=1e-12)
    # beta 1: (0.2 - 2)^2; one pair
    np.testing.assert_allclose(mean_loss(old, kl_coef=1.0), 3.24, rtol=1e-6)
    # rhat_old 0.3 0.1 | 0 0.2, epsilon 0.1: the second is clipped to -0.1 + 0.3 = 0.2. The same sum, the same loss.
    # rhat_old 0.3 0.1 | 0 0.4: clipped to -0.1 + 0.4 = 0.3: difference 0.1 misses 0.2 by 0.1
    np.testing.assert_allclose(mean_loss([[0.3, 0.1], [0.0, 0.2]]), 0, atol=1e-12)
    np.testing.assert_allclose(mean_loss([[0.3, 0.1], [0.0, 0.4]]), 0.01, rtol=1e-5)
    np.testing.assert_allclose(mean_loss([[0.3, 0.1], [0.0, 0.4]], proximal=False), 0, atol=1e-12)
    # the number of dimensions does not matter to means
    np.testing.assert_allclose(mean_loss([[0.3, 0.1], [0.0, 0.4]], num_dims=5), 0.01, rtol=1e-5)
    # with 5 dimensions the sums are 2 and 1, the difference misses 0.2 by 0.8; epsilon 0.5 against 5 * 0.2 = 1 moved:
    # clipped rhat_b = 5 * (0 - 0.1) + 5 * 0.4 = 1.5, difference 0.5, misses by 0.3: the larger is 0.64
    summed = mean_loss([[0.3, 0.1], [0.0, 0.4]], num_dims=5, log_prob_reduction="sum")
    np.testing.assert_allclose(summed, 0.64, rtol=1e-5)


def test_prdp_targets_are_in_units_of_the_reward():
    # off the prompts' means: -2 -1 3 | -5 5; the squares add up to 64, their mean over five is 12.8
    units = np.array([-2, -1, 3, -5, 5]) / np.sqrt(12.8)
    np.testing.assert_allclose(advantages("prdp"), units, rtol=1e-6)
    np.testing.assert_allclose(advantages("prdp", reward_unit="reward"), units * np.sqrt(12.8), rtol=1e-12)
    np.testing.assert_allclose(advantages("prdp", 1000 * REWARDS - 7), units, rtol=1e-6)  # of any scale


def test_d3po():
    # first sample preferred. log q: step 0: log 1.05 - log 1.05 = 0; step 1: log 1.1 (clipped) - log 0.9 (clipped)
    terms = {"log_prob": LOG_PROB, "ref_log_prob": np.zeros((2, 2))}
    z = 0.1 * (np.log(1.1) - np.log(0.9))
    want = (np.log(2) + np.log(1 + np.exp(-z))) / 2
    np.testing.assert_allclose(loss("d3po", terms, make_batch()).mean(), want, rtol=1e-6)
    # the other preferred: the sign turns; a tie: log 2
    want = (np.log(2) + np.log(1 + np.exp(z))) / 2
    np.testing.assert_allclose(loss("d3po", terms, make_batch(rewards=(1.0, 3.0))).mean(), want, rtol=1e-6)
    np.testing.assert_allclose(loss("d3po", terms, make_batch(rewards=(1.0, 1.0))).mean(), np.log(2), rtol=1e-6)


@pytest.mark.parametrize("name", ["rwr", "rwr_sparse"])
def test_weighted_regression(name):
    out = loss(name, {"denoise_mse": [[1.0, 2.0], [3.0, 0.5]]}, make_batch(adv=(0.5, 0.0)))
    np.testing.assert_allclose(out, [[0.5, 1.0], [0.0, 0.0]])


def test_advantages():
    np.testing.assert_allclose(advantages("reinforce"), REWARDS)
    for name in ("rloo", "loop"):  # reward minus the mean of the others
        np.testing.assert_allclose(advantages(name), [-3, -1.5, 4.5, -10, 10])
    std = np.sqrt(14 / 3)
    np.testing.assert_allclose(advantages("grpo"), [-2 / std, -1 / std, 3 / std, -1, 1], rtol=1e-5)
    np.testing.assert_allclose(advantages("d3po"), [-2, -1, 3, -5, 5])
    np.testing.assert_allclose(advantages("dpok"), REWARDS - 7.8)


@pytest.mark.parametrize("name", ["ddpo", "ddpo_sf", "ddpo_iskl"])
def test_per_prompt_advantages(name):
    # min_count 3: prompt 7 by itself, prompt 3 by the batch: mean 7.8, variance 541 / 5 - 60.84 = 47.36
    std = np.sqrt(14 / 3)
    want = [-2 / std, -1 / std, 3 / std, 2.2 / np.sqrt(47.36), 12.2 / np.sqrt(47.36)]
    np.testing.assert_allclose(advantages(name, min_count=3), want, rtol=1e-5)
    # memory: after 0 and 6 the buffer of prompt 1 holds 0 6 3, mean 3, variance 6; a size of 2 leaves 6 3
    for size, (mean, std) in {3: (3, np.sqrt(6)), 2: (4.5, 1.5)}.items():
        stats = PromptStats()
        for rewards in ([0.0], [6.0], [3.0]):
            got = advantages(name, np.array(rewards), np.array([1]), stats, buffer_size=size, min_count=2)
        np.testing.assert_allclose(got, [(3 - mean) / std], rtol=1e-5)


def test_reinforce_bc_advantages():
    np.testing.assert_allclose(advantages("reinforce_bc", min_count=3), [-2, -1, 3, 2.2, 12.2])


def test_rwr_weights():
    rewards, ids = np.log([1.0, 3.0, 1.0, 1.0]), np.array([0, 0, 1, 1])
    # temperature 2 squares: 1 9 1 1, sum 12, times 4; by prompt: (1, 9) / 10 * 2, (1, 1)
    raw = {"temperature": 2.0, "reward_unit": "reward"}
    np.testing.assert_allclose(advantages("rwr", rewards, ids, **raw), np.array([1, 9, 1, 1]) / 3)
    got = advantages("rwr", rewards, ids, **raw, softmax_over="prompt")
    np.testing.assert_allclose(got, [0.2, 1.8, 1, 1])


def test_rwr_weights_in_deviations():
    # deviation of 0 4 2 2 is sqrt(2): exponents 0, 2 sqrt(2), sqrt(2), sqrt(2)
    rewards, ids = np.array([0.0, 4.0, 2.0, 2.0]), np.array([5, 5, 9, 9])
    powers = np.exp(np.sqrt(2) * np.array([0, 2, 1, 1]))
    np.testing.assert_allclose(advantages("rwr", rewards, ids), 4 * powers / powers.sum(), rtol=1e-5)
    # within prompts the samples are 2, 2, 0, 0 off their means: the deviation is sqrt(2) for both prompts
    powers = np.exp(1.5 / np.sqrt(2) * np.array([0, 4]))
    got = advantages("rwr", rewards, ids, softmax_over="prompt", temperature=1.5)
    np.testing.assert_allclose(got, [*(2 * powers / powers.sum()), 1, 1], rtol=1e-5)
    # of no consequence: the scale and the zero of the reward, and rewards that are all equal
    for options in ({}, {"softmax_over": "prompt"}):
        moved = advantages("rwr", 1000 * rewards - 7, ids, **options)
        np.testing.assert_allclose(moved, advantages("rwr", rewards, ids, **options), rtol=1e-5)
        np.testing.assert_array_equal(advantages("rwr", np.full(4, 0.3), ids, **options), 1)


def test_rwr_sparse_weights():
    rewards, ids = np.array([5.0, 1.0, 4.0, 2.0, 3.0]), np.zeros(5, int)
    # the 75th percentile of five is the fourth; between two rewards the higher one; the threshold itself is kept
    np.testing.assert_array_equal(advantages("rwr_sparse", rewards, ids, threshold=75.0), [1, 0, 1, 0, 0])
    np.testing.assert_array_equal(advantages("rwr_sparse", rewards, ids, threshold=80.0), [1, 0, 0, 0, 0])
    got = advantages("rwr_sparse", rewards, ids, threshold_by="constant", threshold=3.0)
    np.testing.assert_array_equal(got, [1, 0, 1, 0, 1])


def test_b2_diffurl_advantages_use_this_stage_and_the_last_ones():
    stats = PromptStats()
    for rewards in ([100.0, 100.0], [1.0, 3.0], [4.0, 8.0]):
        got = advantages("b2_diffurl", np.array(rewards), np.array([0, 0]), stats, history=1)
    # 1 3 4 8: mean 4, variance (9 + 1 + 0 + 16) / 4; the first stage is forgotten
    np.testing.assert_allclose(got, [0, 4 / np.sqrt(6.5)], rtol=1e-5)


def test_b2_diffurl_interval():
    module = find("algorithms", "b2_diffurl")
    config = module.default_config()
    lengths = [module.interval(i, 100, 20, config) for i in range(100)]
    assert lengths == [14 + (7 * i) // 100 for i in range(100)]  # Hu et al. 2025: s0 + floor((T - s0 + 1) i / 100)
    assert (lengths[0], lengths[14], lengths[15], lengths[85], lengths[86], lengths[99]) == (14, 14, 15, 19, 20, 20)
    assert [module.interval(i, 4, 10, config) for i in range(4)] == [7, 8, 9, 10]
    assert module.interval(7, 4, 10, config) == 10  # a run continued beyond its stages trains all steps


def test_b2_diffurl_select():
    module = find("algorithms", "b2_diffurl")
    config = module.default_config()
    scores = np.array([0.9, 0.6, -0.7, -0.9, 0.4, -0.5, -0.6, -2.0, 0.5, -0.4])
    roots = np.array([1, 1, 1, 1, 8, 8, 2, 2, 5, 5])
    # root 1: best 0.9, worst -0.9. Root 8: 0.4 is not good, -0.5 is not below -0.5. Root 2: only the worst.
    # Root 5: 0.5 reaches the threshold
    want = [1, 0, 0, 1, 0, 0, 0, 1, 1, 0]
    np.testing.assert_array_equal(module.select(scores, roots, config), np.array(want, bool))


def test_prdp_doubts_a_clip_offline():
    """It holds the policy at the pretrained model, which sampled: possible, and said."""
    module = find("algorithms", "prdp")
    config = module.default_config()
    assert module.traits(config).doubts == ()
    config.refresh_every = 0
    (doubt,) = module.traits(config).doubts
    assert doubt.startswith("algorithm.proximal: received True; offline")
    config.proximal = False
    assert module.traits(config).doubts == () and module.traits(config).refresh_every == 0
