"""Statistics of few seeds, against numbers worked out by hand and against rliable, the authors' own library."""

import math

import numpy as np
import pytest
from scipy import stats

from ddpo_jax.studies import statistics


def panels(seed, seeds=7, count=3):
    return list(np.random.default_rng(seed).normal(size=(count, seeds)))


def test_interquartile_mean_by_hand():
    """Of 1..8 a quarter, two scores, is cut from each end; of five scores one and a quarter round down to one."""
    assert statistics.interquartile_mean([np.arange(1.0, 9.0)]) == 4.5
    assert statistics.interquartile_mean([np.array([0.0, 100.0]), np.array([1.0, 2.0, 3.0])]) == 2.0


def test_probability_of_improvement_by_hand():
    """2 beats 1, ties with 2, loses to 3; 4 beats all three: 1 + 0.5 + 3 of 6 pairs. The other panel is all wins."""
    ours, theirs = [np.array([2.0, 4.0]), np.array([1.0])], [np.array([1.0, 2.0, 3.0]), np.array([0.0])]
    assert statistics.probability_of_improvement(ours, theirs) == pytest.approx((4.5 / 6 + 1) / 2)


def test_paired_difference_by_hand():
    mean, error = statistics.paired_difference(np.array([3.0, 5.0, 4.0]), np.array([1.0, 1.0, 1.0]))
    assert mean == 3.0 and error == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(statistics.paired_difference(np.array([1.0]), np.array([0.0]))[1])


def test_seeds_needed_by_hand():
    """(1.96 + 0.8416)^2 = 7.849: a difference of one deviation needs 2 x 7.849 = 15.7 seeds; of two, 3.9."""
    assert statistics.seeds_needed(1.0, 1.0) == 16
    assert statistics.seeds_needed(1.0, 2.0) == 4
    assert statistics.seeds_needed(0.001, 1.0) == 2


def test_a_single_seed_has_no_interval():
    estimate = statistics.bootstrap(statistics.interquartile_mean, [np.array([1.0]), np.array([3.0])])
    assert (estimate.value, estimate.interval, str(estimate)) == (2.0, None, "2")


def test_no_interval_where_a_resampled_baseline_gains_nothing():
    """Of three seeds of gains -0.02, 0.1 and 0.12 one resample in 27 holds the first alone, and would turn the sign."""
    ours, theirs = [np.full(3, 0.3)], [np.array([-0.02, 0.10, 0.12])]
    found = statistics.bootstrap(statistics.normalised_gain, ours, theirs)
    assert found.value == pytest.approx(0.3 / 0.2 * 3) and found.interval is None
    assert np.isnan(statistics.normalised_gain(ours, [np.zeros(3)]))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """200 experiments of 20 standard normal seeds: a 95 % interval of the mean misses 0 in 3 to 20 of them
    (the percentile bootstrap is a little narrow: about 93 % at 20 seeds)."""
    rng = np.random.default_rng(0)

    def mean(group):
        return float(np.mean(group[0]))

    missed = 0
    for _ in range(200):
        low, high = statistics.bootstrap(mean, [rng.normal(size=20)], resamples=400).interval
        missed += not low < 0 < high
    assert 3 <= missed <= 30


def test_against_rliable():
    metrics = pytest.importorskip("rliable.metrics", reason="rliable is not installed; launch/test.sh does it")
    ours, theirs = panels(0), panels(1)
    matrix, other = np.stack(ours, axis=1), np.stack(theirs, axis=1)  # runs x tasks
    assert statistics.interquartile_mean(ours) == pytest.approx(metrics.aggregate_iqm(matrix))
    wanted = metrics.probability_of_improvement(matrix, other)
    assert statistics.probability_of_improvement(ours, theirs) == pytest.approx(wanted)


def test_the_interval_against_scipys():
    """Two sets of thousands of resamples agree to a few percent of the interval's width."""
    (scores,) = panels(0, seeds=15, count=1)
    theirs = stats.bootstrap(
        (scores,), lambda x: statistics.interquartile_mean([x]), method="percentile", vectorized=False, rng=0
    ).confidence_interval
    low, high = statistics.bootstrap(statistics.interquartile_mean, [scores], resamples=8000).interval
    width = theirs.high - theirs.low
    assert abs(low - theirs.low) < 0.05 * width and abs(high - theirs.high) < 0.05 * width
