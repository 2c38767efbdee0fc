"""PickScore against the logits of transformers' CLIPModel, and its scale."""

import numpy as np
import pytest

from ddpo_jax.errors import InputError
from ddpo_jax.rewards import pickscore

PROMPTS = ["a red circle left of a blue square", "two striped green stars", "a dog", "a dog", "Zebra, 17!"]


@pytest.fixture(autouse=True)
def small(monkeypatch, h14_config):
    """The published network is the small one."""
    monkeypatch.setattr(pickscore, "PUBLISHED", pickscore.PUBLISHED._replace(config=h14_config))


def score(clip, images, **options):
    config = pickscore.default_config()
    config.update({"weights": "full", "clip": str(clip), "batch_size": 2, **options})
    return pickscore.make(config)(images, PROMPTS, [{}] * 5)


def test_score_is_the_logit_of_transformers(h14_folder, h14_model, cosines, processed, images):
    cosine = cosines(h14_model, processed(images), PROMPTS)
    assert np.ptp(cosine) > 0.1
    scores, parts = score(h14_folder, images)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, 97 * cosine, atol=97e-4)
    np.testing.assert_allclose(parts["pickscore_cosine"], cosine, atol=1e-4)
    as_prdp, _ = score(h14_folder, images, scale=0.01)
    np.testing.assert_allclose(as_prdp, 0.97 * cosine, atol=1e-4)


def test_the_file_alone_is_enough(h14_folder, images, tmp_path):
    for name in ("model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((h14_folder / name).read_bytes())
    want, _ = score(h14_folder, images)
    np.testing.assert_array_equal(score(tmp_path / "model.safetensors", images)[0], want)


def test_bfloat16_is_close(h14_folder, images):
    full, half = (score(h14_folder, images, dtype=dtype)[1]["pickscore_cosine"] for dtype in ("float32", "bfloat16"))
    assert 1e-5 < np.abs(full - half).max() < 0.05


def test_wrong_options_and_other_networks_are_named(h14_folder, clip_folder, images):
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match=r"reward.scale=.*: must be a positive number"):
            score(h14_folder, images, scale=scale)
    with pytest.raises(InputError, match=r"another network than that of yuvalkirstain/PickScore_v1: "):
        score(clip_folder, images)
    with pytest.raises(InputError, match=r"reward.weights='laion': must be mini or full"):
        score(h14_folder, images, weights="laion")
