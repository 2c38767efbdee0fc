"""Minibatches: every sample once, groups together, the right steps with the right weights."""

import numpy as np
import pytest

from ddpo_jax.training import batching
from ddpo_jax.types import ScoredSamples, Traits

T = 4
SEPARABLE = Traits(terms=frozenset({"log_prob"}))
GROUPED = Traits(terms=frozenset({"log_prob"}), group=True)
COUPLED = Traits(terms=frozenset({"log_prob"}), separable=False)
ALL = np.ones(T, bool)


def samples(n, k=2):
    """n samples whose every array tells which sample (and step) it is; a prompt is drawn by every third group."""
    number = np.arange(n, dtype=np.float32)
    groups = np.arange(n) // k
    return ScoredSamples(
        latents=number[:, None, None, None, None] + np.zeros((1, T + 1, 2, 2, 4), np.float32),
        log_prob=number[:, None] + np.arange(T, dtype=np.float32) / 10,
        weights=number[:, None] * 10 + np.arange(T, dtype=np.float32) + 1,
        mask=np.ones((n, T), np.float32),
        context=number[:, None, None] + np.zeros((1, 3, 2), np.float32),
        prompt_ids=np.int64(1) << 40 | (groups % 3),
        group_ids=np.int64(7) << 32 | groups,
        rewards=number,
        advantages=-number,
    )


def batches(n=12, size=4, traits=SEPARABLE, trained=ALL, seed=0, chosen=None, **options):
    rng = np.random.default_rng(seed)
    return list(batching.minibatches(rng, chosen or samples(n), size, np.asarray(trained), traits, **options))


def numbers(batch):
    """Which samples a minibatch holds."""
    return batch.rewards.astype(int)


@pytest.mark.parametrize("traits", [SEPARABLE, GROUPED, COUPLED])
def test_every_sample_once_in_random_order(traits):
    found = [numbers(batch).tolist() for batch in batches(traits=traits)]
    assert sorted(sum(found, [])) == list(range(12)) and sum(found, []) != list(range(12))
    assert found == [numbers(batch).tolist() for batch in batches(traits=traits)]
    assert found != [numbers(batch).tolist() for batch in batches(traits=traits, seed=1)]


def test_what_belongs_to_a_sample_stays_with_it():
    for batch in batches():
        number = numbers(batch).astype(np.float32)
        for value in (
            batch.latents[:, 0, 0, 0, 0],
            batch.context[:, 0, 0],
            batch.old_log_prob[:, 0],
            -batch.advantages,
        ):
            np.testing.assert_array_equal(value, number)
        np.testing.assert_array_equal(batch.step_weight, number[:, None] * 10 + batch.steps + 1)
        assert batch.latents.shape == (4, T + 1, 2, 2, 4)


