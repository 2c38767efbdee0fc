"""The compressibility rewards: the anchor of the specification, and the file sizes that a viewer would see."""

import numpy as np
import PIL.Image
import pytest
from ml_collections import ConfigDict

from ddpo_jax.rewards import jpeg_compressibility, jpeg_incompressibility


def score(module, images):
    return module.make(ConfigDict(module.default_config()))(images, [""] * len(images), [{}] * len(images))


def test_black_image_is_the_published_anchor():
    scores, parts = score(jpeg_compressibility, np.zeros((1, 512, 512, 3), np.uint8))
    assert scores[0] == pytest.approx(-4.723, abs=5e-7)
    assert parts["jpeg_kb"][0] == pytest.approx(4.723, abs=5e-7)


def test_size_is_that_of_the_file_on_disk_and_signs_are_opposite(tmp_path):
    rng = np.random.default_rng(0)
    images = np.stack([rng.integers(0, 256, (48, 40, 3)), np.full((48, 40, 3), 200)]).astype(np.uint8)
    less, _ = score(jpeg_compressibility, images)
    more, _ = score(jpeg_incompressibility, images)
    assert more[0] > more[1] > 0  # noise takes more bytes than a plain colour, and that is what it rewards
    for i, image in enumerate(images):
        PIL.Image.fromarray(image).save(tmp_path / "x.jpg", quality=95)
        assert more[i] == pytest.approx((tmp_path / "x.jpg").stat().st_size / 1000, abs=1e-6)
    np.testing.assert_array_equal(less, -more)
