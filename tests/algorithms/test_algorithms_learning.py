"""A solvable control problem: every method moves towards its known optimum; PRDP's loss is zero exactly there.

Two steps in two dimensions: x1 ~ N(x0 / 2 + b0, s^2), x2 ~ N(x1 / 2 + b1, s^2), x0 standard normal. The mean of x2 is
b0 / 2 + b1; with the reward -|x2 - goal|^2 + (a constant of the prompt) the best policies have that mean at the goal.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import norm

from ddpo_jax.find import available, find
from ddpo_jax.ops import gaussian
from ddpo_jax.ops.advantages import PromptStats, group_mean_baseline
from ddpo_jax.types import Batch, StepTerms

PROMPTS, SAMPLES, STD, GOAL = 8, 8, 0.5, np.array([1.5, -1.0])
IDS = np.repeat(np.arange(PROMPTS), SAMPLES)

# Options that suit rewards and dimensions of this problem, where the defaults are made for images
OPTIONS = {
    # a KL penalty moves the optimum itself: it lies 14 % short of the goal
    "prdp": {"kl_coef": 0.1, "reward_unit": "reward", "log_prob_reduction": "sum"},
    "ddpo_iskl": {"kl_coef": 0.05},
    "d3po": {"clip_range": 0.9},  # 2 dimensions instead of 16384: ratios of single steps move much more
    "dpok": {"reward_weight": 1.0},
    "rwr": {"temperature": 1.0, "reward_unit": "reward"},  # most of the deviation is between the prompts
}


def rollout(rng: np.random.Generator, bias: np.ndarray, shared_noise: bool, shared_steps: int) -> np.ndarray:
    """Latents [N, 3, 2]; the samples of a prompt share x0 if asked, and everything up to ``shared_steps``."""
    noise = rng.normal(size=(PROMPTS, SAMPLES, 3, 2))
    shared = max(shared_steps + 1 if shared_steps else 0, int(shared_noise))
    noise[:, :, :shared] = noise[:, :1, :shared]
    noise = noise.reshape(-1, 3, 2)
    x0 = noise[:, 0]
    x1 = x0 / 2 + bias[0] + STD * noise[:, 1]
    return np.stack([x0, x1, x1 / 2 + bias[1] + STD * noise[:, 2]], axis=1)


def step_terms(params: dict, latents: jax.Array) -> dict:
    means = latents[:, :-1] / 2 + params["bias"]
    ref_means = latents[:, :-1] / 2  # the pretrained policy has no bias
    noise = 0.5 * latents[:, :1]  # "noise" to be denoised: the final latents are predicted by the policy's mean
    prediction = jnp.broadcast_to(params["bias"][0] / 2 + params["bias"][1] + noise / 2, latents[:, 1:].shape)
    return {
        "log_prob": gaussian.log_prob(latents[:, 1:], means, STD, event_dims=1),
        "ref_log_prob": gaussian.log_prob(latents[:, 1:], ref_means, STD, event_dims=1),
        "kl": gaussian.kl(means, ref_means, STD, event_dims=1),
        "noise_mse": jnp.square(means - ref_means).mean(-1),
        "denoise_mse": jnp.square(latents[:, -1:] - prediction).mean(-1),
        "value": jnp.einsum("ntd,td->nt", latents[:, :-1], params["value"]) + params["value_bias"],
    }


def train(name: str, epochs: int) -> SimpleNamespace:
    module = find("algorithms", name)
    config = module.default_config()
    config.update(OPTIONS.get(name, {}))
    used = module.traits(config)
    params = {"bias": jnp.zeros((2, 2)), "value": jnp.zeros((2, 2)), "value_bias": jnp.zeros(2)}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05))

    def objective(function, params, latents, batch):
        terms = step_terms(params, latents)
        out = function(StepTerms(**{key: terms[key] for key in used.terms}), batch, config)
        return (out * batch.mask).sum() / batch.mask.sum() if used.separable else out.mean()

    @jax.jit
    def update(params, opt_state, latents, batch):
        functions = [getattr(module, part) for part in ("loss", "penalty", "value_loss") if hasattr(module, part)]
        grads = [jax.grad(objective, argnums=1)(function, params, latents, batch) for function in functions]
        grads = jax.tree.map(lambda *parts: sum(parts), *grads)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    rng, stats, opt_state = np.random.default_rng(0), PromptStats(), tx.init(params)
    old_log_prob = jax.jit(lambda params, latents: step_terms(params, latents)["log_prob"])
    for epoch in range(epochs):
        trained = module.interval(epoch, epochs, 2, config) if used.branching else 2
        latents = rollout(rng, np.asarray(params["bias"], np.float64), used.shared_noise, 2 - trained)
        rewards = -np.square(latents[:, -1] - GOAL).sum(-1) + IDS  # prompt p: p points for free
        advantages = module.advantages(rewards, IDS, stats, config)
        keep = module.select(advantages, IDS, config) if used.branching else np.ones(len(IDS), bool)
        mask = keep[:, None] * (np.arange(2) >= 2 - trained)
        latents = jnp.asarray(latents, jnp.float32)
        batch = Batch(
            old_log_prob=old_log_prob(params, latents),
            advantages=jnp.asarray(advantages, jnp.float32),
            rewards=jnp.asarray(rewards, jnp.float32),
            prompt_ids=jnp.asarray(IDS, jnp.int32),
            mask=jnp.asarray(mask, jnp.float32),
            clip_range=0.2,
            num_dims=2,
        )
        for _ in range(1 if used.on_policy else 3):
            params, opt_state = update(params, opt_state, latents, batch)
    bias = np.asarray(params["bias"])
    return SimpleNamespace(bias=bias, gap=np.linalg.norm(bias[0] / 2 + bias[1] - GOAL) / np.linalg.norm(GOAL))


@pytest.mark.parametrize("name", available("algorithms"))
def test_every_method_moves_towards_the_optimum(name):
    """The mean of x2 comes at least two thirds of the way to the goal."""
    assert train(name, epochs=60).gap < 1 / 3


SLOPE, BETA = np.array([0.8, -0.5]), 0.4  # for PRDP: reward SLOPE . x2, which leaves the optimum Gaussian
# pi* ~ pi_ref exp(r / beta): x2 is tilted by SLOPE / beta, and x1 by half of it (x2 depends on x1 / 2)
BEST = np.stack([0.5 * STD**2 * SLOPE / BETA, STD**2 * SLOPE / BETA])


def prdp_batch(bias: np.ndarray, old: np.ndarray, seed: int = 0) -> tuple[StepTerms, Batch]:
    """Samples of the policy ``old`` (the same x0 in a prompt), and the log-probs of policy ``bias``."""
    latents = rollout(np.random.default_rng(seed), old, shared_noise=True, shared_steps=0)

    def log_prob(b):
        return jnp.asarray(norm.logpdf(latents[:, 1:], latents[:, :-1] / 2 + b, STD).mean(-1))

    ones = jnp.ones((len(IDS), 2))
    rewards = jnp.asarray(latents[:, -1] @ SLOPE + 3.0 * IDS)
    advantages = jnp.asarray(group_mean_baseline(rewards, IDS))
    batch = Batch(log_prob(old), advantages, rewards, jnp.asarray(IDS), ones, clip_range=10.0, num_dims=2)
    return StepTerms(log_prob=log_prob(bias), ref_log_prob=log_prob(0 * bias)), batch


@pytest.mark.parametrize("proximal", [True, False])
def test_prdp_loss_is_zero_exactly_at_the_analytic_optimum(proximal):
    module = find("algorithms", "prdp")
    config = module.default_config()
    config.update(kl_coef=BETA, proximal=proximal, reward_unit="reward", log_prob_reduction="sum")
    with jax.enable_x64(True):
        for sampler in (BEST, 0 * BEST, BEST + 0.3):  # whoever sampled
            assert float(module.loss(*prdp_batch(BEST, sampler), config).max()) < 1e-24
        for other in (0 * BEST, 1.1 * BEST, BEST + np.array([[0.1, 0], [0, 0]])):
            assert float(module.loss(*prdp_batch(other, BEST), config).mean()) > 1e-3
        # Deng et al. 2024, Eq. 8: rhat = r / beta - log Z(prompt); Z is the reference's mean of exp(r / beta)
        terms, batch = prdp_batch(BEST, BEST)
        rhat = 2 * (terms.log_prob - terms.ref_log_prob).sum(axis=1)
        x0 = rollout(np.random.default_rng(0), BEST, True, 0)[:, 0]
        variance = STD**2 * (1 + 0.25)
        log_z = (x0 @ SLOPE / 4 + 3.0 * IDS) / BETA + 0.5 * variance * (SLOPE @ SLOPE) / BETA**2
        np.testing.assert_allclose(rhat, batch.rewards / BETA - log_z, rtol=0, atol=1e-12)


def test_prdp_descends_to_the_analytic_optimum():
    module = find("algorithms", "prdp")
    config = module.default_config()
    config.update(kl_coef=BETA, reward_unit="reward", log_prob_reduction="sum")

    @jax.jit
    def descend(bias, latents, batch):
        def loss(bias):
            log_prob = gaussian.log_prob(latents[:, 1:], latents[:, :-1] / 2 + bias, STD, event_dims=1)
            ref_log_prob = gaussian.log_prob(latents[:, 1:], latents[:, :-1] / 2, STD, event_dims=1)
            return module.loss(StepTerms(log_prob=log_prob, ref_log_prob=ref_log_prob), batch, config).mean()

        return bias - 0.01 * jax.grad(loss)(bias)

    with jax.enable_x64(True):
        bias = jnp.zeros((2, 2))
        for epoch in range(150):
            _, batch = prdp_batch(np.asarray(bias), np.asarray(bias), epoch)
            latents = rollout(np.random.default_rng(epoch), np.asarray(bias), shared_noise=True, shared_steps=0)
            bias = descend(bias, jnp.asarray(latents), batch)
    np.testing.assert_allclose(bias, BEST, atol=0.01)
