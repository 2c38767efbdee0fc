"""Preprocessing against Pillow, torch's float64 interpolation and the CLIP processor of transformers."""

import jax
import numpy as np
import PIL.Image
import pytest

from ddpo_jax.models import preprocess

SIZES = [  # from, to: square, odd, one side only, up, down, both at once, extreme
    ((512, 512), (224, 224)),
    ((32, 32), (224, 224)),
    ((131, 97), (50, 61)),
    ((40, 61), (64, 97)),
    ((33, 32), (33, 17)),
    ((97, 131), (40, 200)),
    ((7, 400), (3, 224)),
    ((300, 2), (224, 1)),
]


def photo(height, width, seed=0):
    """Noise over a gradient: has every frequency and saturates at both ends."""
    ramp = np.linspace(-40, 290, width)[None, None, :, None]
    return np.clip(ramp + np.random.default_rng(seed).normal(0, 60, (2, height, width, 3)), 0, 255).astype(np.uint8)


def edges(height, width):
    """A black and white corner, and thin stripes: where a cubic overshoots."""
    corner = np.zeros((height, width, 3), np.uint8)
    corner[height // 3 :, width // 2 :] = 255
    stripes = np.broadcast_to(
        np.where(np.arange(width) % 3 == 0, 255, 10).astype(np.uint8)[None, :, None], corner.shape
    )
    return np.stack([corner, stripes])


def gradient(height, width):
    """Smooth in both directions, so that every rounding shows."""
    y, x = np.mgrid[0:height, 0:width]
    levels = 255 * (y / height + x / width) / 2
    return np.repeat(np.stack([levels, 255 - levels])[..., None], 3, axis=-1).astype(np.uint8)


@pytest.mark.parametrize("picture", [photo, edges, gradient])
@pytest.mark.parametrize(("size_in", "size_out"), SIZES)
def test_pil_path_is_pillow(picture, size_in, size_out):
    images = picture(*size_in)
    images.flags.writeable = False  # as rewards get them
    pillow = [PIL.Image.fromarray(x).resize(size_out[::-1], PIL.Image.Resampling.BICUBIC) for x in images]
    np.testing.assert_array_equal(preprocess.resize_pil(images, *size_out), np.stack([np.asarray(x) for x in pillow]))


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("picture", [photo, edges, gradient])
@pytest.mark.parametrize(("size_in", "size_out"), SIZES)
def test_float_path_is_bicubic_of_torch(picture, size_in, size_out, antialias):
    torch = pytest.importorskip("torch")
    images = picture(*size_in).astype(np.float32)
    ours = np.asarray(preprocess.resize_float(images, *size_out, antialias))
    nchw = torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(nchw, size=size_out, mode="bicubic", antialias=antialias)
    # float64 oracle: torch's own float32 weights are off by up to 3e-3 levels.
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=1.1e-4, rtol=0)


def test_float_path_is_not_rounded_or_clipped():
    edge = np.zeros((1, 8, 8, 3), np.float32)
    edge[:, :, 4:] = 255
    out = np.asarray(jax.jit(preprocess.resize_float, static_argnums=(1, 2))(edge, 8, 32))
    assert out.min() < -1 and out.max() > 256  # bicubic overshoots at an edge


def test_cubic_weights_by_hand():
    # Doubling two pixels: centres at -0.25, 0.25, ... the cubic with a = -0.5 at distances 0.25 and 0.75 and the
    # taps outside dropped: w(.25) = 1.5/64 - 2.5/16 + 1 = 0.8671875, w(.75) = 1.5*27/64 - 2.5*9/16 + 1 = 0.2265625.
    row = np.array([0.8671875, 0.2265625]) / (0.8671875 + 0.2265625)
    matrix = preprocess.bicubic_matrix(2, 4)
    np.testing.assert_allclose(matrix[1], row, atol=1e-12)
    np.testing.assert_allclose(matrix[2], row[::-1], atol=1e-12)
    np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-12)


def test_cubic_weights_without_antialias_by_hand():
    # Halving four pixels: centres at 0.5, 2.5 between pixels 0 and 1, 2 and 3; a = -0.75 at distances 0.5 and 1.5:
    # w(.5) = 1.25/8 - 2.25/4 + 1 = 0.59375, w(1.5) = -0.75 (3.375 - 11.25 + 12 - 4) = -0.09375; edges repeat.
    near, far = 0.59375, -0.09375
    want = [[near + far, near, far, 0], [0, far, near, near + far]]
    np.testing.assert_allclose(preprocess.bicubic_matrix(4, 2, antialias=False), want, atol=1e-12)


@pytest.mark.parametrize("shape", [(96, 96), (97, 60), (60, 97), (24, 24), (33, 400), (32, 32)])
def test_crop_is_the_clip_processor(shape):
    transformers = pytest.importorskip("transformers")
    processor_class = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = processor_class(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    images = photo(*shape)
    theirs = processor(list(images), return_tensors="np", input_data_format="channels_last")["pixel_values"]
    ours = preprocess.clip_crop(images, 32)
    assert ours.shape == (2, 32, 32, 3) and ours.dtype == np.uint8
    levels = (theirs.transpose(0, 2, 3, 1) * preprocess.CLIP_STD + preprocess.CLIP_MEAN) * 255
    np.testing.assert_allclose(ours, levels, atol=1e-3)  # equal levels
    np.testing.assert_allclose(preprocess.normalize(ours / np.float32(255)), theirs.transpose(0, 2, 3, 1), atol=1e-6)


def test_an_image_of_the_right_size_is_left_alone():
    images = photo(32, 32)
    np.testing.assert_array_equal(preprocess.clip_crop(images, 32), images)


def test_the_path_matters():
    images = photo(96, 96)
    pil = preprocess.resize_pil(images, 32, 32).astype(np.float32)
    exact, other = (np.asarray(preprocess.resize_float(images.astype(np.float32), 32, 32, x)) for x in (True, False))
    assert np.abs(np.clip(exact, 0, 255) - pil).max() > 0.4  # so a test of one path fails on the other
    assert np.abs(exact - other).max() > 20


def test_longest_side_and_padding_by_hand():
    assert preprocess.longest_side(512, 512, 224) == (224, 224)
    assert preprocess.longest_side(300, 200, 224) == (224, 149)  # 149.33
    assert preprocess.longest_side(10, 4000, 224) == (1, 224)  # 0.56
    assert preprocess.longest_side(1, 4000, 224) == (1, 224)  # never nothing
    padded = np.asarray(preprocess.pad_to_square(np.ones((1, 2, 5, 3), np.float32)))
    np.testing.assert_array_equal(padded[0, :, 0, 0], [0, 1, 1, 0, 0])  # one row above, two below
    assert padded.shape == (1, 5, 5, 3) and padded.sum() == 30
    upright = np.asarray(preprocess.pad_to_square(np.ones((1, 5, 2, 3), np.float32)))
    np.testing.assert_array_equal(upright, padded.transpose(0, 2, 1, 3))
