"""Two-pass gradients against autodiff of each paper's own formula, written out with loops, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import multivariate_normal

from ddpo_jax.find import available, find


class Direct:
    """The quantities the papers' formulas are written in, from the parameters: densities by their covariance."""

    def __init__(self, toy, params):
        self.toy, self.params, self.data = toy, params, toy.data()
        self.batch = self.data.batch
        n, steps, self.dims = toy.shape
        self.pairs = [(i, t) for i in range(n) for t in range(steps) if self.batch.mask[i, t]]
        self.count = len(self.pairs)

    def steps(self, i):
        return [t for n, t in self.pairs if n == i]

    def density(self, params, i, t):
        """Log-density of the whole vector: the sum over dimensions."""
        mu = self.toy.mean(params, self.data.latents[i, t], t)
        return multivariate_normal.logpdf(self.data.latents[i, t + 1], mu, self.toy.std[t] ** 2 * jnp.eye(self.dims))

    def log_prob(self, i, t):
        return self.density(self.params, i, t) / self.dims

    def log_ratio(self, i, t):
        return self.log_prob(i, t) - self.batch.old_log_prob[i, t]

    def ref_log_ratio(self, i, t):
        return self.log_prob(i, t) - self.density(self.data.ref, i, t) / self.dims

    def prompt_pairs(self):
        ids = np.asarray(self.batch.prompt_ids)
        return [(a, b) for a, b in itertools.combinations(range(len(ids)), 2) if ids[a] == ids[b]]


def ppo(ratio, advantage, clip):
    """Gupta et al. 2025, Eq. 3, as a loss."""
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)


def importance_sampling(d, config, clip=None):
    clip = d.batch.clip_range if clip is None else clip
    return sum(ppo(jnp.exp(d.log_ratio(i, t)), d.batch.advantages[i], clip) for i, t in d.pairs) / d.count


def score_function(d, config):
    return -sum(d.log_prob(i, t) * d.batch.advantages[i] for i, t in d.pairs) / d.count


def trajectory(d):
    total = 0.0
    for i in range(d.toy.shape[0]):
        weight = jnp.exp(sum(d.log_ratio(i, t) for t in d.steps(i)))
        total += ppo(weight, d.batch.advantages[i], d.batch.clip_range)
    return total / d.count


def ddpo(d, config):
    return importance_sampling(d, config) if config.ratio_level == "step" else trajectory(d)


def ddpo_iskl(d, config):
    """Gao et al. 2025, Algorithm 5, line 31."""
    scale = d.dims if config.log_prob_reduction == "sum" else 1
    drift = [scale * sum(d.ref_log_ratio(i, t) for t in d.steps(i)) for i in range(d.toy.shape[0])]
    return ddpo(d, config) + sum(config.kl_coef / 2 * x**2 for x in drift) / d.count


def dpok(d, config):
    total = 0.0
    for i, t in d.pairs:
        x = d.data.latents[i, t]
        value = float(x @ d.data.params["v"][t])  # a number: the policy's gradient does not reach it
        ratio, advantage, clip = jnp.exp(d.log_ratio(i, t)), d.batch.rewards[i] - value, d.batch.clip_range
        clamped = -advantage * jnp.clip(ratio, 1 - clip, 1 + clip)
        total += config.reward_weight * (ppo(ratio, advantage, clip) if config.surrogate == "clip" else clamped)
        gap = jnp.sum((d.toy.mean(d.params, x, t) - d.toy.mean(d.data.ref, x, t)) ** 2) / d.dims
        total += config.kl_coef * (gap / (2 * d.toy.std[t] ** 2) if config.kl_form == "gaussian" else gap)
    return total / d.count


def prdp(d, config):
    """Deng et al. 2024, Eq. 14 and 18-21; Algorithm 1, line 10, with equally many images of every prompt."""
    scale = d.dims if config.log_prob_reduction == "sum" else 1
    epsilon = scale * d.batch.clip_range
    plain, clipped = [], []
    for i in range(d.toy.shape[0]):
        rhat = [scale * d.ref_log_ratio(i, t) for t in d.steps(i)]
        moved = [scale * d.log_ratio(i, t) for t in d.steps(i)]  # rhat - rhat_old
        old = [r - m for r, m in zip(rhat, moved, strict=True)]
        plain.append(sum(rhat))
        clipped.append(
            sum(o + jnp.clip(m, -epsilon, epsilon) for o, m in zip(map(jax.lax.stop_gradient, old), moved, strict=True))
        )
    total = 0.0
    for a, b in d.prompt_pairs():
        target = (d.batch.advantages[a] - d.batch.advantages[b]) / config.kl_coef  # rewards off the prompt's mean
        first, second = (plain[a] - plain[b] - target) ** 2, (clipped[a] - clipped[b] - target) ** 2
        total += jnp.maximum(first, second) if config.proximal else first
    return total / len(d.prompt_pairs())


def rwr(d, config):
    total = 0.0
    for i, t in d.pairs:
        final = d.data.latents[i, -1]
        error = final - d.params["u"][t] @ (final + 0.1 * (t + 1))
        total += d.batch.advantages[i] * jnp.sum(error**2) / d.dims
    return total / d.count


