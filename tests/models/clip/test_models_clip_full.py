"""CLIP at its published sizes against transformers and open_clip, random weights: minutes and 10 GB each."""

import dataclasses

import numpy as np
import open_clip_oracle
import pytest
from flax import nnx

from ddpo_jax.models import clip, keys
from ddpo_jax.models.clip import names

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow


def inputs():
    """Two images, and two texts that end early and late."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 49405, (2, 77)).astype(np.int32)
    ids[:, 0], ids[0, 9:], ids[1, 76] = 49406, 49407, 49407
    return ids, rng.normal(size=(2, 224, 224, 3)).astype(np.float32)


def check(config, state_dict, text, image):
    """Both features of our network with these weights, to 1e-4."""
    ours = keys.load(clip.CLIP, config, names.to_transformers({key: x.numpy() for key, x in state_dict.items()}))
    ids, images = inputs()
    got = nnx.jit(lambda m, ids, images: (m.text_features(ids), m.image_features(images)))(ours, ids, images)
    for name, mine, theirs in zip(("text", "image"), got, (text, image), strict=True):
        error = np.abs(mine - theirs).max()
        print(f"{name}: std {theirs.std():.3f}, max abs error {error:.2e}")
        assert theirs.std() > 0.05 and error <= 1e-4


@pytest.mark.parametrize("name", ["B32", "L14", "H14"])
def test_equals_transformers(name):
    config = getattr(clip, name)
    towers = dataclasses.asdict(config)
    torch.manual_seed(0)
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=towers["text"], vision_config=towers["vision"], projection_dim=config.projection_dim
        )
    ).eval()
    ids, images = inputs()
    with torch.no_grad():
        text = theirs.get_text_features(torch.tensor(ids)).pooler_output.numpy()
        image = theirs.get_image_features(torch.tensor(images.transpose(0, 3, 1, 2))).pooler_output.numpy()
    check(config, theirs.state_dict(), text, image)


def test_h14_equals_open_clip():
    torch.manual_seed(0)
    theirs = open_clip_oracle.package().create_model("ViT-H-14", pretrained=None).eval()
    ids, images = inputs()
    with torch.no_grad():
        text = theirs.encode_text(torch.tensor(ids)).numpy()
        image = theirs.encode_image(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    check(clip.H14, theirs.state_dict(), text, image)
