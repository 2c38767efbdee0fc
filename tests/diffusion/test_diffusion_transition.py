"""Which noise process a diffusers folder asks for; another one needs no change of policy, sampler or learner."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from ddpo_jax import sharding
from ddpo_jax.diffusion import ddim, sampler, transition
from ddpo_jax.diffusion.policy import Policy
from ddpo_jax.errors import InputError
from ddpo_jax.training.learner import Learner, Minibatch, Objective
from ddpo_jax.types import Traits

diffusers = pytest.importorskip("diffusers")

SD = toy.STABLE_DIFFUSION | {"clip_sample": False}
N, T = 4, 5


@pytest.mark.parametrize("name", transition.DDIM_SCHEDULERS)
def test_an_accepted_scheduler_has_the_signal_levels_of_ddim(name):
    assert name in diffusers.schedulers.KarrasDiffusionSchedulers.__members__  # those that Stable Diffusion exchanges
    made = transition.make(SD | {"_class_name": name}, 10, 1.0)
    assert isinstance(made, ddim.DDIM)
    if name != "DPMSolverSDEScheduler":  # which needs another library only to be made
        theirs = getattr(diffusers, name)(**{key: SD[key] for key in ("beta_start", "beta_end", "beta_schedule")})
        np.testing.assert_allclose(made.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=3e-6)


@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "", None, 7, ["DDIMScheduler"]]
)
def test_another_scheduler_is_refused_by_name(name):
    with pytest.raises(InputError) as caught:
        transition.make(SD | {"_class_name": name}, 10, 1.0)
    message = str(caught.value)
    assert f"scheduler_config.json _class_name: received {name!r}; it must be one of DDIMScheduler, " in message
    assert "; use " in message and "\n" not in message


def test_a_config_without_a_class_is_that_of_ddim():
    assert isinstance(transition.make(SD, 10, 1.0), ddim.DDIM)


# ---- another member ----


@dataclasses.dataclass(frozen=True)
class RectifiedFlow:
    """x_t = (1 - t) clean + t noise, its network predicts noise - clean; sampled by the stochastic steps of Liu et al.
    2025, arXiv:2505.05470, Eq. 9, with a constant sigma. Written for this test from the contract alone."""

    times: tuple[float, ...]  # from 1 to 0, T + 1 of them
    sigma: float

    num_train_timesteps = 1000

    @property
    def num_steps(self):
        return len(self.times) - 1

    @property
    def timesteps(self):
        return 1000 * jnp.array(self.times[:-1])  # no whole numbers

    @property
    def std(self):
        return self.sigma * jnp.sqrt(-jnp.diff(jnp.array(self.times)))

    @property
    def trainable(self):
        return np.ones(self.num_steps, bool)

    def step(self, model_output, latents, index):
        now, after = (jnp.array(self.times)[i][:, None, None, None] for i in (index, index + 1))
        drift = model_output + self.sigma**2 / (2 * now) * (latents + (1 - now) * model_output)
        return latents + drift * (after - now), self.std[index]

    def predictions(self, model_output, latents, index):
        now = jnp.array(self.times)[index][:, None, None, None]
        return latents - now * model_output, latents + (1 - now) * model_output

    def add_noise(self, clean, noise, timesteps):
        now = timesteps[:, None, None, None] / 1000
        return (1 - now) * clean + now * noise, noise - clean


FLOW = RectifiedFlow((1.0, 0.8, 0.6, 0.4, 0.2, 0.0), 0.7)
PARAMS = toy.parameters()


@pytest.fixture(scope="module")
def drawn():
    context, uncond = toy.contexts(N)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(2)))(jnp.arange(N))
    policy = Policy(FLOW, toy.network, 1.0)
    return jax.jit(lambda *x: sampler.sample(policy, PARAMS, toy.FROZEN, *x, toy.SHAPE))(keys, context, uncond)


def velocity(params, latents, time, context):
    return np.asarray(toy.bound(params, latents, np.full(len(latents), 1000 * time), context), np.float64)


def test_the_sampler_walks_the_steps_of_another_process(drawn):
    """Against the update and the normal density written down for each step in float64."""
    context, _ = toy.contexts(N)
    for index, (now, after) in enumerate(zip(FLOW.times[:-1], FLOW.times[1:], strict=True)):
        latents, reached = (np.asarray(drawn.latents[:, index + k], np.float64) for k in (0, 1))
        v = velocity(PARAMS, latents.astype(np.float32), now, context)
        mean = latents + (v + 0.7**2 / (2 * now) * (latents + (1 - now) * v)) * (after - now)
        std = 0.7 * np.sqrt(now - after)
        z = (reached - mean) / std
        assert abs(z.mean()) < 4 / np.sqrt(z.size) and abs(z.var() - 1) < 4 * np.sqrt(2 / z.size)
        log_prob = (-(z**2) / 2 - np.log(std) - np.log(2 * np.pi) / 2).mean((1, 2, 3))
        np.testing.assert_allclose(drawn.log_prob[:, index], log_prob, rtol=1e-4, atol=1e-4)


def test_the_learner_trains_another_process(drawn):
    """The sampler's log-probabilities, the denoising loss of the right target, and a gradient."""
    context, uncond = toy.contexts(N)
    mesh = sharding.make_mesh(1, 1)
    batch = Minibatch(
        latents=drawn.latents,
        context=context,
        old_log_prob=drawn.log_prob,
        advantages=np.ones(N, np.float32),
        rewards=np.ones(N, np.float32),
        prompt_ids=np.arange(N, dtype=np.int32),
        steps=np.tile(np.arange(T, dtype=np.int32), (N, 1)),
        step_weight=np.ones((N, T), np.float32),
        penalty_weight=np.ones((N, T), np.float32),
        mask=np.ones((N, T), np.float32),
        seeds=np.arange(N, dtype=np.int32),
    )
    traits = Traits(terms=frozenset({"log_prob", "denoise_mse"}))
    objective = Objective(traits, lambda terms, batch: terms.denoise_mse - terms.log_prob, 0.1)
    learner = Learner(Policy(FLOW, toy.network, 1.0), objective, optax.sgd(0.1), mesh, 2)
    params = {name: jnp.asarray(value) for name, value in PARAMS.items()}
    terms = learner.log_prob(params, {}, toy.FROZEN, uncond, batch)
    np.testing.assert_allclose(terms.log_prob, drawn.log_prob, atol=1e-5)
    silent = {name: jnp.zeros_like(value) for name, value in params.items()}
    squares = learner.log_prob(silent, {}, {"bias": np.zeros(4, np.float32)}, uncond, batch).denoise_mse
    expected = 1 + np.square(drawn.latents[:, -1]).mean((1, 2, 3))  # of noise - clean, for a network that says 0
    np.testing.assert_allclose(squares.mean(axis=1), expected, rtol=0.25)
    _, metrics = learner.update(learner.init(params), {}, toy.FROZEN, uncond, batch)
    assert metrics["grad_norm"] > 0 and metrics["ratio_deviation"] < 1e-5
