"""UNet2DCondition: the noise (or velocity) predictor of Stable Diffusion 1.x and 2.x (Rombach et al. 2022)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ddpo_jax.errors import InputError
from ddpo_jax.models import schema
from ddpo_jax.models.layers import Conv, GroupNorm, Linear, timestep_embedding
from ddpo_jax.models.unet_blocks import BlockSpec, DownBlock, MidBlock, Options, UpBlock

_CLASS = "UNet2DConditionModel"
_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}  # block type: has attention
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
REMAT = ("none", "block")

_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "transformer_layers_per_block": (1,),
}
# upcast_attention asks for float32 logits and softmax, which all our attention implementations compute anyway.
# The others belong to options that are refused above.
_IGNORED = (
    "upcast_attention",
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Options of ``unet/config.json`` that are honoured; defaults are those of the PyTorch class.

    ``attention_head_dim`` is the NUMBER of heads, per block or one for all: upstream keeps the misleading name for the
    sake of published files.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    cross_attention_dim: int = 1280
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0

    def __post_init__(self) -> None:
        schema.check("", dataclasses.asdict(self), schema.UNET)
        schema.refuse("", self._contradictions())

    def _contradictions(self) -> Iterator[str]:
        """Values that are right each on its own but do not go together."""
        widths, heads = self.block_out_channels, self.attention_head_dim
        levels = len(widths)
        for key, known in (("down_block_types", _DOWN), ("up_block_types", _UP)):
            types = getattr(self, key)
            if len(types) != levels or not set(types) <= set(known):
                rule = f"it must be {levels} of {', '.join(known)}, one for each of block_out_channels"
                yield f"{key}: received {schema.shown(types)}; {rule}; {schema.FIX}"
        if not isinstance(heads, int) and len(heads) != levels:
            rule = f"it must be one number of heads or {levels} of them"
            yield f"attention_head_dim: received {heads}; {rule}; {schema.FIX}"
        elif any(width % count for width, count in zip(widths, self.heads, strict=True)):
            yield f"attention_head_dim: received {heads}; it must divide block_out_channels={widths}; {schema.FIX}"
        if any(width % self.norm_num_groups for width in widths):
            rule = f"it must divide all of block_out_channels={widths}"
            yield f"norm_num_groups: received {self.norm_num_groups}; {rule}; {schema.FIX}"
        if self.freq_shift >= widths[0] // 2:
            rule = f"it must be below half of block_out_channels[0]={widths[0]}"
            yield f"freq_shift: received {self.freq_shift}; {rule}; {schema.FIX}"
        size = self.sample_size if self.sample_size is not None else self.factor
        if any(side % self.factor for side in (size if isinstance(size, tuple) else (size,))):
            rule = f"it must be a multiple of {self.factor}, which the {levels} blocks halve {levels - 1} times"
            yield f"sample_size: received {size}; {rule}; {schema.FIX}"

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "") -> UNetConfig:
        """Reads the content of ``unet/config.json``, the file ``where``; InputError names every fault of it."""
        return schema.read_config(cls, raw, schema.UNET, class_name=_CLASS, fixed=_FIXED, ignored=_IGNORED, where=where)

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads of each down block."""
        heads = self.attention_head_dim
        return (heads,) * len(self.block_out_channels) if isinstance(heads, int) else heads

    @property
    def factor(self) -> int:
        """Height and width of the latents must be multiples of this."""
        return 2 ** (len(self.block_out_channels) - 1)


class TimestepEmbedding(nnx.Module):
    """Two linear layers with silu between."""

    def __init__(self, in_channels: int, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.linear_1 = Linear(in_channels, channels, dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B C"]) -> Float[Array, "B E"]:
        return self.linear_2(nnx.silu(self.linear_1(x)))


class UNet2DCondition(nnx.Module):
    """Predicts from noisy latents, their timestep and the text embeddings what the scheduler's config says it predicts.

    Args:
      config: sizes.
      dtype: compute dtype; parameters and output are float32.
      remat: "block" recomputes every resnet and transformer in the backward pass; "none" keeps their values.
      attention: implementation name of ``models.attention.attention``.
      rngs: of the random initialisation.

    ``remat`` and ``attention`` are plain attributes and may be set later.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: str = "none",
        attention: str = "auto",
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = remat
        self.attention = attention
        widths, layers = config.block_out_channels, config.layers_per_block
        spec = BlockSpec(
            time_channels=4 * widths[0],
            context_dim=config.cross_attention_dim,
            groups=config.norm_num_groups,
            epsilon=config.norm_eps,
            linear_projection=config.use_linear_projection,
            dtype=dtype,
        )
        self.conv_in = Conv(config.in_channels, widths[0], 3, padding=1, dtype=dtype, rngs=rngs)
        self.time_embedding = TimestepEmbedding(widths[0], spec.time_channels, dtype=dtype, rngs=rngs)

        down_blocks, skips = [], [widths[0]]
        for level, (kind, width) in enumerate(zip(config.down_block_types, widths, strict=True)):
            heads = config.heads[level] if _DOWN[kind] else None
            downsample = level < len(widths) - 1
            previous = widths[max(level - 1, 0)]
            down_blocks.append(DownBlock(previous, width, layers, heads, downsample=downsample, spec=spec, rngs=rngs))
            skips += [width] * (layers + downsample)
        self.down_blocks = nnx.List(down_blocks)

        self.mid_block = MidBlock(widths[-1], config.heads[-1], spec=spec, rngs=rngs)

        up_blocks, previous = [], widths[-1]
        for index, kind in enumerate(config.up_block_types):
            level = len(widths) - 1 - index
            heads = config.heads[level] if _UP[kind] else None
            taken = [skips.pop() for _ in range(layers + 1)]
            width = widths[level]
            up_blocks.append(UpBlock(previous, taken, width, heads, upsample=level > 0, spec=spec, rngs=rngs))
            previous = width
        self.up_blocks = nnx.List(up_blocks)

        self.conv_norm_out = GroupNorm(spec.groups, widths[0], epsilon=spec.epsilon, dtype=dtype)
        self.conv_out = Conv(widths[0], config.out_channels, 3, padding=1, dtype=dtype, rngs=rngs)

    def __call__(
        self, latents: Float[Array, "B h w c"], timesteps: Array, context: Float[Array, "B L D"]
    ) -> Float[Array, "B h w d"]:
        """The prediction, float32.

        Args:
          latents: noisy latents.
          timesteps: [B], the scheduler's values.
          context: text embeddings.

        Raises:
          InputError: height or width is no multiple of ``config.factor``, or ``remat`` is unknown.
        """
        config, factor = self.config, self.config.factor
        if latents.shape[1] % factor or latents.shape[2] % factor:
            raise InputError(
                f"latents={latents.shape[1]}x{latents.shape[2]}: height and width must be multiples of {factor}; "
                "choose another image size"
            )
        if self.remat not in REMAT:
            raise InputError(f"remat={self.remat!r}: must be one of {', '.join(REMAT)}; choose one of them")
        options = Options(attention=self.attention, remat=self.remat == "block")

        sinusoids = timestep_embedding(
            timesteps, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift
        )
        time = self.time_embedding(sinusoids.astype(self.dtype))
        context = context.astype(self.dtype)
        x = self.conv_in(latents.astype(self.dtype))
        skips = [x]
        for down in self.down_blocks:
            x, outputs = down(x, time, context, options)
            skips += outputs
        x = self.mid_block(x, time, context, options)
        for up in self.up_blocks:
            x = up(x, skips, time, context, options)
        return self.conv_out(nnx.silu(self.conv_norm_out(x))).astype(jnp.float32)
