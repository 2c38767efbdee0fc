"""The verifier as a reward: which categories are scored, and that its weights know the miniature's world."""

import numpy as np
import pytest
from flax import nnx

from ddpo_jax.mini import verifier, world
from ddpo_jax.rewards import mini_verifier
from ddpo_jax.rewards._shared import clip as _clip
from ddpo_jax.rollout.scoring import RewardError, RewardRunner

PROMPTS = ["a red circle", "three dotted blue stars", "a red circle above a striped green square"]
APPLIES = {  # the categories of T2I-CompBench each prompt speaks of
    "color": [True, True, True],
    "shape": [True, True, True],
    "spatial": [False, False, True],
    "numeracy": [False, True, False],
}


def make(**options):
    config = mini_verifier.default_config()
    config.update(options)
    return mini_verifier.make(config)


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    verifier.Verifier(verifier.init(nnx.Rngs(0))).save(folder / "verifier")
    return folder


@pytest.fixture
def untrained(assets, monkeypatch):
    monkeypatch.setattr(_clip, "ASSETS", assets)


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def test_parts_apply_where_the_prompt_speaks_of_them(untrained, pictures):
    with RewardRunner(make(), name="mini_verifier") as runner:
        scores, parts = runner.submit(pictures, PROMPTS, [{}] * 3).result()
    assert set(parts) == set(mini_verifier.CATEGORIES)
    for name, applies in APPLIES.items():
        np.testing.assert_array_equal(~np.isnan(parts[name]), applies, err_msg=name)
    np.testing.assert_allclose(scores, np.nanmean(np.stack(list(parts.values())), axis=0), rtol=1e-5)
    assert np.all((scores >= 0) & (scores <= 1))


def test_one_category_alone(untrained, pictures):
    scores, parts = make(parts="shape")(pictures, PROMPTS, [{}] * 3)
    np.testing.assert_array_equal(scores, parts["shape"])
    with pytest.raises(ValueError, match=r"reward.parts='spatial': prompt 'a red circle' says nothing of it"):
        make(parts="spatial")(pictures, PROMPTS, [{}] * 3)


def test_what_cannot_be_scored_is_one_line(untrained, pictures, tmp_path, monkeypatch):
    with RewardRunner(make(), name="mini_verifier") as runner:
        with pytest.raises(RewardError, match=r"'mini_verifier' raised InputError: .*'a green dragon'") as caught:
            runner.submit(pictures, ["a red circle", "a green dragon", "a red circle"], [{}] * 3).result()
        assert "\n" not in str(caught.value)
        with pytest.raises(RewardError, match=r"3,\s?64,\s?64,\s?3"):
            runner.submit(np.zeros((3, 64, 64, 3), np.uint8), PROMPTS, [{}] * 3).result()
    with pytest.raises(ValueError, match=r"reward.parts='colour': must be one of all, color, shape"):
        make(parts="colour")
    monkeypatch.setattr(_clip, "ASSETS", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"reward.name='mini_verifier'.*ddpo_jax pretrain"):
        make()


def test_embedded_weights_tell_right_pictures_from_wrong_ones():
    if not (_clip.ASSETS / "verifier").is_dir():
        pytest.skip("the embedded verifier is not trained yet: ddpo_jax pretrain")
    scenes = world.sample_scenes(np.random.default_rng(1), 64)
    images, captions = world.render_all(scenes), world.captions(scenes)
    reward = make()
    right = reward(images, captions, [{}] * 64)[0]
    wrong = reward(images, captions[1:] + captions[:1], [{}] * 64)[0]
    assert right.mean() > 0.9
    assert wrong.mean() < 0.5
