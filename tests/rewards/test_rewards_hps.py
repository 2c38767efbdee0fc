"""HPS against transformers' CLIPModel and torch's interpolation: both versions' files, preprocessing, refusals."""

import json

import numpy as np
import pytest

from ddpo_jax.errors import InputError
from ddpo_jax.models import preprocess
from ddpo_jax.rewards import hps

PROMPTS = ["a red circle left of a blue square", "two striped green stars", "a dog", "a dog", "Zebra, 17!"]
FILE = "HPS_v2.1_compressed.pt"


@pytest.fixture(autouse=True)
def small(monkeypatch, h14_config):
    """The published network is the small one."""
    small = {name: published._replace(config=h14_config) for name, published in hps.VERSIONS.items()}
    monkeypatch.setattr(hps, "VERSIONS", small)


def score(clip, images, **options):
    config = hps.default_config()
    config.update({"weights": "full", "clip": str(clip), "batch_size": 2, **options})
    scores, parts = hps.make(config)(images, PROMPTS, [{}] * 5)
    assert scores.dtype == np.float32 and parts == {}
    return scores


def by_torch(images, size, antialias=True):
    """The published preprocessing, in torch alone: pixels f32[N,3,size,size]."""
    torch = pytest.importorskip("torch")
    x = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
    scale = size / max(x.shape[2:])
    inner = [round(side * scale) for side in x.shape[2:]]
    x = torch.nn.functional.interpolate(x, size=inner, mode="bicubic", align_corners=False, antialias=antialias)
    down, right = (size - side for side in inner)
    x = torch.nn.functional.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (preprocess.CLIP_MEAN, preprocess.CLIP_STD))
    return (x - mean) / std


@pytest.mark.parametrize("antialias", [True, False])
def test_pixels_are_those_of_torch(images, antialias):
    for shape in ((72, 60), (60, 60), (33, 60), (57, 13)):
        crop = images[:, : shape[0], : shape[1]]
        got = np.asarray(hps.pixels(crop, 56, antialias)).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(got, by_torch(crop, 56, antialias).numpy(), atol=1e-4)
        side = np.abs(got[0, 0] - (0 - preprocess.CLIP_MEAN[0]) / preprocess.CLIP_STD[0]) < 1e-6
        assert side.all(axis=0).sum() == 56 - round(56 * shape[1] / max(shape))  # black, not grey, beside the picture


@pytest.mark.parametrize("antialias", [True, False])
def test_score_is_the_plain_cosine(hps_folder, h14_model, cosines, images, antialias):
    want, other = (cosines(h14_model, by_torch(images, 56, x), PROMPTS) for x in (antialias, not antialias))
    assert np.ptp(want) > 0.1 and np.abs(want - other).max() > 2e-3  # the option matters
    np.testing.assert_allclose(score(hps_folder / FILE, images, antialias=antialias), want, atol=1e-4)


def test_prompts_are_cleaned_as_open_clip_does():
    assert hps.cleaned("a cat\u2019s \u201chat\u201d, Tom &amp;amp; Jerry") == 'a cat\'s "hat", Tom & Jerry'
    assert hps.cleaned("a cat's hat") == "a cat's hat"


def test_all_ways_to_give_the_weights_are_the_same(hps_folder, h14_folder, images, tmp_path, monkeypatch):
    want = score(hps_folder / FILE, images)
    np.testing.assert_array_equal(score(h14_folder, images), want)  # converted to transformers' format
    (tmp_path / "HPS_v2_compressed.pt").write_bytes((hps_folder / FILE).read_bytes())
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((hps_folder / name).read_bytes())
    np.testing.assert_array_equal(score(tmp_path, images, version="v2"), want)  # a file inside its folder

    # From a folder of published files: the weights of one repository, the tokenizer of another.
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    store = tmp_path / "store"
    (store / "xswu/HPSv2").mkdir(parents=True)
    (store / "xswu/HPSv2/HPS_v2_compressed.pt").write_bytes((hps_folder / FILE).read_bytes())
    with pytest.raises(InputError, match=r"weights clip_tokenizer: tokenizer.json of the hub repository openai/"):
        score("", images, version="v2", weights_dir=str(store))
    (store / "tokenizer.json").write_bytes((h14_folder / "tokenizer.json").read_bytes())
    (store / "tokenizer_config.json").write_bytes((h14_folder / "tokenizer_config.json").read_bytes())
    np.testing.assert_array_equal(score("", images, version="v2", weights_dir=str(store)), want)


def test_bfloat16_is_close(hps_folder, images):
    full, half = score(hps_folder, images), score(hps_folder, images, dtype="bfloat16")
    assert 1e-5 < np.abs(full - half).max() < 0.05


def test_the_other_version_and_other_networks_are_refused(hps_folder, clip_folder, h14_folder, images, tmp_path):
    with pytest.raises(InputError, match=r"reward.version='v2': received the weights of v2.1 .*HPS_v2_compressed.pt"):
        score(hps_folder / FILE, images, version="v2")
    with pytest.raises(InputError, match=r"no config.json there and no HPS_v2_compressed.pt"):
        score(hps_folder, images, version="v2")
    with pytest.raises(InputError, match=r"another network than that of xswu/HPSv2: .*text.hidden_act = 'quick_gelu'"):
        score(clip_folder, images)
    for file in h14_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = 4  # the same tensors fit, the scores would be wrong
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"vision.num_attention_heads = 4 instead of 2; give that one's weights"):
        score(tmp_path, images)
    with pytest.raises(InputError, match=r"reward.version='v3': must be v2 or v2.1"):
        score(hps_folder, images, version="v3")
    with pytest.raises(InputError, match=r"reward.weights='auto': must be mini or full; auto follows the model"):
        score(hps_folder, images, weights="auto")