def test_groups_stay_together_where_they_are_compared():
    chosen = samples(24, k=4)
    mixed = np.random.default_rng(0).permutation(24)
    for batch in batches(size=8, traits=GROUPED, chosen=chosen[mixed]):
        groups = numbers(batch) // 4
        assert (groups.reshape(2, 4) == groups.reshape(2, 4)[:, :1]).all()
    first = {tuple(numbers(batches(size=8, traits=GROUPED, chosen=chosen, seed=seed)[0]) // 4) for seed in range(8)}
    assert len(first) > 1  # the groups themselves come in random order


def test_the_last_minibatch_is_filled_with_samples_that_do_not_count():
    found = batches(n=10)
    assert [len(batch.rewards) for batch in found] == [4, 4, 4]
    assert [batch.mask.sum() for batch in found] == [4 * T, 4 * T, 2 * T]
    counted = np.concatenate([numbers(batch)[batch.mask.any(axis=1)] for batch in found])
    assert sorted(counted) == list(range(10))


def test_fewer_samples_than_a_minibatch():
    (batch,) = batches(n=3, size=8)
    assert len(batch.rewards) == 8 and batch.mask.any(axis=1).sum() == 3


def test_every_trained_step_once_in_an_order_of_the_samples_own():
    trained = np.array([True, True, True, False])  # the last step has no density
    found = np.concatenate([batch.steps for batch in batches(n=40, trained=trained)])
    np.testing.assert_array_equal(np.sort(found, axis=1), np.tile([0, 1, 2], (40, 1)))
    assert len({tuple(row) for row in found}) == 6  # all orders occur


@pytest.mark.parametrize("fraction, count", [(0.5, 2), (0.75, 3), (0.1, 1)])
def test_a_fraction_of_the_steps_without_repetition(fraction, count):
    found = np.concatenate([batch.steps for batch in batches(n=400, size=40, timestep_fraction=fraction)])
    assert found.shape == (400, count)
    assert all(len(set(row)) == count for row in found)
    share = np.bincount(found.reshape(-1), minlength=T) / 400
    np.testing.assert_allclose(share, count / T, atol=0.1)  # 4 standard errors of 400 draws


def test_a_coupled_loss_gets_all_steps_in_one_order_and_draws_as_prompts():
    for batch in batches(traits=COUPLED, trained=[True, True, True, False], timestep_fraction=1.0):
        np.testing.assert_array_equal(batch.steps, np.tile([0, 1, 2], (4, 1)))
        groups = numbers(batch) // 2
        np.testing.assert_array_equal(
            batch.prompt_ids[:, None] == batch.prompt_ids, groups[:, None] == groups
        )  # two draws of one prompt are two


def test_prompts_are_numbered_within_a_minibatch():
    for batch in batches(n=24, size=12):
        prompts = numbers(batch) // 2 % 3
        np.testing.assert_array_equal(batch.prompt_ids[:, None] == batch.prompt_ids, prompts[:, None] == prompts)
        assert batch.prompt_ids.dtype == np.int32 and batch.prompt_ids.max() < 12


def test_steps_left_out_of_a_sample_stay_out():
    """Branching: the steps that the samples of a prompt share are masked."""
    chosen = samples(8)
    mask = np.tile(np.array([0, 0, 1, 1], np.float32), (8, 1))
    chosen = ScoredSamples(**{**vars(chosen), "mask": mask})
    for batch in batches(chosen=chosen):
        np.testing.assert_array_equal(batch.mask, batch.steps >= 2)


@pytest.mark.parametrize("step_sampling", ["uniform", "importance"])
def test_a_part_of_the_steps_is_of_those_that_a_sample_trains(step_sampling):
    """Else an update could have nothing to train."""
    mask = np.tile(np.array([0, 0, 1, 1], np.float32), (40, 1))
    chosen = ScoredSamples(**{**vars(samples(40)), "mask": mask})
    options = {"timestep_fraction": 0.25, "step_sampling": step_sampling}
    for batch in batches(40, 1, chosen=chosen, **options):
        assert batch.mask.tolist() == [[1]]


def test_importance_sampling_draws_steps_by_weight_and_does_not_weigh_them_again():
    n, weights = 4000, np.array([0.2, 1.8, 2.0, 0.0], np.float32)  # mean 1
    chosen = ScoredSamples(**{**vars(samples(n)), "weights": np.tile(weights, (n, 1))})
    found = batches(chosen=chosen, size=1000, timestep_fraction=0.5, step_sampling="importance")
    drawn = np.concatenate([batch.steps for batch in found])
    assert drawn.shape == (n, 2) and (drawn[:, 0] != drawn[:, 1]).all()
    for batch in found:  # the weight and the correction for the probability cancel
        np.testing.assert_allclose(batch.step_weight, 1, rtol=1e-6)
    share = np.bincount(drawn.reshape(-1), minlength=T) / n
    np.testing.assert_allclose(share, 2 * weights / T, atol=0.03)
    # hence the plain mean of any g over the draws estimates the weighted mean over all steps
    g = np.array([3.0, -1.0, 0.5, 100.0])
    np.testing.assert_allclose(g[drawn].mean(), (weights * g).mean(), atol=0.03)


def test_a_step_that_would_be_drawn_twice_is_drawn_once_with_its_weight():
    """Weights 3.4 0.3 0.3 0 and two draws: 2 * 3.4 / 4 is above 1, so the first step is certain, and 0.3 of 0.6 is the
    probability of each of the next two. Weight * 2 / (4 * probability): 1.7, 0.3, 0.3."""
    n, weights = 2000, np.array([3.4, 0.3, 0.3, 0.0], np.float32)
    chosen = ScoredSamples(**{**vars(samples(n)), "weights": np.tile(weights, (n, 1))})
    found = batches(chosen=chosen, size=1000, timestep_fraction=0.5, step_sampling="importance")
    drawn, weight = (np.concatenate([getattr(b, name) for b in found]) for name in ("steps", "step_weight"))
    assert (drawn[:, 0] == 0).all() and set(drawn[:, 1]) == {1, 2}
    np.testing.assert_allclose(weight, np.array([1.7, 0.3, 0.3])[drawn], rtol=1e-6)
    np.testing.assert_allclose((drawn[:, 1] == 1).mean(), 0.5, atol=0.06)  # five standard errors
    g = np.array([3.0, -1.0, 0.5, 100.0])
    np.testing.assert_allclose((weight * g[drawn]).mean(), (weights * g).mean(), atol=0.02)


@pytest.mark.parametrize("step_sampling", ["uniform", "importance"])
def test_all_steps_are_trained_once_with_their_weight(step_sampling):
    for batch in batches(timestep_fraction=1.0, step_sampling=step_sampling):
        np.testing.assert_array_equal(np.sort(batch.steps, axis=1), np.tile(np.arange(T), (4, 1)))
        np.testing.assert_array_equal(batch.step_weight, numbers(batch)[:, None] * 10 + batch.steps + 1)


def test_a_penalty_has_the_weights_only_where_it_is_told_to():
    """Without them its mean over the drawn steps is the plain mean over all: the correction alone stands there."""
    weights = np.array([3.4, 0.3, 0.3, 0.0], np.float32)
    chosen = ScoredSamples(**{**vars(samples(4)), "weights": np.tile(weights, (4, 1))})
    (all_steps,) = batches(chosen=chosen, timestep_fraction=1.0, unweighted_penalty=True)
    np.testing.assert_array_equal(all_steps.penalty_weight, 1)
    for options in ({"timestep_fraction": 1.0}, {"timestep_fraction": 0.5, "step_sampling": "importance"}):
        (batch,) = batches(chosen=chosen, **options)
        np.testing.assert_array_equal(batch.penalty_weight, batch.step_weight)


def test_a_penalty_without_weights_reaches_every_step():
    """Two draws by the shares (w + 1) / 2 = 2.2 0.65 0.65 0.5: 2 * 2.2 / 4 is above 1, so the first step is certain,
    and 0.65 and 0.5 of 1.8 are the probabilities of the others. The correction is 2 / (4 probability), at most 2."""
    n, weights = 8000, np.array([3.4, 0.3, 0.3, 0.0], np.float32)
    chosen = ScoredSamples(**{**vars(samples(n)), "weights": np.tile(weights, (n, 1))})
    options = {"timestep_fraction": 0.5, "step_sampling": "importance", "unweighted_penalty": True}
    (batch,) = batches(n, n, chosen=chosen, **options)
    assert (batch.steps[:, 0] == 0).all() and set(batch.steps[:, 1]) == {1, 2, 3}
    correction = np.array([0.5, 0.9 / 0.65, 0.9 / 0.65, 1.8])
    np.testing.assert_allclose(batch.penalty_weight, correction[batch.steps], rtol=1e-6)
    np.testing.assert_allclose(batch.step_weight, (weights * correction)[batch.steps], rtol=1e-6)
    g = np.array([3.0, -1.0, 0.5, 10.0])  # both means are those over all steps, within five standard errors
    np.testing.assert_allclose((batch.penalty_weight * g[batch.steps]).mean(), g.mean(), atol=0.25)
    np.testing.assert_allclose((batch.step_weight * g[batch.steps]).mean(), (weights * g).mean(), atol=0.02)


def test_importance_sampling_does_not_apply_to_a_coupled_loss():
    for batch in batches(traits=COUPLED, step_sampling="importance"):
        np.testing.assert_array_equal(batch.step_weight, numbers(batch)[:, None] * 10 + batch.steps + 1)


def test_random_timesteps_differ_between_samples_minibatches_and_passes():
    seeds = np.concatenate([batch.seeds for seed in range(2) for batch in batches(seed=seed)])
    assert len(np.unique(seeds)) == 24 and (seeds >= 0).all()
