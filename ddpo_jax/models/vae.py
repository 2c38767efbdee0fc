"""AutoencoderKL: images to latents and back, as in Stable Diffusion 1.x and 2.x (Rombach et al. 2022)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ddpo_jax.errors import InputError
from ddpo_jax.models import schema
from ddpo_jax.models.attention import attention
from ddpo_jax.models.layers import (
    Conv,
    Downsample2D,
    GroupNorm,
    Linear,
    ResnetBlock2D,
    Upsample2D,
)

_CLASS = "AutoencoderKL"
_EPSILON = 1e-6  # of every norm in the VAE
_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "shift_factor": (None,),
    "latents_mean": (None,),
    "latents_std": (None,),
}
# force_upcast asks PyTorch to leave float16; ours computes in float32 or bfloat16, whose range is the same.
_IGNORED = ("sample_size", "force_upcast")


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Options of ``vae/config.json`` that are honoured; defaults are those of the PyTorch class."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        schema.check("", dataclasses.asdict(self), schema.VAE)
        schema.refuse("", self._contradictions())

    def _contradictions(self) -> Iterator[str]:
        """Values that are right each on its own but do not go together."""
        widths, groups = self.block_out_channels, self.norm_num_groups
        for key, name in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            types = getattr(self, key)
            if types != (name,) * len(widths):
                rule = f"it must be {len(widths)} times {name!r}, once for each of block_out_channels"
                yield f"{key}: received {schema.shown(types)}; {rule}; {schema.FIX}"
        if any(width % groups for width in widths):
            rule = f"it must divide all of block_out_channels={widths}"
            yield f"norm_num_groups: received {groups}; {rule}; {schema.FIX}"

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "") -> VAEConfig:
        """Reads the content of ``vae/config.json``, the file ``where``; InputError names every fault of it."""
        return schema.read_config(cls, raw, schema.VAE, class_name=_CLASS, fixed=_FIXED, ignored=_IGNORED, where=where)

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)


class Attention(nnx.Module):
    """Single-head self-attention over the pixels of the mid block, with its norm and residual."""

    def __init__(self, channels: int, *, groups: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(groups, channels, epsilon=_EPSILON, dtype=dtype)
        self.to_q = Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.to_k = Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.to_v = Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.to_out = nnx.List([Linear(channels, channels, dtype=dtype, rngs=rngs)])

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        b, h, w, c = x.shape
        tokens = self.group_norm(x).reshape(b, h * w, 1, c)
        out = attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return self.to_out[0](out).reshape(x.shape) + x


class MidBlock(nnx.Module):
    """resnet, attention, resnet at the lowest resolution."""

    def __init__(self, config: VAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        channels, groups = config.block_out_channels[-1], config.norm_num_groups
        resnets = [
            ResnetBlock2D(channels, channels, groups=groups, epsilon=_EPSILON, dtype=dtype, rngs=rngs) for _ in range(2)
        ]
        self.resnets = nnx.List(resnets)
        self.has_attention = config.mid_block_add_attention
        if self.has_attention:
            self.attentions = nnx.List([Attention(channels, groups=groups, dtype=dtype, rngs=rngs)])

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x = self.resnets[0](x)
        if self.has_attention:
            x = self.attentions[0](x)
        return self.resnets[1](x)


class Block(nnx.Module):
    """Resnets of one resolution, then a change of resolution unless it is the last."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        *,
        resample: str,
        groups: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        widths = [in_channels] + [out_channels] * (num_layers - 1)
        resnets = [
            ResnetBlock2D(width, out_channels, groups=groups, epsilon=_EPSILON, dtype=dtype, rngs=rngs)
            for width in widths
        ]
        self.resnets = nnx.List(resnets)
        self.resample = resample
        if resample == "down":
            self.downsamplers = nnx.List([Downsample2D(out_channels, asymmetric=True, dtype=dtype, rngs=rngs)])
        elif resample == "up":
            self.upsamplers = nnx.List([Upsample2D(out_channels, dtype=dtype, rngs=rngs)])

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        for resnet in self.resnets:
            x = resnet(x)
        if self.resample == "down":
            x = self.downsamplers[0](x)
        elif self.resample == "up":
            x = self.upsamplers[0](x)
        return x


