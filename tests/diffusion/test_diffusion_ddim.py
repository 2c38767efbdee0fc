"""One denoising step against PyTorch: mean, std, log-probability, the DDPM posterior, the forward process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax.diffusion import ddim
from ddpo_jax.models import schema
from ddpo_jax.ops import gaussian

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
T, B, SHAPE = 10, 3, (4, 5, 4)


def draws(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def inputs():
    """Latents and network output, each [B, h, w, c]."""
    return draws(0, B, *SHAPE), draws(1, B, *SHAPE)


@pytest.mark.parametrize("prediction", schema.PREDICTION_TYPES)
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_mean_and_std_are_those_of_diffusers(inputs, prediction, to_one, eta):
    latents, output = inputs
    config = SD | {"prediction_type": prediction, "set_alpha_to_one": to_one, "steps_offset": 1}
    theirs = diffusers.DDIMScheduler(**config)
    theirs.set_timesteps(T)
    ours = ddim.make(config, T, eta)
    for index, timestep in enumerate(theirs.timesteps):
        mean, std = ours.step(jnp.asarray(output), jnp.asarray(latents), jnp.full(B, index))
        # the noise of the last step with set_alpha_to_one is 0, where diffusers' square root of -1e-9 is no number
        for noise in (0.0, 1.0) if index < T - 1 or not to_one else (0.0,):
            expected = theirs.step(
                torch.tensor(output), timestep, torch.tensor(latents),
                eta=eta if index < T - 1 or not to_one else 0.0, variance_noise=torch.full(latents.shape, noise),
            ).prev_sample  # fmt: skip
            np.testing.assert_allclose(mean + std[:, None, None, None] * noise, expected, rtol=1e-4, atol=1e-4)


def test_each_sample_may_be_at_its_own_step(inputs):
    latents, output = inputs
    made = ddim.make(SD | {"steps_offset": 1}, T, 1.0)
    mixed, std = made.step(jnp.asarray(output), jnp.asarray(latents), jnp.array([7, 0, 9]))
    for row, index in enumerate([7, 0, 9]):
        alone, alone_std = made.step(
            jnp.asarray(output[row : row + 1]), jnp.asarray(latents[row : row + 1]), jnp.array([index])
        )
        np.testing.assert_allclose(mixed[row], alone[0], rtol=1e-6)
        assert std[row] == alone_std[0]


def test_network_output_in_bfloat16_gives_float32_arithmetic(inputs):
    latents, output = (jnp.asarray(x, jnp.bfloat16) for x in inputs)
    made = ddim.make(SD | {"steps_offset": 1}, T, 1.0)
    index = jnp.full(B, 3)
    mean, std = made.step(output, latents, index)
    expected, _ = made.step(output.astype(jnp.float32), latents.astype(jnp.float32), index)
    assert mean.dtype == std.dtype == jnp.float32
    np.testing.assert_array_equal(mean, expected)


def test_log_prob_of_a_step_is_the_mean_of_a_normal_density(inputs):
    latents, output = inputs
    made = ddim.make(SD | {"steps_offset": 1, "set_alpha_to_one": False}, T, 1.0)
    for index in (0, 5, T - 1):
        mean, std = made.step(jnp.asarray(output), jnp.asarray(latents), jnp.full(B, index))
        drawn = np.asarray(mean) + np.asarray(std)[:, None, None, None] * draws(2, B, *SHAPE)
        normal = torch.distributions.Normal(
            torch.tensor(np.asarray(mean), dtype=torch.float64), float(np.asarray(std[0], np.float64))
        )
        expected = normal.log_prob(torch.tensor(drawn, dtype=torch.float64)).mean(dim=(1, 2, 3))
        np.testing.assert_allclose(gaussian.log_prob(jnp.asarray(drawn), mean, std), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("num_steps", [1000, 50])
def test_eta_one_is_the_ancestral_ddpm_step(inputs, monkeypatch, num_steps):
    """DDPM's posterior with variance fixed_small, from diffusers' own DDPMScheduler, to the last step (variance 0)."""
    latents, output = inputs
    config = SD | {"steps_offset": 0 if num_steps == 1000 else 1}
    theirs = diffusers.DDPMScheduler(**config, variance_type="fixed_small")
    theirs.set_timesteps(num_steps)
    ours = ddim.make(config | {"set_alpha_to_one": True}, num_steps, 1.0)
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps)
    for index in (0, num_steps // 2, num_steps - 2, num_steps - 1):
        mean, std = ours.step(jnp.asarray(output), jnp.asarray(latents), jnp.full(B, index))
        for noise in (0.0, 1.0):
            monkeypatch.setattr(
                "diffusers.schedulers.scheduling_ddpm.randn_tensor",
                lambda shape, noise=noise, **_: torch.full(tuple(shape), noise),
            )
            expected = theirs.step(torch.tensor(output), theirs.timesteps[index], torch.tensor(latents)).prev_sample
            np.testing.assert_allclose(mean + std[:, None, None, None] * noise, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", schema.PREDICTION_TYPES)
def test_add_noise_and_its_target_are_those_of_diffusers(prediction):
    clean, noise = draws(3, B, *SHAPE), draws(4, B, *SHAPE)
    timesteps = np.array([0, 500, 999])
    config = SD | {"prediction_type": prediction}
    theirs = diffusers.DDIMScheduler(**config)
    arguments = [torch.tensor(x) for x in (clean, noise, timesteps)]
    noised, target = ddim.make(config, T, 1.0).add_noise(*(jnp.asarray(x) for x in (clean, noise, timesteps)))
    np.testing.assert_allclose(noised, theirs.add_noise(*arguments), rtol=1e-5, atol=1e-5)
    expected = {"epsilon": noise, "v_prediction": theirs.get_velocity(*arguments), "sample": clean}[prediction]
    np.testing.assert_allclose(target, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", schema.PREDICTION_TYPES)
def test_the_target_of_training_predicts_the_clean_latents_and_the_noise(prediction):
    """A network that outputs its training target is right about both."""
    clean, noise = jnp.asarray(draws(5, B, *SHAPE)), jnp.asarray(draws(6, B, *SHAPE))
    made = ddim.make(SD | {"prediction_type": prediction}, T, 1.0)
    index = jnp.array([9, 6, 2])
    noised, target = made.add_noise(clean, noise, made.timesteps[index])
    x0, eps = made.predictions(target, noised, index)
    np.testing.assert_allclose(x0, clean, atol=2e-5)
    np.testing.assert_allclose(eps, noise, atol=2e-4)


def test_gradient_of_log_prob_flows_through_the_mean_and_not_through_the_sample(inputs):
    latents, output = map(jnp.asarray, inputs)
    made = ddim.make(SD | {"steps_offset": 1, "set_alpha_to_one": False}, T, 1.0)
    index = jnp.full(B, 4)

    def log_prob(output):
        mean, std = made.step(output, latents, index)
        drawn = mean + std[:, None, None, None] * draws(7, B, *SHAPE)
        return gaussian.log_prob(drawn, mean, std).sum()

    # d/d mean of -(x - mean)^2 / (2 std^2) is z / std; with x moving along, it would be 0
    mean, vjp = jax.vjp(lambda output: made.step(output, latents, index)[0], output)
    (expected,) = vjp(draws(7, B, *SHAPE) / made.std[4] / np.prod(SHAPE))
    np.testing.assert_allclose(jax.grad(log_prob)(output), expected, rtol=1e-3, atol=1e-5)
