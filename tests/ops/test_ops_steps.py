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
    got = steps.uniform_subset(np.random.default_rng(0), n, TRAINED, 2)
    assert got.shape == (n, 2) and got.dtype == np.int32
    assert (got[:, 0] != got[:, 1]).all()
    # Any of the 6 ordered pairs with probability 1/6: mean 1000, deviation sqrt(n 1/6 5/6) = 29; five of them is 145.
    pairs, counts = np.unique(got, axis=0, return_counts=True)
    np.testing.assert_array_equal(pairs, [[0, 2], [0, 3], [2, 0], [2, 3], [3, 0], [3, 2]])
    assert (abs(counts - 1000) < 145).all(), counts


def test_uniform_subset_of_all_steps_is_a_permutation():
    got = steps.uniform_subset(np.random.default_rng(0), 50, TRAINED, 3)
    np.testing.assert_array_equal(np.sort(got, axis=1), [[0, 2, 3]] * 50)
    assert len(np.unique(got, axis=0)) == 6  # each sample has its own order


def test_importance_subset_by_hand():
    # Cumulative shares of (1, 0, 3, 4) / 8: 0.125, 0.125, 0.5, 1. Two draws at (0 + u) / 2 and (1 + u) / 2.
    weights = np.tile([1.0, 0, 3, 4], (3, 1))
    got = steps.importance_subset(Offsets([0.1, 0.3, 0.999]), weights, 2)
    np.testing.assert_array_equal(got, [[0, 3], [2, 3], [2, 3]])
    assert got.dtype == np.int32


@pytest.mark.parametrize("weights", [[1, 0, 3, 4], [5, 1, 1, 1], [0, 0, 0, 8], [2, 2, 2, 2]])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_importance_subset_is_unbiased_exactly(weights, count):
    """The expectation over the one random number of a sample, summed over all its values without error.

    The chosen steps change with the offset u in [0, 1) only where count * (a cumulative share) - u is whole. With
    shares in eighths those places are multiples of 1/8: the mean over the midpoints of eight intervals is the integral.
    """
    eighths = [Fraction(2 * i + 1, 16) for i in range(8)]
    drawn = steps.importance_subset(Offsets([float(u) for u in eighths]), np.tile(np.float64(weights), (8, 1)), count)
    expected = [Fraction(int((drawn == t).sum()), 8) for t in range(4)]  # number of draws of each step
    assert expected == [Fraction(count * w, 8) for w in weights]
    # Hence the plain mean over the draws of any g is the weighted mean over all steps, here with w of mean 1:
    g = [Fraction(3), Fraction(-7), Fraction(1, 2), Fraction(11)]
    estimate = sum(sum(g[t] for t in row) / count for row in drawn.tolist()) / 8
    assert estimate == sum(Fraction(w, 2) * value for w, value in zip(weights, g, strict=True)) / 4


def test_importance_subset_with_a_real_generator():
    """Independent samples: frequencies within five standard deviations, and less variance than independent draws."""
    n, count, weights = 8000, 3, np.array([0.2, 0.0, 1.3, 2.5])
    got = steps.importance_subset(np.random.default_rng(1), np.tile(weights, (n, 1)), count)
    share = weights / weights.sum()
    draws = np.stack([(got == t).sum(axis=1) for t in range(4)], axis=1)
    deviation = np.sqrt(count * share * (1 - share) / n)  # of independent draws; systematic ones have less
    assert (abs(draws.mean(axis=0) - count * share) <= 5 * deviation).all()
    assert (draws.var(axis=0)[[0, 2, 3]] < (count * share * (1 - share))[[0, 2, 3]]).all()
    assert (draws.max(axis=0) <= np.ceil(count * share)).all()


def test_importance_subset_never_picks_a_step_of_weight_zero():
    """Not even where the shares' rounded sum leaves a gap below 1 that the last point falls into."""
    weights = np.tile(np.float32([0.1] * 10 + [0.0]), (2, 1))
    got = steps.importance_subset(Offsets([np.nextafter(1, 0), 0.0]), weights, 7)
    assert got.max() == 9
