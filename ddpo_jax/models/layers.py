"""Layers that the UNet and the VAE share.

Images are NHWC. Parameters are float32; ``dtype`` is the compute dtype. Statistics of norms are float32 always.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ddpo_jax.errors import InputError
from ddpo_jax.models.attention import current_platform

Padding = tuple[tuple[int, int], tuple[int, int]]
_CONV_DIMS = ("NHWC", "HWIO", "NHWC")


# ---------------------------------------------------------------------------------------------------------- convolution


def conv(x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C D"], stride: int, padding: Padding) -> Array:
    """2-D convolution (cross-correlation), NHWC by HWIO, the same value on every backend.

    The gradients XLA derives are up to 60 times slower inside ``lax.scan`` than outside on CPU: their convolutions have
    image-sized windows or transposed kernels, for which loops have no fast path. There a custom rule writes the kernel
    gradient as kh*kw matrix products and the input gradient as a plain convolution. It has no forward mode (jvp).

    Args:
      x: images.
      kernel: window; a 1x1 window with stride 1 and no padding is a matrix product.
      stride: the same in both directions.
      padding: zeros ((top, bottom), (left, right)).
    """
    if kernel.shape[:2] == (1, 1) and stride == 1 and padding == ((0, 0), (0, 0)):
        return x @ kernel[0, 0]
    if current_platform() == "cpu":
        return _conv_cpu(x, kernel, stride, padding)
    return _conv_lax(x, kernel, stride, padding)


def _conv_lax(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=_CONV_DIMS)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv_cpu(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return _conv_lax(x, kernel, stride, padding)


def _conv_cpu_fwd(x: Array, kernel: Array, stride: int, padding: Padding) -> tuple[Array, tuple[Array, Array]]:
    return _conv_lax(x, kernel, stride, padding), (x, kernel)


def _conv_cpu_bwd(stride: int, padding: Padding, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    # Only the transpose of the matrix products runs; their value is compiled away. Going through it rather than writing
    # the transpose out sums the gradient over the devices of a shard_map, as autodiff would.
    _, pullback = jax.vjp(lambda value: _conv_matmul(x, value, stride, padding, dy.shape), kernel)
    return _input_gradient(dy, kernel, x.shape, stride, padding), *pullback(dy)


def _conv_matmul(x: Array, kernel: Array, stride: int, padding: Padding, shape: tuple[int, ...]) -> Array:
    """The convolution as one matrix product per window position, over all pixels of all images."""
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = ((size - 1) * stride + 1 for size in shape[1:3])
    windows = [
        padded[:, i : i + height : stride, j : j + width : stride].reshape(-1, x.shape[-1])
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    parts = lax.split(kernel.reshape(-1, kernel.shape[-1]), [x.shape[-1]] * len(windows))
    products = [window @ part for window, part in zip(windows, parts, strict=True)]
    return sum(products[1:], products[0]).reshape(shape)


def _input_gradient(dy: Array, kernel: Array, shape: tuple[int, ...], stride: int, padding: Padding) -> Array:
    """Convolution of the gradient, spread out by the stride, with the kernel turned by 180 degrees."""
    edges = []
    for axis, (low, _) in enumerate(padding):
        window, spread = kernel.shape[axis], (dy.shape[axis + 1] - 1) * stride + 1
        low = window - 1 - low
        edges.append((low, shape[axis + 1] + window - 1 - spread - low))
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    if stride == 1:
        return _conv_lax(dy, turned, 1, (edges[0], edges[1]))
    dilated = lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), *((*edge, stride - 1) for edge in edges), (0, 0, 0)))
    return _conv_lax(dilated, turned, 1, ((0, 0), (0, 0)))


_conv_cpu.defvjp(_conv_cpu_fwd, _conv_cpu_bwd)


class Conv(nnx.Conv):
    """Convolution with a square window and explicit zero padding; parameters ``kernel`` (HWIO) and ``bias``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int | Padding = 0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        pairs = ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding
        super().__init__(
            in_features,
            out_features,
            (kernel_size, kernel_size),
            strides=(stride, stride),
            padding=pairs,
            dtype=jnp.dtype(dtype),
            rngs=rngs,
        )
        self.pairs = pairs
        self.stride = stride

    def __call__(self, inputs: Float[Array, "B H W C"], out_sharding: None = None) -> Float[Array, "B h w D"]:
        kernel = self.kernel[...].astype(self.dtype)
        out = conv(inputs.astype(self.dtype), kernel, self.stride, self.pairs)
        return out if self.bias is None else out + self.bias[...].astype(self.dtype)


class Linear(nnx.Linear):
    """Matrix product over the last axis; parameters ``kernel`` [in, out] and ``bias``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(in_features, out_features, use_bias=use_bias, dtype=jnp.dtype(dtype), rngs=rngs)


# ---------------------------------------------------------------------------------------------------------------- norms


def _moments(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Mean and variance in float32, reduced dimensions kept.

    Half-precision input reads memory once (E[x^2] - E[x]^2: its cancellation is far below the rounding of the input);
    wider input takes the second pass that exactness needs.
    """
    half = jnp.dtype(x.dtype).itemsize < 4
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(x, axes, keepdims=True)
    if half:
        variance = jnp.maximum(jnp.mean(jnp.square(x), axes, keepdims=True) - jnp.square(mean), 0.0)
    else:
        # The derivative of the variance by the mean is zero: leaving it out saves the backward pass a reduction.
        variance = jnp.mean(jnp.square(x - lax.stop_gradient(mean)), axes, keepdims=True)
    return mean, variance


