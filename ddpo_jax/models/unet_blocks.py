"""The blocks of the Stable Diffusion UNet: transformers over pixels, and the down, mid and up blocks.

Every block takes (x [B,H,W,C], time [B,E], context [B,L,D], options) and NHWC tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ddpo_jax.models.attention import attention
from ddpo_jax.models.layers import Conv, Downsample2D, GroupNorm, LayerNorm, Linear, ResnetBlock2D, Upsample2D


class Options(NamedTuple):
    """How to compute, which has no influence on the result.

    Attributes:
      attention: implementation name of ``attention.attention``.
      remat: recompute each resnet and transformer in the backward pass instead of keeping its intermediate values.
    """

    attention: str = "auto"
    remat: bool = False

    def run(self, block: Callable[..., Array], *args: Array) -> Array:
        """Calls a resnet or a transformer."""
        return jax.checkpoint(lambda *values: block(*values))(*args) if self.remat else block(*args)


class BlockSpec(NamedTuple):
    """Sizes that are the same in every block of a UNet."""

    time_channels: int
    context_dim: int
    groups: int
    epsilon: float
    linear_projection: bool
    dtype: DTypeLike

    def resnet(self, in_channels: int, out_channels: int, rngs: nnx.Rngs) -> ResnetBlock2D:
        """A resnet that takes the time embedding."""
        return ResnetBlock2D(
            in_channels,
            out_channels,
            time_channels=self.time_channels,
            groups=self.groups,
            epsilon=self.epsilon,
            dtype=self.dtype,
            rngs=rngs,
        )


class Attention(nnx.Module):
    """Multi-head attention of ``x`` over ``source``; no bias but in the output projection."""

    def __init__(self, dim: int, source_dim: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.to_q = Linear(dim, dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_k = Linear(source_dim, dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_v = Linear(source_dim, dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.to_out = nnx.List([Linear(dim, dim, dtype=dtype, rngs=rngs)])
        self.heads = heads

    def __call__(
        self, x: Float[Array, "B Q C"], source: Float[Array, "B K D"], implementation: str
    ) -> Float[Array, "B Q C"]:
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
        q, k, v = (tokens.reshape(*tokens.shape[:2], self.heads, -1) for tokens in (q, k, v))
        return self.to_out[0](attention(q, k, v, implementation=implementation).reshape(x.shape))


class GEGLU(nnx.Module):
    """Linear map to value and gate, value * gelu(gate) with the exact gelu (Shazeer 2020)."""

    def __init__(self, dim: int, inner: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.proj = Linear(dim, 2 * inner, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L I"]:
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * nnx.gelu(gate, approximate=False)


class Dropout(nnx.Module):
    """Occupies the place of the dropout (rate 0) in upstream's list, so that indices agree."""

    def __call__(self, x: Array) -> Array:
        return x


