"""The sampler: against diffusers step by step, and the independence and sharing of its noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ddpo_jax.diffusion import sampler

N, T = 8, 4
PARAMS = toy.parameters()


def keys(ids, seed=0):
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.asarray(ids))


@functools.partial(jax.jit, static_argnums=0)
def run(options, keys, context, uncond, root_keys=None, branch_step=0):
    policy = toy.policy(T, **dict(options))
    return sampler.sample(policy, PARAMS, toy.FROZEN, keys, context, uncond, toy.SHAPE, root_keys, branch_step)


def sample(n=N, *, ids=None, options=(), same_prompt=False, **arguments):
    context, uncond = toy.contexts(N)
    context = context[:1].repeat(n, axis=0) if same_prompt else context[:n]
    return run(options, keys(range(n) if ids is None else ids), context, uncond, **arguments)


@pytest.fixture(scope="module")
def trajectory():
    return sample()


def test_shapes_and_dtypes(trajectory):
    assert trajectory.latents.shape == (N, T + 1, *toy.SHAPE) and trajectory.log_prob.shape == (N, T)
    assert trajectory.latents.dtype == trajectory.log_prob.dtype == jnp.float32


@pytest.mark.parametrize("eta", [1.0, 0.2])
def test_every_step_is_that_of_diffusers_with_the_noise_of_its_key(trajectory, eta):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    if eta != 1.0:
        trajectory = sample(options=(("eta", eta),))
    theirs = diffusers.DDIMScheduler(**toy.STABLE_DIFFUSION, clip_sample=False)
    theirs.set_timesteps(T)
    context, uncond = toy.contexts(N)
    for index, timestep in enumerate(theirs.timesteps):
        latents, after = trajectory.latents[:, index], trajectory.latents[:, index + 1]
        time = np.full(N, timestep)
        cond = toy.bound(PARAMS, latents, time, context)
        null = toy.bound(PARAMS, latents, time, np.broadcast_to(uncond, context.shape))
        noise = jnp.stack([jax.random.normal(jax.random.fold_in(key, index), toy.SHAPE) for key in keys(range(N))])
        arguments = (np.asarray(null + 3.0 * (cond - null)), timestep, np.asarray(latents))
        output, latents = (torch.tensor(x) for x in (arguments[0], arguments[2]))
        step = functools.partial(theirs.step, output, timestep, latents, eta=eta)
        mean = step(variance_noise=torch.zeros_like(latents)).prev_sample
        drawn = step(variance_noise=torch.tensor(np.asarray(noise))).prev_sample
        np.testing.assert_allclose(after, drawn, rtol=1e-3, atol=1e-4)
        std = ((drawn - mean) / np.asarray(noise)).median().item()
        density = torch.distributions.Normal(mean, std).log_prob(torch.tensor(np.asarray(after)))
        np.testing.assert_allclose(trajectory.log_prob[:, index], density.mean((1, 2, 3)), rtol=1e-3, atol=2e-3)


def test_initial_noise_is_standard_normal_and_differs_between_samples(trajectory):
    initial = np.asarray(trajectory.latents[:, 0]).reshape(N, -1)
    assert abs(initial.mean()) < 4 / np.sqrt(initial.size)
    assert abs(initial.var() - 1) < 4 * np.sqrt(2 / initial.size)
    np.fill_diagonal(similar := np.corrcoef(initial), 0)
    assert abs(similar).max() < 0.6  # 64 numbers each: 0.6 is five standard errors


def test_a_sample_does_not_depend_on_its_batch(trajectory):
    for part in (slice(0, 2), slice(2, 4)):
        context, uncond = toy.contexts(N)
        alone = run((), keys(range(N))[part], context[part], uncond)
        np.testing.assert_array_equal(alone.latents[:, 0], trajectory.latents[part, 0])
        np.testing.assert_allclose(alone.latents, trajectory.latents[part], atol=1e-5)
        np.testing.assert_allclose(alone.log_prob, trajectory.log_prob[part], atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_a_sample_does_not_depend_on_the_mesh(trajectory, shape):
    mesh = Mesh(np.asarray(jax.devices()).reshape(shape), ("data", "fsdp"))
    batch = P(("data", "fsdp"))
    context, uncond = toy.contexts(N)
    sharded = jax.jit(
        jax.shard_map(
            lambda keys, context: sampler.sample(toy.policy(T), PARAMS, toy.FROZEN, keys, context, uncond, toy.SHAPE),
            mesh=mesh,
            in_specs=(batch, batch),
            out_specs=batch,
            check_vma=False,
        )
    )(keys(range(N)), context)
    np.testing.assert_array_equal(sharded.latents[:, 0], trajectory.latents[:, 0])
    np.testing.assert_allclose(sharded.latents, trajectory.latents, atol=1e-5)
    np.testing.assert_allclose(sharded.log_prob, trajectory.log_prob, atol=1e-5)


@pytest.mark.parametrize("branch", [0, 2, T])
def test_samples_of_a_root_share_the_steps_before_the_branch(branch):
    roots = keys([0, 0, 1, 1, 2, 2, 3, 3])
    shared = np.asarray(sample(root_keys=roots, branch_step=branch, same_prompt=True).latents)
    for left in range(0, N, 2):
        np.testing.assert_array_equal(shared[left, : branch + 1], shared[left + 1, : branch + 1])
        for step in range(branch + 1, T + 1):
            assert np.abs(shared[left, step] - shared[left + 1, step]).mean() > 0.01
    other = np.abs(shared[0, : branch + 1] - shared[2, : branch + 1]).mean(axis=(1, 2, 3))
    assert (other > 0.1).all()  # samples of different roots share nothing


def test_a_sample_that_is_its_own_root_is_an_ordinary_one(trajectory):
    context, uncond = toy.contexts(N)
    for branch in (0, 3):
        own = run((), keys(range(N)), context, uncond, root_keys=keys(range(N)), branch_step=branch)
        np.testing.assert_array_equal(own.latents, trajectory.latents)


def test_the_branches_are_fresh_noise_and_not_that_of_the_root():
    """Both samples take their own keys after the branch, so changing a sample's key changes it from there on only."""
    roots = keys([0] * N)
    first = np.asarray(sample(root_keys=roots, branch_step=2, same_prompt=True).latents)
    second = np.asarray(sample(ids=range(100, 108), root_keys=roots, branch_step=2, same_prompt=True).latents)
    np.testing.assert_array_equal(first[:, :3], second[:, :3])
    assert (np.abs(first[:, 3:] - second[:, 3:]).mean(axis=(2, 3, 4)) > 0.01).all()


