"""Preprocessing against Pillow, torch's float64 interpolation and the CLIP processor of transformers."""

import jax
import jaxtyping
import numpy as np
import PIL.Image
import pytest

from ddpo_jax.models import preprocess


def photo(rng, height, width, n=2):
    """Noise over a gradient: has every frequency and saturates at both ends."""
    ramp = np.linspace(-40, 290, width)[None, None, :, None]
    return np.clip(ramp + rng.normal(0, 60, (n, height, width, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("size_in", "size_out"),
    [
        ((512, 512), (224, 224)),
        ((32, 32), (224, 224)),
        ((60, 40), (33, 22)),
        ((40, 61), (64, 97)),
        ((33, 32), (33, 17)),
    ],
)
def test_pil_path_is_pillow_to_one_level(size_in, size_out):
    images = photo(np.random.default_rng(0), *size_in)
    ours = np.asarray(jax.jit(preprocess.resize_pil, static_argnums=(1, 2))(images, *size_out)).astype(int)
    pillow = np.stack(
        [
            np.asarray(PIL.Image.fromarray(image).resize(size_out[::-1], PIL.Image.Resampling.BICUBIC))
            for image in images
        ]
    ).astype(int)
    assert np.abs(ours - pillow).max() <= 1
    assert np.mean(ours != pillow) < 2e-3  # float32 against Pillow's fixed point: only ties differ


@pytest.mark.parametrize(
    ("size_in", "size_out"), [((131, 97), (50, 60)), ((64, 64), (224, 224)), ((97, 131), (40, 200))]
)
def test_float_path_is_antialiased_bicubic(size_in, size_out):
    torch = pytest.importorskip("torch")
    images = photo(np.random.default_rng(1), *size_in).astype(np.float32)
    ours = np.asarray(preprocess.resize_float(images, *size_out))
    nchw = torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(nchw, size=size_out, mode="bicubic", antialias=True)
    # float64 oracle: torch's own float32 weights are off by up to 3e-3 levels.
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=1.1e-4, rtol=0)


def test_float_path_is_not_rounded_or_clipped():
    edge = np.zeros((1, 8, 8, 3), np.float32)
    edge[:, :, 4:] = 255
    out = np.asarray(preprocess.resize_float(edge, 8, 32))
    assert out.min() < -1 and out.max() > 256  # bicubic overshoots at an edge


def test_cubic_weights_by_hand():
    # Doubling two pixels: centres at -0.25, 0.25, ... the cubic with a = -0.5 at distances 0.25 and 0.75 and the
    # taps outside dropped: w(.25) = 1.5/64 - 2.5/16 + 1 = 0.8671875, w(.75) = 1.5*27/64 - 2.5*9/16 + 1 = 0.2265625.
    row = np.array([0.8671875, 0.2265625]) / (0.8671875 + 0.2265625)
    matrix = preprocess.bicubic_matrix(2, 4)
    np.testing.assert_allclose(matrix[1], row, atol=1e-12)
    np.testing.assert_allclose(matrix[2], row[::-1], atol=1e-12)
    np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-12)


@pytest.mark.parametrize("shape", [(96, 96), (97, 60), (60, 97), (24, 24)])
def test_clip_pixels_is_the_clip_processor(shape):
    transformers = pytest.importorskip("transformers")
    processor_class = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = processor_class(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    images = photo(np.random.default_rng(2), *shape)
    theirs = processor(list(images), return_tensors="np", input_data_format="channels_last")["pixel_values"]
    ours = np.asarray(preprocess.clip_pixels(images, 32)).transpose(0, 3, 1, 2)
    level = 1 / 255 / min(preprocess.CLIP_STD)
    assert ours.shape == theirs.shape == (2, 3, 32, 32)
    np.testing.assert_allclose(ours, theirs, atol=1.01 * level)
    assert np.mean(np.abs(ours - theirs) > 1e-5) < 2e-3


def test_the_path_matters():
    images = photo(np.random.default_rng(3), 96, 96)
    pil = np.asarray(preprocess.resize_pil(images, 32, 32), np.float32)
    exact = np.asarray(preprocess.resize_float(images, 32, 32))
    gap = np.abs(np.clip(exact, 0, 255) - pil).max()
    assert gap > 0.4  # so a test of one path fails on the other


def test_processor_refuses_floats_and_unknown_paths():
    # Where jaxtyping checks signatures, as in this suite, it speaks first.
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match=r"(?s)(float32|f32).*(uint8|UInt8)"):
        preprocess.clip_pixels(np.zeros((1, 8, 8, 3), np.float32), 8)
    with pytest.raises(ValueError, match=r"path='cv2'.*pil, float"):
        preprocess.clip_pixels(np.zeros((1, 8, 8, 3), np.uint8), 8, path="cv2")
    with pytest.raises(ValueError, match=r"size=9.*8x8"):
        preprocess.center_crop(np.zeros((1, 8, 8, 3), np.uint8), 9)
