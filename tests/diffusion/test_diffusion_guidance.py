"""Classifier-free guidance: its value, its single-branch case, and where its gradient flows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax.diffusion.guidance import guided

B, L, D = 3, 2, 4
W = 5.0


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    latents, context, uncond = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((B, 2, 2, 4), (B, L, D), (L, D))
    )
    return [latents, jnp.array([10, 500, 900]), context, uncond]


def make(weight, log=None):
    """A network whose output is ``weight * (mean of context) + latents * timestep``; ``log`` takes the batch sizes."""

    def network(latents, timesteps, context):
        if log is not None:
            log.append(len(latents))
        return weight * context.mean((1, 2))[:, None, None, None] + latents * timesteps[:, None, None, None]

    return network


def test_value_by_hand(inputs):
    latents, timesteps, context, uncond = inputs
    out = guided(make(2.0), latents, timesteps, context, uncond, W)
    bias = np.asarray(2 * (uncond.mean() + W * (context.mean((1, 2)) - uncond.mean())))
    expected = np.asarray(latents * timesteps[:, None, None, None]) + bias[:, None, None, None]
    np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_the_two_branches_are_one_call(inputs):
    log = []
    guided(make(1.0, log), *inputs, W)
    assert log == [2 * B]


def test_scale_one_is_the_conditional_branch_alone(inputs):
    latents, timesteps, context, _ = inputs
    log = []
    nothing = jnp.full((L, D), jnp.nan)  # would show if it took part
    out = guided(make(2.0, log), latents, timesteps, context, nothing, 1.0)
    np.testing.assert_array_equal(out, make(2.0)(latents, timesteps, context))
    assert log == [B]


def test_scale_zero_is_the_unconditional_branch(inputs):
    latents, timesteps, context, uncond = inputs
    out = guided(make(2.0), latents, timesteps, context, uncond, 0.0)
    np.testing.assert_allclose(out, make(2.0)(latents, timesteps, jnp.broadcast_to(uncond, context.shape)), rtol=1e-6)


@pytest.mark.parametrize("stop", [False, True])
def test_gradient_through_both_branches_or_the_conditional_one(inputs, stop):
    latents, timesteps, context, uncond = inputs

    def total(weight):
        return guided(make(weight), latents, timesteps, context, uncond, W, stop).sum()

    conditional = W * float(context.mean((1, 2)).sum())
    unconditional = (1 - W) * B * float(uncond.mean())
    expected = 16 * (conditional if stop else conditional + unconditional)  # 2 * 2 * 4 latents
    np.testing.assert_allclose(jax.grad(total)(2.0), expected, rtol=1e-4)
    assert abs(unconditional) > 0.1  # else the two would not differ


def test_stopping_the_gradient_does_not_change_the_value(inputs):
    np.testing.assert_allclose(guided(make(2.0), *inputs, W, True), guided(make(2.0), *inputs, W), rtol=1e-6)


def test_the_difference_is_taken_in_float32(inputs):
    """In bfloat16, 5 * (cond - uncond) of nearly equal branches would be rounded once more."""
    latents, timesteps, context, uncond = inputs

    def network(*x):
        return make(0.01)(*x).astype(jnp.bfloat16)

    out = guided(network, latents, timesteps, context, uncond, W)
    assert out.dtype == jnp.float32
    cond = np.asarray(network(latents, timesteps, context), np.float64)
    null = np.asarray(network(latents, timesteps, jnp.broadcast_to(uncond, context.shape)), np.float64)
    np.testing.assert_allclose(out, null + W * (cond - null), rtol=1e-6)
