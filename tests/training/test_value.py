"""The value network and its learner, and DPOK's whole update with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import SMALLEST_UNET, quick_compilation, tiny_pipeline_folder, tiny_ready

from ddpo_jax import sharding
from ddpo_jax.models.functional import functional
from ddpo_jax.models.value import ValueNetwork
from ddpo_jax.training import value
from ddpo_jax.training.learner import Minibatch
from ddpo_jax.training.loop import train
from ddpo_jax.workdir import checkpoint

TIMESTEPS = jnp.array([601, 301, 1])
T, C, L, D = 3, 2, 4, 6


def squared_error(terms, batch):
    return jnp.square(terms.value - batch.rewards[:, None])


def make(num_devices, learning_rate=1e-2):
    devices = np.asarray(jax.devices()[:num_devices]).reshape(-1, 1)
    mesh = jax.sharding.Mesh(devices, sharding.BATCH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    return value.ValueLearner(squared_error, TIMESTEPS, C, D, learning_rate, mesh, seed=0), mesh


def make_batch(n, seed=0, columns=T, masked=0):
    """Rewards of the size of -100 that depend on latents of every step and on the prompt."""
    rng = np.random.default_rng(seed)
    brightness, prompt = rng.normal(size=n), rng.integers(0, 2, n)
    latents = 0.3 * rng.normal(size=(n, T + 1, 8, 8, C))
    latents[..., 0] += brightness[:, None, None, None]
    context = 0.1 * rng.normal(size=(n, L, D)) + np.where(prompt[:, None, None], 1.0, -1.0) * np.arange(D)
    mask = np.ones((n, columns), np.float32)
    mask[n - masked :] = 0
    rewards = -118 + 15 * brightness + 10 * prompt
    rewards[n - masked :] = 1e6  # padding: whatever stands there must not matter
    f32 = np.float32
    return Minibatch(
        latents=latents.astype(f32),
        context=context.astype(f32),
        old_log_prob=np.zeros((n, T), f32),
        advantages=np.zeros(n, f32),
        rewards=rewards.astype(f32),
        prompt_ids=prompt.astype(np.int32),
        steps=rng.permuted(np.tile(np.arange(T, dtype=np.int32), (n, 1)), axis=1)[:, :columns],
        step_weight=np.ones((n, columns), f32),
        penalty_weight=np.ones((n, columns), f32),
        mask=mask,
        seeds=np.zeros(n, np.int32),
    )


def test_it_learns_what_latents_and_prompt_say_of_a_reward_of_any_scale():
    learner, mesh = make(1)
    batch, unseen = (sharding.put_batch(make_batch(32, seed), mesh) for seed in (0, 1))
    state, variance = learner.init(), float(np.var(unseen.rewards))
    losses = []
    for _ in range(60):
        state, metrics = learner.update(state, batch)
        losses.append(float(metrics["value_loss"]))
    np.testing.assert_allclose(losses[0], np.var(batch.rewards), rtol=1e-4)  # it starts at the mean reward
    error = np.mean((learner.predict(state, unseen) - np.asarray(unseen.rewards)[:, None]) ** 2)
    assert losses[-1] < 0.05 * variance and error < 0.1 * variance


def test_an_update_is_adamw_on_the_mean_squared_error_of_the_trained_pairs():
    """On eight devices with padding, against the formula written down whole on one."""
    learner, mesh = make(8)
    batch = make_batch(16, columns=2, masked=3)
    state = learner.init()
    network, _, _ = functional(ValueNetwork(C, D, rngs=nnx.Rngs(0)), lambda name: True)
    tx, real = optax.adamw(1e-2), slice(13)
    rewards = batch.rewards[real]

    def loss(params):
        steps = batch.steps[real]
        latents = np.take_along_axis(batch.latents[real], steps[:, :, None, None, None], axis=1)
        context = np.repeat(batch.context[real], 2, axis=0)
        out = network(params, {}, latents.reshape(26, 8, 8, C), TIMESTEPS[steps.reshape(-1)], context)
        return jnp.mean((rewards.mean() + rewards.std() * out.reshape(13, 2) - rewards[:, None]) ** 2)

    direct = jax.jit(jax.value_and_grad(loss))
    # The first gradient is zero, but for rounding, in all but the kernel of the last layer: no test of anything.
    state, _ = learner.update(state, sharding.put_batch(batch, mesh))
    params, opt_state = jax.device_get((state.params, state.opt_state))
    for _ in range(2):
        state, metrics = learner.update(state, sharding.put_batch(batch, mesh))
        want, grads = direct(params)
        np.testing.assert_allclose(metrics["value_loss"], want, rtol=1e-5)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    for got, moment in zip(jax.tree.leaves(state.opt_state[0].mu), jax.tree.leaves(opt_state[0].mu), strict=True):
        np.testing.assert_allclose(got, moment, atol=1e-5 * float(jnp.abs(moment).max()))
    for name, want in params.items():
        np.testing.assert_allclose(state.params[name], want, atol=1e-4)  # of a step of 1e-2


def test_predictions_stand_at_the_pairs_they_are_of():
    """Whatever the order of a sample's steps and the number of devices."""
    batch = make_batch(8)
    ordered = batch.replace(steps=np.sort(batch.steps, axis=1))
    learner, mesh = make(1)
    state = learner.init()
    for _ in range(3):
        state, _ = learner.update(state, sharding.put_batch(batch, mesh))
    want = np.asarray(learner.predict(state, sharding.put_batch(ordered, mesh)))
    assert want.std(axis=1).min() > 0, "the steps of a sample have values of their own"
    many, mesh = make(8)
    got = many.predict(sharding.replicate(jax.device_get(state), mesh), sharding.put_batch(batch, mesh))
    assert got.shape == (8, T) and len(got.sharding.device_set) == 8
    np.testing.assert_allclose(got, np.take_along_axis(want, batch.steps, axis=1), rtol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipeline_folder(tmp_path_factory.mktemp("tiny"), unet=SMALLEST_UNET)


@quick_compilation()
def test_dpok_resumes_with_its_value_network(folder, tmp_path):
    """One epoch and then another gives bit for bit what two in one go give."""

    def arrays(workdir, *num_epochs):
        for number in num_epochs:
            chosen = {"algorithm.name": "dpok", "train.lora_rank": 2, "num_epochs": number, "log.images_every": 0}
            train(tiny_ready(folder, **chosen), tmp_path / workdir)
        with checkpoint.Checkpointer(tmp_path / workdir, read_only=True) as saver:
            return saver.read(1, "state"), saver.read(2, "state")

    (_, whole), (first, resumed) = arrays("whole", 2), arrays("halves", 1, 2)
    assert whole.keys() == resumed.keys() and whole["value/step"] == 10  # 5 for each of the 2 updates
    for name, want in whole.items():
        np.testing.assert_array_equal(resumed[name], want, err_msg=name)
    for part in ("value/params/", "params/"):
        assert any((first[name] != whole[name]).any() for name in whole if name.startswith(part)), part