def d3po(d, config):
    scale = d.dims if config.log_prob_reduction == "sum" else 1
    losses = []
    for a, b in d.prompt_pairs():
        h = {True: (1, -1), False: (-1, 1)}[bool(d.batch.rewards[a] > d.batch.rewards[b])]
        for t in sorted(set(d.steps(a)) & set(d.steps(b))):
            logs = [
                jnp.log(jnp.clip(jnp.exp(scale * d.ref_log_ratio(i, t)), 1 - config.clip_range, 1 + config.clip_range))
                for i in (a, b)
            ]
            z = config.beta * (h[0] * logs[0] + h[1] * logs[1])
            losses.append(-jnp.log(1 / (1 + jnp.exp(-z))))
    return sum(losses) / len(losses)


FORMULAS = {
    "ddpo": ddpo,
    "ddpo_sf": score_function,
    "ddpo_iskl": ddpo_iskl,
    "reinforce": score_function,
    "reinforce_bc": score_function,
    "rloo": score_function,
    "loop": importance_sampling,
    "grpo": importance_sampling,
    "dpok": dpok,
    "b2_diffurl": lambda d, config: importance_sampling(d, config, clip=0.1),
    "prdp": prdp,
    "rwr": rwr,
    "rwr_sparse": rwr,
    "d3po": d3po,
}


def test_every_algorithm_of_the_package_has_a_formula_here():
    assert set(available("algorithms")) == set(FORMULAS)


def test_data_reach_both_sides_of_every_clip(toy):
    """Otherwise a clip that does nothing would pass."""
    data = toy.data()
    ratio = jnp.exp(data.terms.log_prob - data.batch.old_log_prob)
    for side in (ratio > 1.1, ratio < 0.9, jnp.abs(ratio - 1) < 0.1):
        for sign in (1, -1):
            assert (side & (sign * data.batch.advantages[:, None] > 0)).any()
    ref_ratio = jnp.exp(data.terms.log_prob - data.terms.ref_log_prob)
    assert (ref_ratio > 1.1).any() and (ref_ratio < 0.9).any() and (jnp.abs(ref_ratio - 1) < 0.1).any()


@pytest.mark.parametrize("name", FORMULAS)
def test_two_pass_gradient_is_that_of_the_papers_formula(name, toy):
    module, data = find("algorithms", name), toy.data()
    configs = toy.variants(module)
    if name == "prdp":
        configs += [c.copy_and_resolve_references() for c in configs]
        for config in configs[: len(configs) // 2]:
            config.proximal = False
    for config in configs:
        value, direct = jax.value_and_grad(lambda p, c=config: FORMULAS[name](Direct(toy, p), c))(data.params)
        got = toy.reduce(module, config, toy.only(module.traits(config).terms, data.terms), data.batch)
        np.testing.assert_allclose(got, value, rtol=1e-12)
        two_pass = toy.two_pass(module, config, 3)
        scale = max(float(jnp.abs(x).max()) for x in direct.values())
        assert scale > 1e-3
        for key, want in direct.items():
            np.testing.assert_allclose(two_pass[key], want, rtol=0, atol=1e-10 * max(1, scale), err_msg=key)


def test_trajectory_ratio_has_the_gradient_of_algorithm_4(toy):
    """Gao et al. 2025, Algorithm 4, write -(w A) l with w a constant; inside the clip -A w has the same gradient."""
    module, data = find("algorithms", "ddpo"), toy.data()
    config = module.default_config()
    config.ratio_level = "trajectory"
    batch = toy.replace(data.batch, clip_range=1e9)

    def pseudo_code(log_prob):
        summed = (log_prob * batch.mask).sum(axis=1)
        weight = jax.lax.stop_gradient(jnp.exp(summed - (batch.old_log_prob * batch.mask).sum(axis=1)))
        return -(weight * batch.advantages * summed).sum() / batch.mask.sum()

    log_prob = data.terms.log_prob
    got = jax.grad(lambda x: toy.reduce(module, config, toy.replace(data.terms, log_prob=x), batch))(log_prob)
    np.testing.assert_allclose(got, jax.grad(pseudo_code)(log_prob), rtol=0, atol=1e-12)


def test_trajectory_and_step_ratio_agree_on_the_first_update(toy):
    module, data = find("algorithms", "ddpo"), toy.data()
    batch = toy.replace(data.batch, old_log_prob=data.terms.log_prob)
    grads = []
    for level in ("step", "trajectory"):
        config = module.default_config()
        config.ratio_level = level
        grads.append(jax.grad(lambda x, c=config: toy.reduce(module, c, x, batch))(data.terms).log_prob)
    np.testing.assert_allclose(*grads, rtol=0, atol=1e-15)


def test_dpok_value_loss_reaches_the_value_alone(toy):
    module, data = find("algorithms", "dpok"), toy.data()
    config = module.default_config()
    grad = jax.grad(lambda x: module.value_loss(x, data.batch, config).sum())(data.terms)
    np.testing.assert_allclose(grad.value, 2 * (data.terms.value - data.batch.rewards[:, None]))
    assert all(float(jnp.abs(getattr(grad, term)).max()) == 0 for term in ("log_prob", "kl", "noise_mse"))
    policy = jax.grad(lambda x: module.loss(x, data.batch, config).sum())(data.terms)
    assert float(jnp.abs(policy.value).max()) == 0
