"""The CLIP score against transformers' CLIPModel, tokenizer and processor on random weights."""

import json
import shutil

import numpy as np
import pytest
from flax import nnx

from ddpo_jax.rewards import _clip, clip_score

PROMPTS = [
    "a red circle left of a blue square",
    "two striped green stars",
    "a red circle left of a blue square",
    "Zebra, 17!",
    "a photo of a dog and of far more than twelve tokens can hold of it",
]


def score(folder, images, **options):
    config = clip_score.default_config()
    config.update({"weights": "openai", "clip": str(folder), "batch_size": 2, **options})
    return clip_score.make(config)(images, PROMPTS, [{}] * 5)


@pytest.fixture(scope="module")
def cosine(clip_model, clip_folder, images):
    """Of image i and prompt i, by transformers alone."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = processor.from_pretrained(clip_folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip_folder)
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    pixels = processor(list(images), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    with torch.no_grad():
        out = clip_model(pixel_values=pixels, **tokens)
        return (out.logits_per_image.diag() / clip_model.logit_scale.exp()).numpy()


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
        with pytest.raises(ValueError, match=f"{key} = .* is not supported; {rule}"):
            _clip.Processor.from_folder(tmp_path, 56)
    other = processor | {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(other))
    pixels = _clip.Processor.from_folder(tmp_path, 56)(np.full((1, 56, 56, 3), 255, np.uint8))
    np.testing.assert_allclose(pixels, 2.0, atol=1e-6)


def test_wrong_options_are_named(clip_folder, images):
    with pytest.raises(ValueError, match=r"reward.scale='10': must be one of 1, 100, clipscore"):
        score(clip_folder, images, scale="10")
    with pytest.raises(ValueError, match=r"reward.weights='laion': must be mini or openai"):
        score(clip_folder, images, weights="laion")
    with pytest.raises(ValueError, match=r"reward.batch_size=0 must be at least 1"):
        score(clip_folder, images, batch_size=0)


def test_batches_pad_and_never_compile_twice():
    traced = []

    class Scale(nnx.Module):
        def __init__(self):
            self.by = nnx.Param(np.float32(3))

    def fn(model, rows):
        traced.append(rows.shape)
        return rows.sum(1) * model.by[...]

    run = _clip.in_batches(Scale(), fn, 4)
    for n in (1, 3, 4, 5, 9):
        rows = np.arange(2 * n, dtype=np.uint8).reshape(n, 2)
        out = run(rows)
        assert out.dtype == np.float32
        np.testing.assert_array_equal(out, 3 * rows.sum(1))
    assert traced == [(4, 2)]
