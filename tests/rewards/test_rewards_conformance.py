"""What every file of ddpo_jax/rewards must do. A new reward is tested without an edit here."""

import contextlib
import copy

import numpy as np
import pytest

from ddpo_jax import find
from ddpo_jax.rewards import _clip
from ddpo_jax.rollout.scoring import make_reward

PROMPTS = [
    "a red circle",
    "a striped blue star",
    "three green squares",
    "a red circle",
    "a pink ring above a black cross",
]
METADATA = [{"index": i} for i in range(5)]


def images():
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=find.available("rewards"))
def reward(request):
    """The reward with its default options on the embedded miniature, or with those of conftest's NAME_options."""
    module = find.find("rewards", request.param)
    config = module.default_config()
    with contextlib.suppress(pytest.FixtureLookupError):
        config.update(request.getfixturevalue(f"{request.param}_options"))
    for key, (mini, _) in getattr(module, "AUTO", {}).items():
        assert config[key] == "auto"
        config[key] = mini
    config.name = request.param
    try:
        return make_reward(config, module)
    except ValueError as error:
        if str(_clip.ASSETS) in str(error):
            pytest.skip(f"the embedded weights are not trained yet: {error}")
        raise


def test_scores_and_parts_are_float32_one_per_image(reward):
    for n in (1, 5):
        scores, parts = reward(images()[:n], PROMPTS[:n], METADATA[:n])
        for name, values in {"score": scores, **parts}.items():
            assert isinstance(values, np.ndarray), name
            assert values.dtype == np.float32 and values.shape == (n,), name
        assert np.isfinite(scores).all()


def test_deterministic_and_without_side_effects(reward):
    inputs = images(), list(PROMPTS), copy.deepcopy(METADATA)
    inputs[0].flags.writeable = False
    first, parts = reward(*inputs)
    again, parts_again = reward(*inputs)
    np.testing.assert_array_equal(first, again)
    for name in parts:
        np.testing.assert_array_equal(parts[name], parts_again[name])
    np.testing.assert_array_equal(inputs[0], images())
    assert inputs[1:] == (PROMPTS, METADATA)


def test_each_image_is_scored_on_its_own(reward):
    order = np.array([3, 1, 4, 0, 2])
    scores, parts = reward(images(), PROMPTS, METADATA)
    permuted, permuted_parts = reward(images()[order], [PROMPTS[i] for i in order], [METADATA[i] for i in order])
    np.testing.assert_allclose(permuted, scores[order], rtol=1e-5, atol=1e-5)
    for name in parts:
        np.testing.assert_allclose(permuted_parts[name], parts[name][order], rtol=1e-5, atol=1e-5)
    alone, _ = reward(images()[2:3], PROMPTS[2:3], METADATA[2:3])
    np.testing.assert_allclose(alone, scores[2:3], rtol=1e-5, atol=1e-5)


def test_scores_depend_on_the_image(reward):
    plain = np.full((5, 32, 32, 3), 128, np.uint8)
    assert not np.array_equal(reward(plain, PROMPTS, METADATA)[0], reward(images(), PROMPTS, METADATA)[0])
