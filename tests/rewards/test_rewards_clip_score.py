"""The CLIP score against transformers' CLIPModel, tokenizer and processor on random weights."""

import json
import shutil

import numpy as np
import pytest

from ddpo_jax.errors import InputError
from ddpo_jax.mini import world
from ddpo_jax.rewards import clip_score
from ddpo_jax.rewards._shared import clip as _clip

PROMPTS = [
    "a red circle left of a blue square",
    "two striped green stars",
    "a red circle left of a blue square",
    "Zebra, 17!",
    "a photo of a dog and of far more than twelve tokens can hold of it",
]


def score(folder, images, **options):
    config = clip_score.default_config()
    config.update({"weights": "B/32", "clip": str(folder), "batch_size": 2, **options})
    return clip_score.make(config)(images, PROMPTS, [{}] * 5)


@pytest.fixture(scope="module")
def cosine(cosines, processed, clip_model, images):
    """Of image i and prompt i, by transformers alone."""
    return cosines(clip_model, processed(images), PROMPTS)


def test_cosine_is_that_of_transformers(clip_folder, images, cosine):
    scores, parts = score(clip_folder, images)
    assert scores.dtype == np.float32
    assert np.ptp(cosine) > 0.1
    np.testing.assert_allclose(scores, cosine, atol=2e-4)
    np.testing.assert_array_equal(parts["clip_cosine"], scores)


def test_scales(clip_folder, images, cosine):
    assert (cosine < 0).any() and (cosine > 0).any()
    np.testing.assert_allclose(score(clip_folder, images, scale="100")[0], 100 * cosine, atol=2e-2)
    clipped, parts = score(clip_folder, images, scale="clipscore")
    np.testing.assert_allclose(clipped, 2.5 * np.maximum(cosine, 0), atol=5e-4)
    np.testing.assert_allclose(parts["clip_cosine"], cosine, atol=2e-4)


def test_old_torch_folder(clip_model, clip_folder, images, cosine, tmp_path):
    """OpenAI's B/32 repository holds a pickled state dict, with position_ids buffers."""
    torch = pytest.importorskip("torch")
    for file in clip_folder.glob("*.*"):
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()  # then CLIP's constants hold
    tensors = {name: value.clone() for name, value in clip_model.state_dict().items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    np.testing.assert_allclose(score(tmp_path, images)[0], cosine, atol=2e-4)


def test_a_processor_we_do_not_have_is_refused(clip_folder, tmp_path):
    processor = json.loads((clip_folder / "preprocessor_config.json").read_text())
    for key, value, rule in [
        ("resample", 2, "it must be 3"),
        ("crop_size", {"height": 48, "width": 48}, "it must be 56"),
        ("do_center_crop", False, "it must be True"),
    ]:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor | {key: value}))
        with pytest.raises(InputError, match=f"{key} = .* is not supported; {rule}"):
            _clip.Processor.from_folder(tmp_path, 56)
    other = processor | {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(other))
    pixels = _clip.Processor.from_folder(tmp_path, 56)(np.full((1, 56, 56, 3), 255, np.uint8))
    np.testing.assert_allclose(pixels, 2.0, atol=1e-6)


def test_bfloat16_is_close_and_is_not_float32(clip_folder, images, cosine):
    scores, _ = score(clip_folder, images, dtype="bfloat16")
    assert scores.dtype == np.float32
    assert 1e-5 < np.abs(scores - cosine).max() < 0.05


def test_the_miniature_has_its_own():
    config = clip_score.default_config()
    config.weights = "mini"
    scenes = world.sample_scenes(np.random.default_rng(0), 16)
    captions = world.captions(scenes)
    reward = clip_score.make(config)
    own, _ = reward(world.render_all(scenes), captions, [{}] * 16)
    other, _ = reward(world.render_all(scenes), captions[1:] + captions[:1], [{}] * 16)
    assert own.mean() > other.mean() + 0.3


def test_wrong_options_are_named(clip_folder, images):
    with pytest.raises(InputError, match=r"reward.scale='10': must be 1, 100 or clipscore"):
        score(clip_folder, images, scale="10")
    with pytest.raises(InputError, match=r"reward.weights='laion': must be mini, B/32 or L/14; auto follows the model"):
        score(clip_folder, images, weights="laion")
    with pytest.raises(InputError, match=r"reward.dtype='float16': must be float32 or bfloat16$"):
        score(clip_folder, images, dtype="float16")
    with pytest.raises(InputError, match=r"reward.batch_size=0 must be at least 1"):
        score(clip_folder, images, batch_size=0)
