"""Image preprocessing of the reward networks: resize, crop, normalise.

Published scores depend on how the image was resized, and there are two ways. Most models were scored on images that
Pillow had resized: it rounds to uint8 after the horizontal and again after the vertical pass, so for them Pillow
itself is called, on the host. Others were scored on float tensors resized by torchvision, which never rounds: that is
`resize_float`, in JAX. The two differ by a level or two of 255.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Array, Float, UInt8

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of every CLIP and BLIP reward
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize_pil(images: UInt8[np.ndarray, "N H W 3"], height: int, width: int) -> UInt8[np.ndarray, "N height width 3"]:
    """``PIL.Image.resize((width, height), BICUBIC)`` of every image, on the host."""
    if images.shape[1:3] == (height, width):
        return images
    out = np.empty((len(images), height, width, 3), np.uint8)
    for row, image in enumerate(images):
        out[row] = np.asarray(PIL.Image.fromarray(image).resize((width, height), PIL.Image.Resampling.BICUBIC))
    return out


def shortest_side(height: int, width: int, size: int) -> tuple[int, int]:
    """The (height, width) with the shorter side ``size`` and the longer one truncated, as the CLIP processor has it."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def clip_crop(images: UInt8[np.ndarray, "N H W 3"], size: int) -> UInt8[np.ndarray, "N size size 3"]:
    """The CLIP processor as far as it works on whole levels: shortest side to ``size`` by Pillow, centre crop.

    An odd margin leaves one pixel more below and right.
    """
    height, width = shortest_side(images.shape[1], images.shape[2], size)
    top, left = (height - size) // 2, (width - size) // 2
    return resize_pil(images, height, width)[:, top : top + size, left : left + size]


def normalize(
    images: Float[Array, "N H W 3"], mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD
) -> Float[Array, "N H W 3"]:
    """(x - mean) / std per channel, x in [0, 1]."""
    return (images - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel of support 2 with slope ``a`` at 1 (Keys 1981, IEEE TASSP 29(6), Eq. 15)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1.0
    far = ((x - 5.0) * x + 8.0) * x * a - 4.0 * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def bicubic_matrix(size_in: int, size_out: int, antialias: bool = True) -> Float[np.ndarray, "size_out size_in"]:
    """Weights f64[size_out, size_in] of a one-dimensional bicubic resize, as torch's ``interpolate`` has them.

    Args:
      size_in: length of a row before.
      size_out: and after.
      antialias: shrinking widens the kernel (a = -0.5) by the scale; taps outside the image are dropped and each row
        is divided by its sum. Without, four taps (a = -0.75) at any scale; those outside repeat the edge.
    """
    scale = size_in / size_out
    tap = np.arange(size_in)
    centre = (np.arange(size_out) + 0.5) * scale
    if antialias:
        stretch = max(scale, 1.0)
        first = np.maximum(np.floor(centre - 2.0 * stretch + 0.5), 0.0)
        last = np.minimum(np.floor(centre + 2.0 * stretch + 0.5), size_in)  # exclusive
        weights = _cubic((tap[None, :] + 0.5 - centre[:, None]) / stretch, -0.5)
        weights = np.where((tap >= first[:, None]) & (tap < last[:, None]), weights, 0.0)
        return weights / weights.sum(axis=1, keepdims=True)
    weights = np.zeros((size_out, size_in))
    for offset in range(-1, 3):
        position = np.floor(centre - 0.5).astype(int) + offset
        weight = _cubic(position + 0.5 - centre, -0.75)
        np.add.at(weights, (np.arange(size_out), np.clip(position, 0, size_in - 1)), weight)
    return weights


def resize_float(
    images: Float[Array, "N H W C"], height: int, width: int, antialias: bool = True
) -> Float[Array, "N height width C"]:
    """Bicubic resize in float32, never rounded or clipped: it may overshoot the range of the input.

    Sizes are static, so it can be traced inside a jitted reward.
    """
    x = images
    for spec, size_in, size_out in (("xw,nhwc->nhxc", x.shape[2], width), ("yh,nhwc->nywc", x.shape[1], height)):
        if size_in != size_out:
            weights = jnp.asarray(bicubic_matrix(size_in, size_out, antialias), jnp.float32)
            # Highest precision: TF32 or bfloat16 products would be off by whole levels.
            x = jnp.einsum(spec, weights, x, precision=jax.lax.Precision.HIGHEST)
    return x


def longest_side(height: int, width: int, size: int) -> tuple[int, int]:
    """The (height, width) with the longer side ``size`` and the other one rounded to at least 1."""
    scale = size / max(height, width)
    return max(round(height * scale), 1), max(round(width * scale), 1)


def pad_to_square(images: Float[Array, "N H W C"]) -> Float[Array, "N S S C"]:
    """Zeros around the image; an odd margin leaves one pixel more below and right."""
    height, width = images.shape[1:3]
    margins = [(margin // 2, margin - margin // 2) for margin in (max(width - height, 0), max(height - width, 0))]
    return jnp.pad(images, [(0, 0), *margins, (0, 0)])
