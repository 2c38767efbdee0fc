"""A small linear-Gaussian denoising policy, written without the package: every term is differentiable in float64."""

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm
from ml_collections import ConfigDict

from ddpo_jax.types import Batch, StepTerms

N, T, D = 6, 4, 3  # two prompts of three samples
STD = np.array([1.0, 0.7, 0.5, 0.3])


def init(rng: np.random.Generator) -> dict:
    """Parameters: step t goes to N(w_t x + b_t, std_t^2); v_t is a linear value function, u_t a linear denoiser."""
    draw = {k: 0.5 * rng.normal(size=(T, D, D)) for k in "wu"} | {k: 0.5 * rng.normal(size=(T, D)) for k in "bv"}
    return {key: jnp.asarray(value) for key, value in draw.items()}


def mean(params: dict, latents: jax.Array, t: int) -> jax.Array:
    return latents @ params["w"][t].T + params["b"][t]


def pair_terms(params: dict, ref: dict, latents: jax.Array, rows: jax.Array, t: int) -> dict:
    """All terms [M, 1] of samples ``rows`` at step ``t``."""
    x, y, final = latents[rows, t], latents[rows, t + 1], latents[rows, -1]
    mu, ref_mu = mean(params, x, t), jax.lax.stop_gradient(mean(ref, x, t))
    out = {
        "log_prob": norm.logpdf(y, mu, STD[t]).mean(-1),
        "ref_log_prob": norm.logpdf(y, ref_mu, STD[t]).mean(-1),
        "kl": (jnp.square(mu - ref_mu) / (2 * STD[t] ** 2)).mean(-1),
        "noise_mse": jnp.square(mu - ref_mu).mean(-1),
        "denoise_mse": jnp.square(final - (final + 0.1 * (t + 1)) @ params["u"][t].T).mean(-1),
        "value": x @ params["v"][t],
    }
    return {key: value[:, None] for key, value in out.items()}


def all_terms(params: dict, ref: dict, latents: jax.Array) -> StepTerms:
    """All terms [N, T]."""
    steps = [pair_terms(params, ref, latents, jnp.arange(latents.shape[0]), t) for t in range(T)]
    return StepTerms(**jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *steps))


@functools.cache
def make_data(seed: int = 0, spread: float = 0.3, dtype: str = "float64") -> SimpleNamespace:
    """Trajectories of another policy than ``params``, with masked pairs; ``spread``: how far old log-probs are off."""
    rng = np.random.default_rng(seed)
    params, ref = init(rng), init(rng)
    ref = jax.tree.map(lambda p, r: p + 0.1 * r, params, ref)
    latents = jnp.asarray(rng.normal(size=(N, T + 1, D)))
    mask = np.ones((N, T))
    mask[1, 2] = mask[4, 0] = mask[4, 1] = 0
    terms = all_terms(params, ref, latents)
    batch = Batch(
        old_log_prob=terms.log_prob + spread * rng.normal(size=(N, T)),
        advantages=jnp.asarray(rng.normal(size=N)),
        rewards=jnp.asarray(rng.normal(size=N)),
        prompt_ids=jnp.array([0, 1, 0, 1, 1, 0]),
        mask=jnp.asarray(mask),
        clip_range=0.1,
        num_dims=D,
    )
    data = SimpleNamespace(params=params, ref=ref, latents=latents, terms=terms, batch=batch)
    for key in ("params", "ref", "latents", "terms", "batch"):
        cast = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == "float64" else x, getattr(data, key))
        setattr(data, key, cast)
    return data


def whole_loss(module, config, terms: StepTerms, batch: Batch) -> jax.Array:
    """The unreduced loss, with the penalty where the algorithm has one."""
    loss = module.loss(terms, batch, config)
    return loss + module.penalty(terms, batch, config) if hasattr(module, "penalty") else loss


def reduce(module, config, terms: StepTerms, batch: Batch) -> jax.Array:
    """The learner's reduction of an unreduced loss, with weights of 1."""
    loss = whole_loss(module, config, terms, batch)
    if module.traits(config).separable:
        return (loss * batch.mask).sum() / batch.mask.sum()
    return loss.mean()


@functools.cache
def jacobian(microbatch: int) -> dict:
    """Gradients of every term of every pair of ``make_data()``: leaves [N, T, parameter...], piece by piece."""
    data = make_data()
    of_piece = jax.jit(jax.jacrev(pair_terms), static_argnums=4)
    columns = []
    for t in range(T):
        rows = np.arange(N).reshape(-1, microbatch)
        pieces = [of_piece(data.params, data.ref, data.latents, r, t) for r in rows]
        columns.append(jax.tree.map(lambda *x: np.concatenate([np.asarray(y)[:, 0] for y in x]), *pieces))
    return jax.tree.map(lambda *x: np.stack(x, axis=1), *columns)


def two_pass(module, config, microbatch: int) -> dict:
    """Coefficients dL/dterms from all terms at once, then the sum of coefficient times gradient of the term."""
    data = make_data()
    used = module.traits(config).terms
    coefficients = jax.grad(lambda x: reduce(module, config, x, data.batch))(only(used, data.terms))
    total = {key: np.zeros(value.shape) for key, value in data.params.items()}
    for name in used:
        for key, gradient in jacobian(microbatch)[name].items():
            total[key] += np.tensordot(np.asarray(getattr(coefficients, name)), gradient, axes=2)
    return total


def only(names, terms: StepTerms) -> StepTerms:
    """Terms without those the algorithm did not ask for, as the learner hands them over."""
    return StepTerms(**{name: getattr(terms, name) for name in names})


def variants(module) -> list[ConfigDict]:
    """The default config with every combination of the alternatives in CHOICES."""
    choices = getattr(module, "CHOICES", {})
    out = []
    for values in itertools.product(*choices.values()):
        config = module.default_config()
        config.update(dict(zip(choices, values, strict=True)))
        out.append(config)
    return out


@pytest.fixture
def toy() -> SimpleNamespace:
    """The functions above, in float64 while the test runs."""
    with jax.enable_x64(True):
        yield SimpleNamespace(
            data=make_data,
            terms=all_terms,
            pair_terms=pair_terms,
            reduce=reduce,
            whole_loss=whole_loss,
            two_pass=two_pass,
            only=only,
            variants=variants,
            mean=mean,
            std=STD,
            replace=dataclasses.replace,
            shape=(N, T, D),
        )