def test_without_noise_it_is_deterministic_ddim():
    """eta 0 from the same initial noise is diffusers' DDIM, with log_prob 0 for want of a density; eta 1e-3 is near."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    still = sample(options=(("eta", 0.0),))
    np.testing.assert_array_equal(still.log_prob, 0)
    theirs = diffusers.DDIMScheduler(**toy.STABLE_DIFFUSION, clip_sample=False)
    theirs.set_timesteps(T)
    context, uncond = toy.contexts(N)
    x = np.asarray(still.latents[:, 0])
    for timestep in theirs.timesteps:
        time = np.full(N, timestep)
        cond = toy.bound(PARAMS, x, time, context)
        null = toy.bound(PARAMS, x, time, np.broadcast_to(uncond, context.shape))
        output = torch.tensor(np.asarray(null + 3.0 * (cond - null)))
        x = theirs.step(output, timestep, torch.tensor(x), eta=0.0).prev_sample.numpy()
    np.testing.assert_allclose(still.latents[:, -1], x, rtol=1e-3, atol=1e-3)
    near = sample(options=(("eta", 1e-3),))
    assert np.isfinite(near.log_prob).all() and (near.log_prob > 1).all()  # a narrow density is high
    np.testing.assert_allclose(near.latents, still.latents, atol=0.02)


def test_the_step_without_noise_at_the_end_has_log_prob_zero():
    made = sample(options=(("set_alpha_to_one", True),))
    assert np.isfinite(made.latents).all() and np.isfinite(made.log_prob).all()
    np.testing.assert_array_equal(made.log_prob[:, -1], 0)
    assert (made.log_prob[:, :-1] != 0).all()
    assert toy.policy(T, set_alpha_to_one=True).transition.trainable.tolist() == [True] * (T - 1) + [False]


def test_one_program_for_all_branch_steps():
    before = run._cache_size()
    roots = keys([0] * N)
    for branch in (0, 1, 3):
        sample(root_keys=roots, branch_step=jnp.int32(branch))
    assert run._cache_size() <= before + 1


def test_resuming_at_a_step_gives_the_rest_of_the_trajectory(trajectory):
    """From any step with the trajectory's own noise; at T there is nothing left to do. One program for all steps."""
    resume = jax.jit(functools.partial(sampler.resume, toy.policy(T), PARAMS, toy.FROZEN))
    context, uncond = toy.contexts(N)
    for start in range(T + 1):
        found = resume(keys(range(N)), context, uncond, trajectory.latents[:, start], jnp.int32(start))
        np.testing.assert_allclose(found, trajectory.latents[:, T], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found, trajectory.latents[:, T])
    other = resume(keys(range(N, 2 * N)), context, uncond, trajectory.latents[:, 2], jnp.int32(2))
    assert (np.abs(other - trajectory.latents[:, T]).mean((1, 2, 3)) > 0.01).all()  # fresh noise parts from it
    assert resume._cache_size() == 1