class Encoder(nnx.Module):
    """Images to the moments of the latents (before ``quant_conv``)."""

    def __init__(self, config: VAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv(config.in_channels, widths[0], 3, padding=1, dtype=dtype, rngs=rngs)
        blocks = []
        for level, width in enumerate(widths):
            resample = "down" if level < len(widths) - 1 else "none"
            previous, layers = widths[max(level - 1, 0)], config.layers_per_block
            blocks.append(Block(previous, width, layers, resample=resample, groups=groups, dtype=dtype, rngs=rngs))
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MidBlock(config, dtype=dtype, rngs=rngs)
        self.conv_norm_out = GroupNorm(groups, widths[-1], epsilon=_EPSILON, dtype=dtype)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, 3, padding=1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w M"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents (after ``post_quant_conv``) to images."""

    def __init__(self, config: VAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv(config.latent_channels, widths[0], 3, padding=1, dtype=dtype, rngs=rngs)
        self.mid_block = MidBlock(config, dtype=dtype, rngs=rngs)
        blocks = []
        for level, width in enumerate(widths):
            resample = "up" if level < len(widths) - 1 else "none"
            previous, layers = widths[max(level - 1, 0)], config.layers_per_block + 1
            blocks.append(Block(previous, width, layers, resample=resample, groups=groups, dtype=dtype, rngs=rngs))
        self.up_blocks = nnx.List(blocks)
        self.conv_norm_out = GroupNorm(groups, widths[-1], epsilon=_EPSILON, dtype=dtype)
        self.conv_out = Conv(widths[-1], config.out_channels, 3, padding=1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """The VAE of Stable Diffusion. Latents are unscaled here: the pipeline applies ``config.scaling_factor``."""

    def __init__(self, config: VAEConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        latent = config.latent_channels
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)
        if config.use_quant_conv:
            self.quant_conv = Conv(2 * latent, 2 * latent, 1, dtype=dtype, rngs=rngs)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv(latent, latent, 1, dtype=dtype, rngs=rngs)

    def encode(self, images: Float[Array, "B H W C"]) -> tuple[Float[Array, "B h w c"], Float[Array, "B h w c"]]:
        """Mean and log-variance of the latents of images in [-1, 1], float32.

        Raises:
          InputError: height or width is no multiple of ``config.factor``.
        """
        factor = self.config.factor
        if images.shape[1] % factor or images.shape[2] % factor:
            raise InputError(
                f"images={images.shape[1]}x{images.shape[2]}: height and width must be multiples of {factor}; "
                "resize or crop them"
            )
        moments = self.encoder(images.astype(self.dtype))
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(
        self, latents: Float[Array, "B h w c"], *, slice_size: int | None = None, tile_size: int | None = None
    ) -> Float[Array, "B H W C"]:
        """Images, nominally in [-1, 1] and not clipped, float32.

        Args:
          latents: unscaled latents.
          slice_size: decode this many at a time, one after another, so that memory does not grow with B.
          tile_size: decode squares of so many latent pixels, one after another, so that memory does not grow with the
            image either. They overlap by a quarter and are blended; norms and attention see a tile instead of the
            image, so the result differs slightly.

        Raises:
          InputError: ``slice_size`` is below 1 or ``tile_size`` below 4.
        """
        if tile_size is not None and tile_size < 4:
            raise InputError(f"tile_size={tile_size}: must be at least 4; use None to decode whole images")
        if slice_size is not None and slice_size < 1:
            raise InputError(f"slice_size={slice_size}: must be at least 1; use None to decode all at once")

        def decode(latents: Array) -> Array:
            return self._decode(latents) if tile_size is None else self._decode_tiles(latents, tile_size)

        if slice_size is None or slice_size >= latents.shape[0]:
            return decode(latents)
        count = -(-latents.shape[0] // slice_size)
        padded = jnp.pad(latents, ((0, count * slice_size - latents.shape[0]), (0, 0), (0, 0), (0, 0)))
        images = lax.map(decode, padded.reshape(count, slice_size, *latents.shape[1:]))
        return images.reshape(-1, *images.shape[2:])[: latents.shape[0]]

    def _decode_tiles(self, latents: Float[Array, "B h w c"], tile_size: int) -> Float[Array, "B H W C"]:
        batch, *sizes, channels = latents.shape
        factor, overlap = self.config.factor, tile_size // 4
        tiles = [min(tile_size, size) for size in sizes]
        # Evenly spread, the first at the near edge and the last at the far edge, overlapping by a quarter or more.
        counts = [1 + -(-(size - tile) // (tile - overlap)) for size, tile in zip(sizes, tiles, strict=True)]
        starts = [
            [round(index * (size - tile) / max(count - 1, 1)) for index in range(count)]
            for size, tile, count in zip(sizes, tiles, counts, strict=True)
        ]
        ramps = []
        for tile in tiles:
            distance = jnp.arange(tile * factor) + 0.5  # to the near edge; reversed, to the far one
            ramps.append(jnp.minimum(jnp.minimum(distance, distance[::-1]) / (overlap * factor), 1.0))
        weight = ramps[0][:, None, None] * ramps[1][None, :, None]

        def add(carry: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
            total, weights = carry
            tile = lax.dynamic_slice(latents, (0, start[0], start[1], 0), (batch, *tiles, channels))
            place = (0, start[0] * factor, start[1] * factor, 0)
            image = self._decode(tile) * weight
            total = lax.dynamic_update_slice(total, lax.dynamic_slice(total, place, image.shape) + image, place)
            here = lax.dynamic_slice(weights, place[1:], weight.shape) + weight
            return (total, lax.dynamic_update_slice(weights, here, place[1:])), None

        height, width = (size * factor for size in sizes)
        empty = jnp.zeros((batch, height, width, self.config.out_channels)), jnp.zeros((height, width, 1))
        places = jnp.asarray([(top, left) for top in starts[0] for left in starts[1]])
        (total, weights), _ = lax.scan(add, empty, places)
        return total / weights

    def _decode(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        hidden = latents.astype(self.dtype)
        if self.config.use_post_quant_conv:
            hidden = self.post_quant_conv(hidden)
        return self.decoder(hidden).astype(jnp.float32)
