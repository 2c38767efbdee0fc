"""Sizes and lengths of the miniature's pre-training: ``full`` is what ships, ``tiny`` is what the test runs."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Length:
    """How long a stage trains."""

    steps: int
    batch_size: int
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Widths, depths and lengths.

    Attributes:
      verifier_widths: of the detector, at 16x16 and at 8x8.
      vocab_size, max_length: of the tokenizer.
      clip_width, clip_layers, clip_heads, projection: both towers of CLIP; the text tower conditions the UNet.
      head_widths, head_bank: layers of the aesthetic head, and the number of renderings it learns from.
      vae_channels, vae_groups: ``block_out_channels`` and ``norm_num_groups`` of the autoencoder.
      unet_channels, unet_layers, unet_heads, unet_groups: of the UNet.
      bank: number of pictures whose latents the UNet is trained on.
      evaluate: number of pictures per number of the quality table.
      guidances: guidance scales at which samples are measured.
      pictures: how often a training stops for a sheet of pictures, about.
    """

    verifier: Length
    clip: Length
    aesthetic: Length
    vae: Length
    unet: Length
    verifier_widths: tuple[int, int] = (48, 96)
    vocab_size: int = 900
    max_length: int = 24
    clip_width: int = 96
    clip_layers: int = 3
    clip_heads: int = 4
    projection: int = 64
    head_widths: tuple[int, ...] = (128, 64, 32, 16, 1)
    head_bank: int = 16384
    vae_channels: tuple[int, ...] = (16, 32, 64)
    vae_groups: int = 8
    unet_channels: tuple[int, ...] = (32, 96)
    unet_layers: int = 1
    unet_heads: int = 4
    unet_groups: int = 8
    bank: int = 65536
    evaluate: int = 512
    guidances: tuple[float, ...] = (3.0, 5.0)
    pictures: int = 5


FULL = Sizes(
    verifier=Length(1500, 32, 2e-3),
    clip=Length(2000, 48, 1e-3),
    aesthetic=Length(4000, 256, 2e-3),
    vae=Length(3000, 16, 1.5e-3),
    unet=Length(3600, 64, 1.2e-3),
)

TINY = Sizes(
    verifier=Length(3, 4, 2e-3),
    clip=Length(3, 4, 1e-3),
    aesthetic=Length(3, 4, 1e-3),
    vae=Length(3, 2, 1e-3),
    unet=Length(3, 4, 1e-3),
    verifier_widths=(8, 16),
    clip_width=32,
    clip_layers=1,
    clip_heads=2,
    projection=32,
    head_bank=16,
    vae_channels=(8, 8, 8),
    vae_groups=4,
    unet_channels=(8,),
    unet_heads=2,
    unet_groups=4,
    bank=16,
    evaluate=8,
    guidances=(5.0,),
    pictures=0,
)

SCALES = {"full": FULL, "tiny": TINY}
