"""Layers against float64 autodiff of lax.conv, PyTorch, and numbers worked by hand."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from models import torch_weights

from ddpo_jax.models import layers

CONVS = [
    # kernel size, stride, padding, height, width
    (3, 1, ((1, 1), (1, 1)), 5, 4),
    (3, 2, ((1, 1), (1, 1)), 6, 8),
    (3, 2, ((0, 1), (0, 1)), 6, 7),
    (3, 2, ((1, 0), (2, 1)), 7, 5),
    (1, 1, ((0, 0), (0, 0)), 3, 4),
    (1, 2, ((0, 0), (0, 0)), 5, 4),
    (4, 3, ((2, 1), (0, 2)), 9, 8),
    (2, 2, ((0, 0), (0, 0)), 7, 6),
]


def _lax_conv(x, kernel, stride, padding):
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )


@pytest.mark.parametrize(("size", "stride", "padding", "height", "width"), CONVS)
def test_conv_value_and_gradients(size, stride, padding, height, width):
    rng = np.random.default_rng(size * 10 + stride)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((2, height, width, 3)))
        kernel = jnp.asarray(rng.standard_normal((size, size, 3, 5)))

        @jax.jit
        def both(x, kernel):
            expected, pullback = jax.vjp(lambda x, k: _lax_conv(x, k, stride, padding), x, kernel)
            ours, our_pullback = jax.vjp(lambda x, k: layers.conv(x, k, stride, padding), x, kernel)
            dy = jnp.cos(expected)
            return (expected, *pullback(dy)), (ours, *our_pullback(dy))

        expected, ours = both(x, kernel)
        for got, want in zip(ours, expected, strict=True):
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, want, atol=1e-12)


def test_conv_cpu_rule_is_used_on_cpu_only(monkeypatch):
    x, kernel = jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 2, 2))
    padding = ((1, 1), (1, 1))

    def names(function):
        return {equation.primitive.name for equation in jax.make_jaxpr(function)(x, kernel).eqns}

    assert "custom_vjp_call" in names(lambda x, k: layers.conv(x, k, 1, padding))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert names(lambda x, k: layers.conv(x, k, 1, padding)) == {"conv_general_dilated"}


def test_conv_gradient_of_replicated_kernel_in_shard_map_is_summed():
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    x = jax.random.normal(jax.random.key(0), (2 * len(jax.devices()), 4, 4, 2))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 2, 3))
    padding = ((1, 1), (1, 1))

    def gradient(kernel, x):
        return jax.grad(lambda k: jnp.sum(jnp.sin(layers.conv(x, k, 1, padding))))(kernel)

    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec())
    expected = jax.jit(jax.grad(lambda k: jnp.sum(jnp.sin(_lax_conv(x, k, 1, padding)))))(kernel)
    np.testing.assert_allclose(jax.jit(sharded)(kernel, x), expected, atol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_group_norm_in_float64_numbers(offset):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 5, 8)) + offset
    x = x.astype(np.float32)
    norm = layers.GroupNorm(4, 8, epsilon=1e-5)
    norm.scale[...] = jnp.asarray(rng.standard_normal(8), jnp.float32)
    norm.bias[...] = jnp.asarray(rng.standard_normal(8), jnp.float32)
    groups = x.astype(np.float64).reshape(2, 15, 4, 2)
    mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    expected = ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)
    expected = expected * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=2e-5 if offset == 0 else 1e-3)


def test_norms_keep_float32_statistics_in_bfloat16():
    # 256 values near 1 in bfloat16: a bfloat16 sum would stop growing at 256 ulps and the mean would be wrong.
    x = jnp.asarray(1 + 0.25 * np.random.default_rng(0).standard_normal((1, 64, 64, 4)), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    for module, axes in ((layers.GroupNorm(1, 4, epsilon=1e-5, dtype=jnp.bfloat16), (1, 2, 3)),):
        expected = (exact - exact.mean(axes, keepdims=True)) / np.sqrt(exact.var(axes, keepdims=True) + 1e-5)
        out = module(x)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-8, atol=1e-3)
    layer = layers.LayerNorm(4, dtype=jnp.bfloat16)
    expected = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(np.asarray(layer(x), np.float64), expected, rtol=2**-8, atol=1e-3)


def test_group_norm_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="norm_num_groups=3"):
        layers.GroupNorm(3, 8, epsilon=1e-5)


@pytest.mark.parametrize(("dim", "flip", "shift"), [(8, True, 0), (8, False, 1), (7, True, 0)])
def test_timestep_embedding_against_diffusers(dim, flip, shift):
    torch = pytest.importorskip("torch")
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    timesteps = np.array([0, 1, 500, 999])
    expected = embeddings.get_timestep_embedding(
        torch.tensor(timesteps), dim, flip_sin_to_cos=flip, downscale_freq_shift=shift
    )
    ours = layers.timestep_embedding(jnp.asarray(timesteps), dim, flip, shift)
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-4)
    if dim == 8 and flip:
        np.testing.assert_allclose(ours[1, :2], [np.cos(1.0), np.cos(0.1)], rtol=1e-5)
        np.testing.assert_allclose(ours[1, 4:6], [np.sin(1.0), np.sin(0.1)], rtol=1e-5)


def test_resnet_and_resampling_against_diffusers():
    torch = pytest.importorskip("torch")
    resnet = pytest.importorskip("diffusers.models.resnet")
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 6, 6, 8)).astype(np.float32)
    time = rng.standard_normal((2, 5)).astype(np.float32)

    def nchw(array):
        return torch.tensor(array).permute(0, 3, 1, 2)

    reference = resnet.ResnetBlock2D(in_channels=8, out_channels=12, temb_channels=5, groups=4, eps=1e-5)
    ours = torch_weights.build(
        lambda: layers.ResnetBlock2D(8, 12, time_channels=5, groups=4, epsilon=1e-5, rngs=nnx.Rngs(0)),
        reference.state_dict(),
    )
    expected = reference(nchw(x), torch.tensor(time)).detach().permute(0, 2, 3, 1)
    np.testing.assert_allclose(jax.jit(ours.__call__)(x, time), expected, atol=1e-5)

    pairs = [(resnet.Upsample2D(8, use_conv=True), lambda: layers.Upsample2D(8, rngs=nnx.Rngs(0)))]
    for asymmetric in (False, True):
        reference = resnet.Downsample2D(8, use_conv=True, padding=0 if asymmetric else 1, name="op")
        make = functools.partial(layers.Downsample2D, 8, asymmetric=asymmetric)
        pairs.append((reference, lambda make=make: make(rngs=nnx.Rngs(0))))
    for reference, make in pairs:
        ours = torch_weights.build(make, reference.state_dict())
        expected = reference(nchw(x)).detach().permute(0, 2, 3, 1)
        np.testing.assert_allclose(jax.jit(ours.__call__)(x), expected, atol=1e-5)


def test_bfloat16_modules_keep_float32_parameters():
    module = layers.ResnetBlock2D(8, 8, groups=4, epsilon=1e-5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(module))} == {jnp.dtype(jnp.float32)}
    assert module(jnp.ones((1, 4, 4, 8), jnp.bfloat16)).dtype == jnp.bfloat16
