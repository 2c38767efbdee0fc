"""Which steps are trained: normalised weights, uniform subsets, and importance-sampled steps, shown to be unbiased."""

from fractions import Fraction

import numpy as np
import pytest

from ddpo_jax.ops import steps

TRAINED = np.array([True, False, True, True])


class Offsets:
    """Stands in for a generator whose only numbers are the offsets given."""

    def __init__(self, values):
        self._values = np.asarray(values, np.float64)

    def random(self, shape):
        return self._values.reshape(shape)


def test_normalise_by_hand():
    got = steps.normalise(np.array([[1.0, 50.0, 2.0, 3.0], [0.0, 1.0, 0.0, 4.0]]), TRAINED)
    np.testing.assert_allclose(got, [[0.5, 0, 1, 1.5], [0, 0, 0, 3]], rtol=1e-7)
    assert got.dtype == np.float32


def test_normalise_ignores_what_is_not_trained_even_if_it_is_not_a_number():
    got = steps.normalise(np.array([[1.0, np.nan, 1.0, 1.0]]), TRAINED)
    np.testing.assert_array_equal(got, [[1, 0, 1, 1]])


@pytest.mark.parametrize("row", [[0, 5, 0, 0], [1, 1, -1, 1], [1, 1, np.inf, 1], [np.nan, 1, 1, 1]])
def test_normalise_refuses(row):
    with pytest.raises(ValueError, match="weighting: received weights that are"):
        steps.normalise(np.array([[1.0, 1, 1, 1], row]), TRAINED)


def test_uniform_subset_has_no_repeats_and_draws_every_step_equally_often():
    n = 6000
    got = steps.uniform_subset(np.random.default_rng(0), np.ones((n, 4), bool), TRAINED, 2)
    assert got.shape == (n, 2) and got.dtype == np.int32
    assert (got[:, 0] != got[:, 1]).all()
    # Any of the 6 ordered pairs with probability 1/6: mean 1000, deviation sqrt(n 1/6 5/6) = 29; five of them is 145.
    pairs, counts = np.unique(got, axis=0, return_counts=True)
    np.testing.assert_array_equal(pairs, [[0, 2], [0, 3], [2, 0], [2, 3], [3, 0], [3, 2]])
    assert (abs(counts - 1000) < 145).all(), counts


def test_uniform_subset_of_all_steps_is_a_permutation():
    got = steps.uniform_subset(np.random.default_rng(0), np.ones((50, 4), bool), TRAINED, 3)
    np.testing.assert_array_equal(np.sort(got, axis=1), [[0, 2, 3]] * 50)
    assert len(np.unique(got, axis=0)) == 6  # each sample has its own order


ALL = np.ones(4, bool)


def inclusion(weights, trained, count):
    """All trained steps are wanted of every sample."""
    return steps.inclusion(weights, np.ones(weights.shape, bool), trained, count)


def importance_subset(rng, weights, trained, count):
    return steps.importance_subset(rng, weights, np.ones(weights.shape, bool), trained, count)


def test_inclusion_by_hand():
    """Two of four steps. Shares 2 w / sum(w), the excess of a share above 1 going to the others in their proportion."""
    weights = np.array([[1.0, 0, 3, 4], [10, 1, 1, 0], [10, 0, 0, 0], [6, 3, 2, 1]])
    want = [[0.25, 0, 0.75, 1], [1, 0.5, 0.5, 0], [1, 1 / 3, 1 / 3, 1 / 3], [1, 1 / 2, 1 / 3, 1 / 6]]
    np.testing.assert_allclose(inclusion(weights, ALL, 2), want, rtol=1e-15)
    # three of them: in the last row 3 * 6 / 12 and then 2 * 3 / 6 are not below 1, which leaves 1 over (2, 1)
    np.testing.assert_allclose(inclusion(weights[3:], ALL, 3), [[1, 1, 2 / 3, 1 / 3]], rtol=1e-15)
    np.testing.assert_allclose(inclusion(weights[3:], TRAINED, 2), [[1, 0, 2 / 3, 1 / 3]], rtol=1e-15)
    np.testing.assert_array_equal(inclusion(weights, TRAINED, 3), [[1, 0, 1, 1]] * 4)
    # the wanted steps of a sample come first, others fill up
    wanted = np.array([[False, False, True, True]])
    np.testing.assert_allclose(steps.inclusion(weights[3:], wanted, ALL, 1), [[0, 0, 2 / 3, 1 / 3]], rtol=1e-15)
    np.testing.assert_allclose(steps.inclusion(weights[3:], wanted, ALL, 3), [[0.5, 0.5, 1, 1]], rtol=1e-15)


def test_importance_subset_by_hand():
    # Probabilities 0.25, 0, 0.75, 1 end at 0.25, 0.25, 1, 2. Two draws at u and 1 + u.
    weights = np.tile([1.0, 0, 3, 4], (3, 1))
    drawn, correction = importance_subset(Offsets([0.1, 0.3, 0.999]), weights, ALL, 2)
    np.testing.assert_array_equal(drawn, [[0, 3], [2, 3], [2, 3]])
    np.testing.assert_allclose(correction, [[2, 0.5], [2 / 3, 0.5], [2 / 3, 0.5]], rtol=1e-7)  # 2 / (4 probability)
    assert drawn.dtype == np.int32 and correction.dtype == np.float32