class FeedForward(nnx.Module):
    """GEGLU of four times the width, then back."""

    def __init__(self, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        inner = 4 * dim
        layers = [GEGLU(dim, inner, dtype=dtype, rngs=rngs), Dropout(), Linear(inner, dim, dtype=dtype, rngs=rngs)]
        self.net = nnx.List(layers)

    def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention to the text, feed-forward; each after a norm and with a residual."""

    def __init__(self, dim: int, context_dim: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(dim, dtype=dtype)
        self.attn1 = Attention(dim, dim, heads, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(dim, dtype=dtype)
        self.attn2 = Attention(dim, context_dim, heads, dtype=dtype, rngs=rngs)
        self.norm3 = LayerNorm(dim, dtype=dtype)
        self.ff = FeedForward(dim, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B Q C"], context: Float[Array, "B L D"], implementation: str
    ) -> Float[Array, "B Q C"]:
        tokens = self.norm1(x)
        x = x + self.attn1(tokens, tokens, implementation)
        x = x + self.attn2(self.norm2(x), context, implementation)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """A transformer over the pixels of a feature map, projected in and out, with a residual around it."""

    def __init__(self, channels: int, heads: int, spec: BlockSpec, rngs: nnx.Rngs):
        dtype = spec.dtype
        self.norm = GroupNorm(spec.groups, channels, epsilon=1e-6, dtype=dtype)
        if spec.linear_projection:
            self.proj_in: nnx.Module = Linear(channels, channels, dtype=dtype, rngs=rngs)
            self.proj_out: nnx.Module = Linear(channels, channels, dtype=dtype, rngs=rngs)
        else:
            self.proj_in = Conv(channels, channels, 1, dtype=dtype, rngs=rngs)
            self.proj_out = Conv(channels, channels, 1, dtype=dtype, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [BasicTransformerBlock(channels, spec.context_dim, heads, dtype=dtype, rngs=rngs)]
        )

    def __call__(
        self, x: Float[Array, "B H W C"], context: Float[Array, "B L D"], implementation: str
    ) -> Float[Array, "B H W C"]:
        b, h, w, c = x.shape
        hidden = self.proj_in(self.norm(x)).reshape(b, h * w, c)
        for block in self.transformer_blocks:
            hidden = block(hidden, context, implementation)
        return self.proj_out(hidden.reshape(b, h, w, c)) + x


class _Block(nnx.Module):
    """Resnets, each followed by a transformer where ``heads`` is given."""

    def __init__(
        self, in_channels: list[int], out_channels: int, heads: int | None, *, spec: BlockSpec, rngs: nnx.Rngs
    ):
        self.resnets = nnx.List([spec.resnet(width, out_channels, rngs) for width in in_channels])
        self.has_attention = heads is not None
        if heads is not None:
            self.attentions = nnx.List([Transformer2DModel(out_channels, heads, spec, rngs) for _ in in_channels])

    def layer(self, index: int, x: Array, time: Array, context: Array, options: Options) -> Array:
        x = options.run(self.resnets[index], x, time)
        return self.attend(index, x, context, options) if self.has_attention else x

    def attend(self, index: int, x: Array, context: Array, options: Options) -> Array:
        transformer = self.attentions[index]
        return options.run(lambda x, context: transformer(x, context, options.attention), x, context)


class DownBlock(_Block):
    """``DownBlock2D``, and ``CrossAttnDownBlock2D`` where ``heads`` is given. Returns x and the skip connections."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        heads: int | None,
        *,
        downsample: bool,
        spec: BlockSpec,
        rngs: nnx.Rngs,
    ):
        super().__init__([in_channels] + [out_channels] * (num_layers - 1), out_channels, heads, spec=spec, rngs=rngs)
        self.downsample = downsample
        if downsample:
            self.downsamplers = nnx.List([Downsample2D(out_channels, asymmetric=False, dtype=spec.dtype, rngs=rngs)])

    def __call__(self, x: Array, time: Array, context: Array, options: Options) -> tuple[Array, list[Array]]:
        skips = []
        for index in range(len(self.resnets)):
            x = self.layer(index, x, time, context, options)
            skips.append(x)
        if self.downsample:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock(_Block):
    """``UNetMidBlock2DCrossAttn``: resnet, transformer, resnet."""

    def __init__(self, channels: int, heads: int, *, spec: BlockSpec, rngs: nnx.Rngs):
        super().__init__([channels], channels, heads, spec=spec, rngs=rngs)
        self.resnets.append(spec.resnet(channels, channels, rngs))

    def __call__(self, x: Array, time: Array, context: Array, options: Options) -> Array:
        x = self.layer(0, x, time, context, options)
        return options.run(self.resnets[1], x, time)


class UpBlock(_Block):
    """``UpBlock2D``, and ``CrossAttnUpBlock2D`` where ``heads`` is given. Takes its skip connections off the list."""

    def __init__(
        self,
        in_channels: int,
        skip_channels: list[int],
        out_channels: int,
        heads: int | None,
        *,
        upsample: bool,
        spec: BlockSpec,
        rngs: nnx.Rngs,
    ):
        widths = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        sums = [width + skip for width, skip in zip(widths, skip_channels, strict=True)]
        super().__init__(sums, out_channels, heads, spec=spec, rngs=rngs)
        self.upsample = upsample
        if upsample:
            self.upsamplers = nnx.List([Upsample2D(out_channels, dtype=spec.dtype, rngs=rngs)])

    def __call__(self, x: Array, skips: list[Array], time: Array, context: Array, options: Options) -> Array:
        for index in range(len(self.resnets)):
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = self.layer(index, x, time, context, options)
        return self.upsamplers[0](x) if self.upsample else x
