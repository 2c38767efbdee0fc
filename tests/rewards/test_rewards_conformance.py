"""What every file of ddpo_jax/rewards must do. A new reward is tested without an edit here."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import reward_needs

from ddpo_jax import find
from ddpo_jax.rewards._shared import clip as _clip
from ddpo_jax.rollout.scoring import make_reward

METADATA = [{"index": i} for i in range(5)]


@dataclasses.dataclass
class Case:
    """A reward and a batch of five that it can score."""

    fn: Callable
    prompts: list[str]
    images: Callable[[], np.ndarray]

    def __call__(self, images, order=slice(None)):
        """Scores and parts of the images; ``order`` picks the prompts and metadata that go with them."""
        rows = np.arange(5)[order]
        return self.fn(images, [self.prompts[i] for i in rows], [METADATA[i] for i in rows])


@pytest.fixture(scope="module", params=find.available("rewards"))
def reward(request, ready):
    """The reward with its default options on the embedded miniature, and those it cannot do without."""
    module = find.find("rewards", request.param)
    config = module.default_config()
    options, prompts, images = reward_needs.of(request.param)
    with contextlib.suppress(pytest.FixtureLookupError):
        options = request.getfixturevalue(f"{request.param}_options")  # of conftest: what takes files
    for key, (mini, _) in getattr(module, "AUTO", {}).items():
        assert config[key] == "auto"
        config[key] = mini
    config.update(options)
    config.name = request.param
    if request.param in ready:
        with ready[request.param](config) as meet:
            made = make_reward(config, module)
            meet(made)
            yield Case(made, prompts, images)
            made.close()
        return
    try:
        yield Case(make_reward(config, module), prompts, images)
    except ValueError as error:
        if str(_clip.ASSETS) in str(error):
            pytest.skip(f"the embedded weights are not trained yet: {error}")
        raise


def test_scores_and_parts_are_float32_one_per_image(reward):
    for n in (1, 5):
        scores, parts = reward(reward.images()[:n], slice(n))
        for name, values in {"score": scores, **parts}.items():
            assert isinstance(values, np.ndarray), name
            assert values.dtype == np.float32 and values.shape == (n,), name
        assert np.isfinite(scores).all()


def test_deterministic_and_without_side_effects(reward):
    inputs = reward.images(), list(reward.prompts), copy.deepcopy(METADATA)
    inputs[0].flags.writeable = False
    first, parts = reward.fn(*inputs)
    again, parts_again = reward.fn(*inputs)
    np.testing.assert_array_equal(first, again)
    for name in parts:
        np.testing.assert_array_equal(parts[name], parts_again[name])
    np.testing.assert_array_equal(inputs[0], reward.images())
    assert inputs[1:] == (reward.prompts, METADATA)


def test_each_image_is_scored_on_its_own(reward):
    order = np.array([3, 1, 4, 0, 2])
    scores, parts = reward(reward.images())
    permuted, permuted_parts = reward(reward.images()[order], order)
    np.testing.assert_allclose(permuted, scores[order], rtol=1e-5, atol=1e-5)
    for name in parts:
        np.testing.assert_allclose(permuted_parts[name], parts[name][order], rtol=1e-5, atol=1e-5)
    alone, _ = reward(reward.images()[2:3], slice(2, 3))
    np.testing.assert_allclose(alone, scores[2:3], rtol=1e-5, atol=1e-5)


def test_scores_depend_on_the_image(reward):
    plain = np.full((5, 32, 32, 3), 128, np.uint8)
    assert not np.array_equal(reward(plain)[0], reward(reward.images())[0])
