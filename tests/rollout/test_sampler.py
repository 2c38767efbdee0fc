"""The image sampler with a toy policy: images of any number, continuations and predictions, on one device and many."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from ddpo_jax import sharding
from ddpo_jax.rollout.sampler import ImageSampler

N, T = 8, 4
PARAMS, KEY, IDS = jax.tree.map(jnp.asarray, toy.parameters()), jax.random.key(2), np.arange(N)
PROMPTS = [f"prompt {i}" for i in range(N)]


def embed(prompts):
    """A row of ``toy.contexts`` for each number that ends a prompt."""
    return toy.contexts(99)[0][[int(prompt.split()[-1]) for prompt in prompts]]


def decode(latents):
    """Three channels as bytes."""
    return jnp.clip(127 + 40 * latents[..., :3], 0, 255).astype(jnp.uint8)


def make(mesh=(1, 1), policy=None, weighting=None):
    devices = sharding.make_mesh(*mesh)
    codec = types.SimpleNamespace(latent_shape=toy.SHAPE, embed=embed, decode=decode)
    uncond = sharding.replicate(toy.contexts(1)[1], devices)
    frozen = sharding.put_params(toy.FROZEN, devices)
    return ImageSampler(policy or toy.policy(T), frozen, uncond, codec, devices, weighting)


@pytest.fixture(scope="module")
def made():
    return make()


@pytest.fixture(scope="module")
def paths(made):
    trajectory, weights = made.trajectories(PARAMS, PROMPTS, IDS, KEY)
    np.testing.assert_array_equal(weights, np.ones((N, T)))  # of every step alike, unless a weighting is given
    return np.asarray(trajectory.latents)


def test_weights_come_from_the_latents_and_the_noise_process(paths):
    def weighting(latents, transition):
        return latents[:, 1:, 0, 0, 0] * transition.std

    _, weights = make(weighting=weighting).trajectories(PARAMS, PROMPTS, IDS, KEY)
    np.testing.assert_allclose(weights, paths[:, 1:, 0, 0, 0] * toy.policy(T).transition.std, rtol=1e-5)


@pytest.mark.parametrize("mesh, batch_size", [((1, 1), 3), ((1, 1), 100), ((2, 4), 3)])
def test_images_are_those_of_the_trajectories_whatever_the_batch(paths, mesh, batch_size):
    found = make(mesh).images(PARAMS, PROMPTS[:5], IDS[:5], KEY, batch_size)
    assert isinstance(found, np.ndarray) and found.dtype == np.uint8 and found.shape == (5, 4, 4, 3)
    expected = np.asarray(decode(paths[:5, T]))
    assert np.abs(found.astype(int) - expected).max() <= 1  # rounding
    assert expected.std() > 10


def test_the_noise_follows_from_the_key_and_the_number(made, paths):
    latents = [
        made.trajectories(PARAMS, PROMPTS, ids, key)[0].latents[:, 0]
        for ids, key in ((IDS + 1, KEY), (IDS, jax.random.key(3)))
    ]
    np.testing.assert_array_equal(latents[0][:-1], paths[1:, 0])
    assert (np.abs(latents[1] - paths[:, 0]).mean((1, 2, 3)) > 0.5).all()


@pytest.mark.parametrize("mesh", [(1, 1), (8, 1), (2, 4)])
def test_a_continuation_is_the_rest_of_a_trajectory(paths, mesh):
    made = make(mesh)
    for step in (0, 2, T):
        found = made.continuations(PARAMS, PROMPTS, IDS, KEY, paths[:, step], step)
        np.testing.assert_allclose(found, paths[:, T], rtol=1e-5, atol=2e-5)
    other = made.continuations(PARAMS, PROMPTS, IDS + N, KEY, paths[:, 2], 2)
    assert (np.abs(other - paths[:, T]).mean((1, 2, 3)) > 0.01).all()  # fresh noise parts from it


def test_predictions_are_the_clean_latents_that_the_guided_output_stands_for(made, paths):
    """(x - sqrt(1 - alpha) eps) / sqrt(alpha) in float64, with alpha from the betas of Stable Diffusion."""
    for step, timestep in enumerate((751, 501, 251, 1)):
        found = made.predictions(PARAMS, PROMPTS, paths[:, step], step)
        alpha = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[timestep]
        latents, times = paths[:, step], np.full(N, timestep)
        cond = toy.bound(PARAMS, latents, times, embed(PROMPTS))
        null = toy.bound(PARAMS, latents, times, np.broadcast_to(toy.contexts(1)[1], embed(PROMPTS).shape))
        noise = np.asarray(null + 3.0 * (cond - null), np.float64)
        np.testing.assert_allclose(found, (latents - np.sqrt(1 - alpha) * noise) / np.sqrt(alpha), rtol=1e-4, atol=1e-4)
