"""AutoencoderKL against PyTorch diffusers on random weights: encode, decode, and gradients of both."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import torch_weights

from ddpo_jax.models.vae import AutoencoderKL, VAEConfig


def _raw(widths, **changes):
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 32,
    } | changes


CONFIGS = {
    "three levels": _raw([8, 16, 16], norm_num_groups=8),
    "odd": _raw([6, 15], layers_per_block=2, latent_channels=3, norm_num_groups=3),
    "bare": _raw([8], use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False),
}
SD15 = _raw([128, 256, 512, 512], layers_per_block=2, norm_num_groups=32, sample_size=512, _diffusers_version="0.6.0")


def _inputs(raw):
    rng = np.random.default_rng(0)
    size = 4 * 2 ** (len(raw["block_out_channels"]) - 1)
    images = rng.uniform(-1, 1, (2, size, size + size // 2, raw["in_channels"])).astype(np.float32)
    latents = rng.standard_normal((3, 4, 6, raw["latent_channels"])).astype(np.float32)
    return images, latents


@functools.cache
def _reference(name):
    """State dict; moments, images; gradients of (sum(sin(mean)) + sum(cos(logvar)) + sum(sin(images))) / 10."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL.from_config(CONFIGS[name]).eval()
    images, latents = (torch.tensor(x).permute(0, 3, 1, 2).requires_grad_() for x in _inputs(CONFIGS[name]))
    posterior = model.encode(images).latent_dist
    decoded = model.decode(latents).sample
    (0.1 * (posterior.mean.sin().sum() + posterior.logvar.cos().sum() + decoded.sin().sum())).backward()
    nhwc = lambda x: x.detach().permute(0, 2, 3, 1).numpy()  # noqa: E731
    values = [nhwc(x) for x in (posterior.mean, posterior.logvar, decoded, images.grad, latents.grad)]
    return model.state_dict(), values, {key: value.grad.numpy() for key, value in model.named_parameters()}


def _make(raw, **options):
    return AutoencoderKL(VAEConfig.from_dict(raw), rngs=nnx.Rngs(0), **options)


def _ours(name, **options):
    return torch_weights.build(functools.partial(_make, CONFIGS[name], **options), _reference(name)[0])


def _run(function, *args):
    """Jitted call that compiles in half the time: these programs run once."""
    return jax.jit(function).lower(*args).compile({"xla_backend_optimization_level": 0})(*args)


@pytest.mark.parametrize("name", CONFIGS)
def test_value_and_gradients(name):
    _, expected, d_params = _reference(name)
    graph, params = nnx.split(_ours(name))

    def loss(params, images, latents):
        model = nnx.merge(graph, params)
        mean, logvar = model.encode(images)
        decoded = model.decode(latents)
        total = jnp.sum(jnp.sin(mean)) + jnp.sum(jnp.cos(logvar)) + jnp.sum(jnp.sin(decoded))
        return 0.1 * total, (mean, logvar, decoded)

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, values), (params, *inputs) = _run(gradient, params, *_inputs(CONFIGS[name]))
    for got, want in zip((*values, *inputs), expected, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=1e-4)
    ours = torch_weights.gradients(params)
    assert set(ours) == set(d_params)
    for key, (path, got) in ours.items():
        np.testing.assert_allclose(got, torch_weights.to_ours(path, d_params[key]), atol=1e-4, err_msg=key)


@pytest.mark.parametrize("slice_size", [1, 2, 8])
def test_sliced_decode_is_decode(slice_size):
    model = _ours("three levels")
    _, latents = _inputs(CONFIGS["three levels"])
    images = _run(lambda latents: model.decode(latents, slice_size=slice_size), latents)
    np.testing.assert_allclose(images, _reference("three levels")[1][2], atol=1e-4)
    with pytest.raises(ValueError, match="slice_size=0"):
        model.decode(latents, slice_size=0)


def test_tiles_are_decoded_alone_and_blended():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    model = _ours("bare")  # one level: an image pixel per latent pixel
    reference = diffusers.AutoencoderKL.from_config(CONFIGS["bare"]).eval()
    reference.load_state_dict(_reference("bare")[0])
    latents = np.random.default_rng(1).standard_normal((2, 14, 6, 4)).astype(np.float32)
    # Tiles of 8 rows at 0 and 6, overlapping by 2, and all 6 columns; ramps of 2 pixels at their ends.
    ramp = np.array([0.25, 0.75, 1, 1, 1, 1, 0.75, 0.25])
    total, weights = np.zeros((2, 14, 6, 3)), np.zeros((14, 1, 1))
    for top in (0, 6):
        with torch.inference_mode():
            tile = reference.decode(torch.tensor(latents[:, top : top + 8]).permute(0, 3, 1, 2)).sample
        total[:, top : top + 8] += tile.permute(0, 2, 3, 1).numpy() * ramp[:, None, None]
        weights[top : top + 8] += ramp[:, None, None]
    tiled = _run(lambda latents: model.decode(latents, tile_size=8), latents)
    np.testing.assert_allclose(tiled, total / weights, atol=1e-4)
    # A tile as large as the image is the image.
    whole = _run(lambda latents: model.decode(latents, slice_size=1, tile_size=16), latents)
    np.testing.assert_allclose(whole, _run(model.decode, latents), atol=1e-5)
    with pytest.raises(ValueError, match="tile_size=3"):
        model.decode(latents, tile_size=3)


def test_bfloat16_is_near_float32():
    model = _ours("three levels", dtype=jnp.bfloat16)
    decoded = _run(model.decode, _inputs(CONFIGS["three levels"])[1])
    expected = _reference("three levels")[1][2]
    assert decoded.dtype == jnp.float32
    difference = float(np.sqrt(np.mean((np.asarray(decoded) - expected) ** 2)))
    assert 1e-5 * expected.std() < difference < 0.03 * expected.std()


def test_full_size_has_the_published_number_of_parameters():
    model = nnx.eval_shape(functools.partial(_make, SD15))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == 83_653_863
    assert model.config.factor == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "relu"}, "act_fn: received 'relu'; only 'silu' is supported"),
        ({"shift_factor": 0.1}, "shift_factor: received 0.1; only None is supported"),
        ({"new_option": 3}, "new_option: received 3; the option is unknown"),
        (
            {"up_block_types": ["UpDecoderBlock2D"]},
            "up_block_types: received ('UpDecoderBlock2D',); it must be 4 times",
        ),
        ({"norm_num_groups": 48}, "norm_num_groups: received 48; it must divide all of block_out_channels"),
        ({"_class_name": "VQModel"}, "_class_name: received 'VQModel'; only 'AutoencoderKL' is supported"),
    ],
)
def test_unsupported_config_is_refused_by_name(change, message):
    with pytest.raises(ValueError) as error:
        VAEConfig.from_dict(SD15 | change)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_config_diffusers_writes_today_is_read():
    diffusers = pytest.importorskip("diffusers")
    written = dict(diffusers.AutoencoderKL.from_config(CONFIGS["odd"]).config)
    assert VAEConfig.from_dict(written) == VAEConfig.from_dict(CONFIGS["odd"])


def test_wrong_image_size_is_refused():
    model = nnx.eval_shape(functools.partial(_make, SD15))
    with pytest.raises(ValueError, match="images=20x24: height and width must be multiples of 8"):
        model.encode(jnp.zeros((1, 20, 24, 3)))
