"""Timestep weightings against numbers worked out by hand, and what every file of the family must satisfy."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpo_jax import find
from ddpo_jax.config import default_config
from ddpo_jax.config.override import override
from ddpo_jax.config.ready import make_ready
from ddpo_jax.diffusion import schedule
from ddpo_jax.ops import steps

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def make_schedule(num_steps, set_alpha_to_one=False):
    return schedule.make(BETAS | {"set_alpha_to_one": set_alpha_to_one}, num_steps, 1.0)


def options(name, **overrides):
    config = find.find("weighting", name).default_config()
    config.update(overrides)
    return config


def weigh(name, latents, the_schedule, **overrides):
    weights = find.find("weighting", name).weights
    return np.asarray(weights(jnp.asarray(latents), the_schedule, options(name, **overrides)))


# Two trajectories of three steps with latents of 1 x 2 x 1. The first moves by (1, -3), (2, 0), (0, 0); the second by
# (-1, -1), (0, 4), (1, 0).
PATHS = np.float32(
    [[[0, 0], [1, -3], [3, -3], [3, -3]], [[5, 5], [4, 4], [4, 8], [5, 8]]],
).reshape(2, 4, 1, 2, 1)


def test_latent_change():
    np.testing.assert_array_equal(weigh("latent_change", PATHS, make_schedule(3)), [[2, 1, 0], [1, 2, 0.5]])


def test_latent_change_squared():
    np.testing.assert_array_equal(weigh("latent_change_squared", PATHS, make_schedule(3)), [[5, 2, 0], [1, 8, 0.5]])


def test_normalised_over_the_trained_steps():
    weights = weigh("latent_change_squared", PATHS, make_schedule(3))
    got = steps.normalise(weights, np.array([True, True, False]))
    np.testing.assert_allclose(got, [[10 / 7, 4 / 7, 0], [2 / 9, 16 / 9, 0]], rtol=1e-6)


def test_uniform():
    np.testing.assert_array_equal(weigh("uniform", PATHS, make_schedule(3)), np.ones((2, 3)))


def test_ddim_std_is_the_ddpm_posterior_deviation():
    """Ho et al. 2020, Eq. 7, over the jumps of ten sampling steps, in float64 from the betas."""
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    alphas = np.cumprod(1 - betas)
    want = []
    for timestep in range(901, 0, -100):
        now, before = alphas[timestep], alphas[timestep - 100] if timestep >= 100 else alphas[0]
        beta = 1 - now / before  # of the jump
        want.append(math.sqrt((1 - before) / (1 - now) * beta))
    got = weigh("ddim_std", np.zeros((2, 11, 1, 1, 1), np.float32), make_schedule(10))
    np.testing.assert_allclose(got, [want, want], rtol=2e-6)
    assert (np.diff(want) < 0).all()  # "monotonically decreasing" ("Selective Timestep Weighting", section 4.2)


@pytest.mark.parametrize(
    "name, row",
    [  # five steps at positions 0, 1/4, 1/2, 3/4, 1: whole widths from the centre
        ("gaussian_early", [1, math.exp(-1 / 2), math.exp(-2), math.exp(-9 / 2), math.exp(-8)]),
        ("gaussian_middle", [math.exp(-2), math.exp(-1 / 2), 1, math.exp(-1 / 2), math.exp(-2)]),
        ("gaussian_late", [math.exp(-8), math.exp(-9 / 2), math.exp(-2), math.exp(-1 / 2), 1]),
    ],
)
def test_gaussians(name, row):
    latents = np.zeros((2, 6, 1, 1, 1), np.float32)
    np.testing.assert_allclose(weigh(name, latents, make_schedule(5)), [row, row], rtol=1e-6)


def test_gaussian_options():
    latents = np.zeros((1, 4, 1, 1, 1), np.float32)
    got = weigh("gaussian_early", latents, make_schedule(3), centre=1.0, width=0.5)
    np.testing.assert_allclose(got, [[math.exp(-2), math.exp(-1 / 2), 1]], rtol=1e-6)
    np.testing.assert_array_equal(weigh("gaussian_late", latents[:, :2], make_schedule(1), centre=0.0), [[1]])
    with pytest.raises(ValueError, match=r"weighting\.width: received 0\.0.*\n?") as caught:
        find.find("weighting", "gaussian_late").check(options("gaussian_late", width=0.0, centre=math.inf), 3)
    assert len(str(caught.value).splitlines()) == 2  # the centre as well


def table(tmp_path, content):
    path = tmp_path / "measure.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_advantage_variance(tmp_path):
    path = table(tmp_path, {"num_steps": 3, "branch_variance": {"mean": [9.0, 4.0, 1.0]}})
    latents = np.zeros((2, 4, 1, 1, 1), np.float32)
    got = weigh("advantage_variance", latents, make_schedule(3), table=path)
    np.testing.assert_array_equal(got, [[9, 4, 1]] * 2)
    # The last step turns what is left into the reward, so its own share is all of the last variance.
    got = weigh("advantage_variance", latents, make_schedule(3), table=path, form="increment")
    np.testing.assert_array_equal(got, [[5, 3, 1]] * 2)
    path = table(tmp_path, {"num_steps": 3, "branch_variance": {"mean": [4.0, 5.0, 1.0]}})  # noise: it cannot rise
    got = weigh("advantage_variance", latents, make_schedule(3), table=path, form="increment")
    np.testing.assert_array_equal(got, [[0, 4, 1]] * 2)


def test_increment_recovers_the_variances_of_a_sum(tmp_path):
    """A reward that is a sum of independent parts, part t decided by step t: the increments are their variances."""
    sigma = np.array([3.0, 0.5, 2.0, 1.0])
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(4, 200_000)) * sigma[:, None]
    path = table(tmp_path, {"branch_variance": {"mean": [draws[t:].sum(axis=0).var() for t in range(4)]}})
    latents = np.zeros((1, 5, 1, 1, 1), np.float32)
    got = weigh("advantage_variance", latents, make_schedule(4), table=path, form="increment")
    # An increment is var(x_t) + 2 cov(x_t, rest): its deviation is sqrt(2 s^4 + 4 s^2 rest) / sqrt(n), 0.043 at t = 0.
    np.testing.assert_allclose(got[0], sigma**2, atol=5 * 0.043)


@pytest.mark.parametrize(
    "content, overrides, message",
    [
        (None, {}, "received ''; it must be the path of a measure.json"),
        (None, {"table": "nowhere.json"}, "received 'nowhere.json'; it cannot be read: No such file"),
        ("{", {}, "it holds no row branch_variance.mean"),
        ({"x0_change": {}}, {}, "it holds no row branch_variance.mean"),
        ({"branch_variance": {"mean": [1.0] * 20}}, {}, "the table has T=20 but sample.num_steps=10"),
        ({"branch_variance": {"mean": [0.0] * 10}}, {}, "not all 0"),
        ({"branch_variance": {"mean": [1.0] * 9 + [-1.0]}}, {}, "0 or more"),
        ({"branch_variance": {"mean": [1.0] * 9 + [math.nan]}}, {}, "must be finite"),
        ({"branch_variance": {"mean": [1.0] * 10}}, {"form": "both"}, "received 'both'; it must be one of branch"),
    ],
)
def test_a_wrong_table_is_one_line_before_anything_is_loaded(tmp_path, content, overrides, message):
    config = default_config()
    given = {"model": "mini", "weighting.name": "advantage_variance"}
    if content is not None:
        given["weighting.table"] = table(tmp_path, content)
    given |= {f"weighting.{key}": value for key, value in overrides.items()}
    override(config, list(given.items()))
    with pytest.raises(ValueError) as caught:
        make_ready(config, "cpu", 1)
    (line,) = str(caught.value).splitlines()
    assert message in line and line.startswith("weighting.")


# ---- every file of the family ----


@pytest.mark.parametrize("name", find.available("weighting"))
def test_conformance(name, tmp_path):
    """Shape, dtype, one compilation, positive sums, and a trajectory's row that depends on that trajectory alone."""
    own = (
        {"table": table(tmp_path, {"branch_variance": {"mean": [5, 4, 3, 2]}})} if name == "advantage_variance" else {}
    )
    module, config, the_schedule = find.find("weighting", name), options(name, **own), make_schedule(4)
    compiled = []

    @jax.jit
    def weights(latents):
        compiled.append(1)
        return module.weights(latents, the_schedule, config)

    latents = np.random.default_rng(0).normal(size=(3, 5, 2, 2, 1)).astype(np.float32)
    got = np.asarray(weights(latents))
    changed = latents.copy()
    changed[1] = 7 * changed[1] + 1
    again = np.asarray(weights(changed))
    assert compiled == [1]
    assert got.shape == (3, 4) and got.dtype == np.float32
    np.testing.assert_array_equal(got[[0, 2]], again[[0, 2]])
    normalised = steps.normalise(got, the_schedule.trainable)
    np.testing.assert_allclose(normalised.mean(axis=1), 1, rtol=1e-6)