class GroupNorm(nnx.Module):
    """Group normalisation over all axes but the first, the last split into groups. Statistics in float32."""

    def __init__(self, num_groups: int, num_features: int, *, epsilon: float, dtype: DTypeLike = jnp.float32):
        if num_features % num_groups:
            raise InputError(
                f"norm_num_groups={num_groups}: must divide the {num_features} channels; choose a divisor of them"
            )
        self.scale = nnx.Param(jnp.ones((num_features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((num_features,), jnp.float32))
        self.num_groups = num_groups
        self.epsilon = epsilon
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "B *S C"]) -> Float[Array, "B *S C"]:
        # Over pixels first, then over the channels of a group: one reduction over both runs 2 to 5 times slower on CPU.
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        mean = self._group_mean(_mean32(flat))
        if jnp.dtype(x.dtype).itemsize < 4:  # one pass over memory; its cancellation is below the rounding of the input
            variance = jnp.maximum(self._group_mean(_mean32(jnp.square(_float32(flat)))) - jnp.square(mean), 0.0)
        else:
            variance = self._group_mean(_mean32(jnp.square(flat - mean)))
        scale = lax.rsqrt(variance + self.epsilon) * self.scale[...]  # [B, 1, C]
        return ((flat - mean) * scale + self.bias[...]).astype(self.dtype).reshape(x.shape)

    def _group_mean(self, x: Float[Array, "B 1 C"]) -> Float[Array, "B 1 C"]:
        """The mean over each group's channels, at each of them."""
        grouped = x.reshape(x.shape[0], 1, self.num_groups, -1)
        return jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(x.shape)


def _float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _mean32(x: Float[Array, "B S C"]) -> Float[Array, "B 1 C"]:
    return jnp.mean(_float32(x), 1, keepdims=True)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis. Statistics in float32."""

    def __init__(self, num_features: int, *, epsilon: float = 1e-5, dtype: DTypeLike = jnp.float32):
        self.scale = nnx.Param(jnp.ones((num_features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((num_features,), jnp.float32))
        self.epsilon = epsilon
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        mean, variance = _moments(x, (-1,))
        scale = lax.rsqrt(variance + self.epsilon) * self.scale[...]
        return ((x - mean) * scale + self.bias[...]).astype(self.dtype)


# --------------------------------------------------------------------------------------------------------------- blocks


def timestep_embedding(
    timesteps: Array, dim: int, flip_sin_to_cos: bool = True, freq_shift: float = 0.0
) -> Float[Array, "B dim"]:
    """Sinusoidal embedding of timesteps (Vaswani et al. 2017, sec. 3.5, period 10 000), float32.

    Args:
      timesteps: [B], the scheduler's values (0-999).
      dim: size of the embedding; an odd size ends in a zero.
      flip_sin_to_cos: cosines first.
      freq_shift: subtracted from dim / 2 in the exponent's denominator.
    """
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    parts = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, dim % 2)))


class ResnetBlock2D(nnx.Module):
    """norm, silu, conv, (+ time embedding), norm, silu, conv, + input."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_channels: int | None = None,
        groups: int,
        epsilon: float,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.norm1 = GroupNorm(groups, in_channels, epsilon=epsilon, dtype=dtype)
        self.conv1 = Conv(in_channels, out_channels, 3, padding=1, dtype=dtype, rngs=rngs)
        if time_channels is not None:
            self.time_emb_proj = Linear(time_channels, out_channels, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(groups, out_channels, epsilon=epsilon, dtype=dtype)
        self.conv2 = Conv(out_channels, out_channels, 3, padding=1, dtype=dtype, rngs=rngs)
        self.has_shortcut = in_channels != out_channels
        if self.has_shortcut:
            self.conv_shortcut = Conv(in_channels, out_channels, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"], time: Float[Array, "B E"] | None = None) -> Array:
        hidden = self.conv1(nnx.silu(self.norm1(x)))
        if time is not None:
            hidden = hidden + self.time_emb_proj(nnx.silu(time))[:, None, None, :]
        hidden = self.conv2(nnx.silu(self.norm2(hidden)))
        return hidden + (self.conv_shortcut(x) if self.has_shortcut else x)


class Downsample2D(nnx.Module):
    """Halves height and width by a 3x3 convolution of stride 2, padded symmetrically or at the far edges only."""

    def __init__(self, channels: int, *, asymmetric: bool, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        padding: int | Padding = ((0, 1), (0, 1)) if asymmetric else 1
        self.conv = Conv(channels, channels, 3, stride=2, padding=padding, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Doubles height and width by repetition, then a 3x3 convolution."""

    def __init__(self, channels: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, 3, padding=1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B HH WW C"]:
        b, h, w, c = x.shape
        doubled = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
        return self.conv(doubled.reshape(b, 2 * h, 2 * w, c))
