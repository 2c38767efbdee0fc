"""What the learner does with a loss's derivatives by the terms: which pairs have none, which part is weighted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import toy

from ddpo_jax import sharding
from ddpo_jax.ops import masked, surrogate
from ddpo_jax.training.learner import Learner, Minibatch, Objective
from ddpo_jax.types import Traits

N, T, CLIP = 6, 4, 0.02
PARAMS, REFERENCE = toy.parameters(), toy.parameters(5)
ADVANTAGES = np.array([1.0, -2.0, 0.0, 0.5, -0.5, 3.0], np.float32)


@pytest.fixture(autouse=True)
def quickly_compiled():
    with tiny.quick_compilation():
        yield


def learner(objective):
    """``(update, terms)``: gradient and metrics of a minibatch, and its terms, on one device in microbatches of 3."""
    mesh = sharding.make_mesh(1, 1)
    recorder = optax.GradientTransformation(  # what is handed to the optimizer becomes its state: the gradient
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params: (jax.tree.map(jnp.zeros_like, params), grads),
    )
    made = Learner(toy.policy(T), objective, recorder, mesh, microbatch_size=3)
    start = made.init({name: jnp.asarray(x) for name, x in PARAMS.items()})
    rest = [sharding.put_params(jax.tree.map(jnp.asarray, x), mesh) for x in (REFERENCE, toy.FROZEN)]
    rest.append(sharding.replicate(jnp.asarray(toy.contexts(N)[1]), mesh))

    def update(batch):
        state = jax.tree.map(jnp.copy, start)  # an update donates its state
        state, metrics = made.update(state, *rest, sharding.put_batch(batch, mesh))
        return jax.device_get(state.opt_state), jax.device_get(metrics)

    return update, lambda batch: jax.device_get(made.log_prob(start.params, *rest, sharding.put_batch(batch, mesh)))


def minibatch(**fields):
    """Random trajectories of which every step is trained but three; the old log-probs are all 0."""
    mask = np.ones((N, T), np.float32)
    mask[0, 1] = mask[3, 3] = mask[5, 0] = 0
    rng = np.random.default_rng(1)
    given = {
        "latents": rng.standard_normal((N, T + 1, *toy.SHAPE)).astype(np.float32),
        "context": toy.contexts(N)[0],
        "old_log_prob": np.zeros((N, T), np.float32),
        "advantages": ADVANTAGES,
        "rewards": rng.standard_normal(N).astype(np.float32),
        "prompt_ids": np.repeat(np.arange(N // 2), 2).astype(np.int32),
        "steps": np.tile(np.arange(T, dtype=np.int32), (N, 1)),
        "step_weight": rng.uniform(0.2, 2, (N, T)).astype(np.float32),
        "penalty_weight": rng.uniform(0.2, 2, (N, T)).astype(np.float32),
        "mask": mask,
        "seeds": np.arange(N, dtype=np.int32),
    }
    return Minibatch(**given | fields)


def clipped(terms, batch):
    return surrogate.clipped(terms.log_prob, batch.old_log_prob, batch.advantages[:, None], batch.clip_range)


def clipped_together(terms, batch):
    return masked.spread(clipped(terms, batch) * batch.mask, batch.mask.sum())


# ---- pairs without a gradient ----


@pytest.mark.parametrize("separable", [True, False])
def test_zero_gradient_fraction_counts_the_one_side_on_which_ppo_clips(separable):
    """By hand: a pair has no gradient where the ratio is above 1 + c and A > 0, below 1 - c and A < 0, or A = 0. The
    clip fraction counts both sides whatever the advantage."""
    traits = Traits(terms=frozenset({"log_prob"}), separable=separable)
    update, terms = learner(Objective(traits, clipped if separable else clipped_together, CLIP))
    batch = minibatch()
    log_ratio = np.tile([0.05, -0.05, 0.01, -0.01], (N, 1)).astype(np.float32)  # two outside the range, two inside
    batch = dataclasses.replace(batch, old_log_prob=terms(batch).log_prob - log_ratio)
    _, metrics = update(batch)
    # Of 24 pairs 21 are trained. Outside: columns 0 and 1, less (0, 1) and (5, 0): 10. Without a gradient: A > 0 in
    # column 0: samples 0 and 3 (5 is masked); A < 0 in column 1: samples 1 and 4; A = 0: all 4 of sample 2. Together 8.
    np.testing.assert_allclose(metrics["clip_fraction"], 10 / 21, rtol=1e-6)
    np.testing.assert_allclose(metrics["zero_gradient_fraction"], 8 / 21, rtol=1e-6)


def test_a_regression_on_images_has_no_such_fraction():
    update, _ = learner(Objective(Traits(terms=frozenset({"denoise_mse"})), lambda t, b: t.denoise_mse, CLIP))
    _, metrics = update(minibatch())
    assert "zero_gradient_fraction" not in metrics and "denoise_mse" in metrics


# ---- a penalty that has weights of its own ----


def distance(terms, batch):
    return 30 * terms.kl


def drift(terms, batch):
    """[N]: couples the steps of a trajectory."""
    return masked.spread(jnp.square((terms.kl * batch.mask).sum(axis=1)), batch.mask.sum())


def difference(found, expected):
    apart = np.sqrt(sum(((found[name] - value) ** 2).sum() for name, value in expected.items()))
    return apart / np.sqrt(sum((value**2).sum() for value in expected.values()))


def objective(*, separable=True, penalty=None, loss=None):
    own = clipped if separable else clipped_together
    return Objective(Traits(frozenset({"log_prob", "kl"}), separable=separable), loss or own, CLIP, penalty)


def test_the_penalty_of_a_separable_loss_has_its_own_weights():
    update, terms = learner(objective(penalty=distance))
    batch = minibatch()
    found = terms(batch)
    batch = dataclasses.replace(batch, old_log_prob=found.log_prob + 0.01)
    gradient, metrics = update(batch)
    ratio, a = np.exp(np.float64(-0.01)), np.float64(ADVANTAGES)[:, None]  # inside the range: the surrogate is -A ratio
    want = (-a * ratio * batch.step_weight + 30 * np.float64(found.kl) * batch.penalty_weight) * batch.mask
    np.testing.assert_allclose(metrics["loss"], want.sum() / batch.mask.sum(), rtol=1e-3)
    # the gradient is the sum of the two parts', each with its weights
    surrogate_alone, _ = learner(objective())[0](batch)
    as_loss = dataclasses.replace(batch, step_weight=batch.penalty_weight)
    penalty_alone, _ = learner(objective(loss=distance))[0](as_loss)
    parts = {name: surrogate_alone[name] + penalty_alone[name] for name in gradient}
    assert difference(gradient, parts) < 1e-5 and difference(gradient, surrogate_alone) > 0.01


def test_the_penalty_of_a_coupled_loss_has_its_own_weights():
    """Written as coupled, the same sum over pairs has the same gradient; a penalty that couples adds its own."""
    batch = minibatch()
    batch = dataclasses.replace(batch, old_log_prob=learner(objective())[1](batch).log_prob + 0.01)
    surrogate_alone, _ = learner(objective())[0](batch)
    as_loss = dataclasses.replace(batch, step_weight=batch.penalty_weight)
    penalty_alone, alone = learner(objective(separable=False, loss=drift))[0](as_loss)
    gradient, metrics = learner(objective(separable=False, penalty=drift))[0](batch)
    _, without = learner(objective(separable=False))[0](batch)
    parts = {name: surrogate_alone[name] + penalty_alone[name] for name in gradient}
    assert difference(gradient, parts) < 1e-5 and difference(gradient, surrogate_alone) > 0.01
    np.testing.assert_allclose(metrics["loss"], without["loss"] + alone["loss"], rtol=1e-5)


# ---- the noise levels of a regression ----


@pytest.mark.parametrize("final_alpha_is_one", [False, True])
def test_a_step_draws_its_noise_level_from_its_share_of_the_training_timesteps(final_alpha_is_one):
    """A network that answers with the timestep has an error of about its square, from which the timestep is read."""
    trained = T - 1 if final_alpha_is_one else T  # then the last step has no density
    n = 40
    steps = np.tile(np.arange(trained, dtype=np.int32), (n, 1))
    rng = np.random.default_rng(2)
    batch = Minibatch(
        latents=rng.standard_normal((n, T + 1, *toy.SHAPE)).astype(np.float32),
        context=toy.contexts(n)[0],
        old_log_prob=np.zeros((n, T), np.float32),
        advantages=np.ones(n, np.float32),
        rewards=np.ones(n, np.float32),
        prompt_ids=np.zeros(n, np.int32),
        steps=steps,
        step_weight=np.ones(steps.shape, np.float32),
        penalty_weight=np.ones(steps.shape, np.float32),
        mask=np.ones(steps.shape, np.float32),
        seeds=np.arange(n, dtype=np.int32),
    )

    def says_when(params, frozen, latents, timesteps, context):
        return jnp.zeros_like(latents) + timesteps[:, None, None, None] + 0 * params["out"].sum()

    policy = dataclasses.replace(toy.policy(T, set_alpha_to_one=final_alpha_is_one), network=says_when)
    assert int(np.asarray(policy.transition.trainable).sum()) == trained
    mesh = sharding.make_mesh(1, 1)
    regression = Objective(Traits(frozenset({"denoise_mse"})), lambda t, b: t.denoise_mse, CLIP)
    made = Learner(policy, regression, optax.sgd(1.0), mesh, microbatch_size=10)
    params = {name: jnp.asarray(x) for name, x in PARAMS.items()}
    found = made.log_prob(params, {}, {}, jnp.asarray(toy.contexts(1)[1]), sharding.put_batch(batch, mesh))
    timesteps = np.sqrt(np.asarray(found.denoise_mse))  # of 64 noises with mean square 1: within 1 of the timestep
    edges = [i * 1000 // trained for i in range(trained + 1)]
    for column in range(trained):
        low, high = edges[trained - 1 - column], edges[trained - column]
        assert (timesteps[:, column] > low - 2).all() and (timesteps[:, column] < high + 2).all()
        assert np.ptp(timesteps[:, column]) > 0.6 * (high - low)  # 40 draws from all of it