@pytest.mark.parametrize("weights", [[1, 0, 3, 4], [5, 1, 1, 1], [0, 0, 0, 8], [2, 2, 2, 2]])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_importance_subset_is_unbiased_exactly(weights, count):
    """The expectation over the one random number of a sample, summed over all its values without error.

    The chosen steps change with the offset u in [0, 1) only at the fractional parts of sums of probabilities, which
    here are multiples of 1/24: the mean over the midpoints of 24 intervals is the integral.
    """
    offsets = [float(Fraction(2 * i + 1, 48)) for i in range(24)]
    rows = np.tile(np.float64(weights), (24, 1))
    drawn, correction = importance_subset(Offsets(offsets), rows, ALL, count)
    assert all(len(set(row)) == count for row in drawn.tolist())  # no step twice
    share = [Fraction(int((drawn == t).sum()), 24) for t in range(4)]
    np.testing.assert_allclose([float(x) for x in share], inclusion(rows[:1], ALL, count)[0], rtol=1e-12)
    assert sum(share) == count
    # Hence the mean over the draws of correction * weight * g is the weighted mean over all steps, for any g:
    weight, g = np.float64(weights) / 2, np.array([3.0, -7, 0.5, 11])  # weights of mean 1
    estimate = (correction * (weight * g)[drawn]).mean(axis=1).mean()
    np.testing.assert_allclose(estimate, (weight * g).mean(), rtol=1e-6)
    if min(weights) > 0:  # and without the weight the plain mean, as a penalty that is not weighted needs it
        np.testing.assert_allclose((correction * g[drawn]).mean(axis=1).mean(), g.mean(), rtol=1e-6)


def variance(weights, count, offsets, repeat):
    """Exact variance of the estimate over a dense grid of offsets, for independent g of variance 1."""
    weights = np.float64(weights) / np.mean(weights)
    rows = np.tile(weights, (len(offsets), 1))
    if repeat:  # systematic sampling with repetition: count points on the cumulative shares of the weights
        points = (np.arange(count) + np.array(offsets)[:, None]) / count
        drawn = (points[:, :, None] >= (np.cumsum(weights) / weights.sum())[None, None, :-1]).sum(axis=2)
        factor = np.ones(drawn.shape)
    else:
        everything = np.ones(len(weights), bool)
        drawn, correction = importance_subset(Offsets(offsets), rows, everything, count)
        factor = correction * weights[drawn]
    coefficients = np.zeros(rows.shape)
    np.add.at(coefficients, (np.arange(len(rows))[:, None], drawn), factor / count)
    np.testing.assert_allclose(coefficients.mean(axis=0), weights / len(weights), atol=1e-3)  # both are unbiased
    return coefficients.var(axis=0).sum()


def test_drawing_without_repetition_has_less_variance():
    """The study that the docstring cites: weights that fall by a third from each of 10 steps to the next."""
    falling, offsets = 1.5 ** -np.arange(10.0), (np.arange(4000) + 0.5) / 4000
    ratio = {n: variance(falling, n, offsets, False) / variance(falling, n, offsets, True) for n in (1, 3, 5, 8, 10)}
    assert ratio[1] == pytest.approx(1, abs=1e-3)  # a single draw cannot repeat
    assert ratio[3] == pytest.approx(0.97, abs=0.01) and ratio[5] == pytest.approx(0.38, abs=0.01)
    assert ratio[8] < 0.05 and ratio[10] < 1e-12
    rng = np.random.default_rng(0)
    for _ in range(20):  # never more, whatever the weights
        weights, n = rng.gamma(0.5, size=10), int(rng.integers(1, 10))
        assert variance(weights, n, offsets, False) <= variance(weights, n, offsets, True) + 1e-4


def test_all_steps_are_taken_once_and_nothing_is_random():
    weights = np.array([[1.0, 50.0, 2.0, 3.0], [0.0, 1.0, 0.0, 4.0]])
    drawn, correction = importance_subset(Offsets([0.2, 0.9]), weights, TRAINED, 3)
    np.testing.assert_array_equal(drawn, [[0, 2, 3]] * 2)
    np.testing.assert_array_equal(correction, 1)


def test_steps_that_a_sample_does_not_want_fill_up_without_weight_in_the_mean():
    """Branching: of 4 steps the second sample trains the last two. Means over the wanted draws estimate both."""
    wanted = np.array([[True] * 4, [False, False, True, True]])
    weights = np.array([[1.0, 1, 1, 1], [0, 0, 1.5, 0.5]])
    drawn, correction = steps.importance_subset(Offsets([0.6, 0.6]), weights, wanted, ALL, 3)
    np.testing.assert_array_equal(drawn, [[0, 2, 3], [1, 2, 3]])  # ends 0.75 1.5 2.25 3 and 0.5 1 2 3
    np.testing.assert_allclose(correction[0], 1)
    np.testing.assert_allclose(correction[1, 1:], 1)  # both wanted steps are there: the mean over them is exact
    drawn, correction = steps.importance_subset(Offsets([0.6, 0.6]), weights, wanted, ALL, 1)
    np.testing.assert_array_equal(drawn, [[2], [2]])
    np.testing.assert_allclose(correction, [[1], [2 / 3]], rtol=1e-7)  # 1 / (2 * 3/4): times the weight 1.5 it is 1


def test_importance_subset_with_a_real_generator():
    n, count, weights = 8000, 2, np.array([0.2, 0.0, 1.3, 2.5])
    drawn, _ = importance_subset(np.random.default_rng(1), np.tile(weights, (n, 1)), ALL, count)
    share = inclusion(weights[None], ALL, count)[0]
    found = np.bincount(drawn.reshape(-1), minlength=4) / n
    assert (abs(found - share) <= 5 * np.sqrt(share * (1 - share) / n)).all()  # five standard deviations


def test_importance_subset_never_picks_a_step_of_weight_zero():
    """Not even where rounded sums leave a gap below the total that the last point falls into."""
    weights = np.tile(np.float32([0.1] * 10 + [0.0]), (2, 1))
    drawn, _ = importance_subset(Offsets([np.nextafter(1, 0), 0.0]), weights, np.ones(11, bool), 7)
    assert drawn.max() == 9
