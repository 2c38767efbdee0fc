"""Surrogates, Gaussians and masked sums against hand-worked numbers, SciPy's density and Monte Carlo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ddpo_jax.ops import gaussian, masked, options, surrogate


def test_clipped_surrogate_by_hand():
    # ratios 1.5, 1.5, 0.5, 0.5, 1.05; clip 0.1
    old = jnp.zeros(5)
    log_prob = jnp.log(jnp.array([1.5, 1.5, 0.5, 0.5, 1.05]))
    advantages = jnp.array([2.0, -2.0, 2.0, -2.0, 3.0])
    # max(-3, -2.2) = -2.2; max(3, 2.2) = 3; max(-1, -1.8) = -1; max(1, 1.8) = 1.8; inside: -3.15
    loss, grad = jax.vmap(jax.value_and_grad(surrogate.clipped), (0, 0, 0, None))(log_prob, old, advantages, 0.1)
    np.testing.assert_allclose(loss, [-2.2, 3.0, -1.0, 1.8, -3.15], rtol=1e-6)
    # d(-A r)/d log_prob = -A r where the unclipped side is larger, 0 where the clipped one is
    np.testing.assert_allclose(grad, [0.0, 3.0, -1.0, 0.0, -3.15], rtol=1e-6)
    # the clamp has no gradient on either side outside the range
    loss, grad = jax.vmap(jax.value_and_grad(surrogate.clamped), (0, 0, 0, None))(log_prob, old, advantages, 0.1)
    np.testing.assert_allclose(loss, [-2.2, 2.2, -1.8, 1.8, -3.15], rtol=1e-6)
    np.testing.assert_allclose(grad, [0.0, 0.0, 0.0, 0.0, -3.15], rtol=1e-6)


def test_at_ratio_one_all_surrogates_have_the_score_function_gradient():
    log_prob, advantages = jnp.array([-1.3, 0.4]), jnp.array([2.0, -0.5])
    for function in (surrogate.clipped, surrogate.clamped):
        grad = jax.grad(lambda x, f=function: f(x, log_prob, advantages, 1e-4).sum())(log_prob)
        np.testing.assert_allclose(grad, [-2.0, 0.5])
    np.testing.assert_allclose(surrogate.score_function(log_prob, advantages), [2.6, 0.2], rtol=1e-6)
    assert surrogate.ratio(log_prob, log_prob).tolist() == [1.0, 1.0]  # exactly


def test_gaussian_log_prob_is_scipys_mean_over_dimensions():
    rng = np.random.default_rng(1)
    value, mean, std = rng.normal(size=(4, 2, 2, 3)), rng.normal(size=(4, 2, 2, 3)), rng.uniform(0.1, 2, size=4)
    with jax.enable_x64(True):
        got = gaussian.log_prob(jnp.asarray(value), jnp.asarray(mean), jnp.asarray(std))
        assert got.dtype == jnp.float64
    want = stats.norm.logpdf(value, mean, std[:, None, None, None]).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(got, want, rtol=1e-12)
    # by hand: z = 2, std = 0.5: -2 - log 0.5 - 0.5 log 2 pi
    one = gaussian.log_prob(jnp.full((1, 1), 1.0), jnp.zeros((1, 1)), 0.5, event_dims=1)
    np.testing.assert_allclose(one, [-2 + np.log(2) - 0.9189385], rtol=1e-6)


def test_gaussian_log_prob_has_no_gradient_through_the_sample():
    grad = jax.grad(lambda m: gaussian.log_prob(m + 1.0, m, 1.0, event_dims=1).sum())(jnp.zeros((1, 2)))
    np.testing.assert_allclose(grad, [[0.5, 0.5]])  # (value - mean) / std^2 / 2 dims; 0 if the sample moved along


def test_gaussian_kl_by_hand_and_by_monte_carlo():
    mean, ref_mean = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0]])
    # mean of 1 / (2 * 4) and 4 / (2 * 4)
    closed = gaussian.kl(mean, ref_mean, jnp.array([2.0]), event_dims=1)
    np.testing.assert_allclose(closed, [0.3125])
    rng = np.random.default_rng(2)
    draws = rng.normal(np.asarray(mean[0]), 2.0, size=(400_000, 2))
    log_ratio = (stats.norm.logpdf(draws, mean[0], 2.0) - stats.norm.logpdf(draws, ref_mean[0], 2.0)).mean(axis=1)
    error = log_ratio.std() / np.sqrt(len(draws))
    assert abs(log_ratio.mean() - closed[0]) < 4 * error < 0.004


def test_masked_sums():
    values = jnp.array([[1.0, 2.0, 4.0], [jnp.nan, jnp.inf, 8.0]])
    mask = jnp.array([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(masked.total(values, mask, axis=1), [5.0, 0.0])
    grad = jax.grad(lambda x: jnp.square(masked.total(x, mask)))(values)  # 2 * 5 * mask, no NaN from masked entries
    np.testing.assert_allclose(grad, 10 * mask)


def test_spread_makes_the_plain_mean_a_sum_over_a_count():
    values = jnp.array([3.0, 0.0, 5.0, 0.0])
    np.testing.assert_allclose(masked.spread(values, jnp.array(2.0)).mean(), 4.0)
    np.testing.assert_allclose(masked.spread(jnp.zeros(4), jnp.array(0.0)), np.zeros(4))


def test_prompt_pairs():
    # samples 0, 2, 3 share a prompt; 3 has no trained step; 1 is alone: one pair, (0, 2)
    mask = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    pairs = masked.prompt_pairs(jnp.array([4, 5, 4, 4]), mask)
    want = np.zeros((4, 4))
    want[0, 2] = 1
    np.testing.assert_array_equal(pairs, want)


def test_options_report_every_fault():
    config = {"form": "x", "size": 0, "coef": -1.0, "good": 1}
    with pytest.raises(ValueError) as error:
        options.check(config, choices={"form": ("a", "b")}, positive=("size", "good"), non_negative=("coef",))
    lines = str(error.value).splitlines()
    assert lines[0] == "algorithm.form: received 'x'; it must be one of a, b; use 'a'"
    assert [line.split(";")[0] for line in lines[1:]] == ["algorithm.size: received 0", "algorithm.coef: received -1.0"]
