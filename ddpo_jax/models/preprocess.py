"""Image preprocessing of the reward networks: resize, centre crop, normalise.

Published reward values depend on how the image was resized, so there are two bicubic paths, both antialiased and with
the cubic a = -0.5: ``pil`` reproduces Pillow, which rounds to uint8 after the horizontal and again after the vertical
pass; ``float`` is the unrounded filter of torchvision's tensor path. They differ by a level or two of 255.
All functions are pure JAX with static sizes and can be traced inside a jitted reward.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real, UInt8

from ddpo_jax.errors import InputError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of every CLIP and BLIP reward
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
RESIZE_PATHS = ("pil", "float")


def _cubic(x: np.ndarray) -> np.ndarray:
    """The cubic convolution kernel with a = -0.5 (Keys, 1981), support 2."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Weights f64[size_out, size_in] of a one-dimensional antialiased bicubic resize, windowed as Pillow windows it.

    Shrinking widens the kernel by the scale; taps outside the image are dropped and each row renormalised to sum to 1.
    """
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    centre = (np.arange(size_out) + 0.5) * scale
    first = np.maximum(np.floor(centre - support + 0.5), 0.0)
    last = np.minimum(np.floor(centre + support + 0.5), size_in)  # exclusive
    tap = np.arange(size_in)
    weights = _cubic((tap[None, :] + 0.5 - centre[:, None]) / stretch)
    weights = np.where((tap >= first[:, None]) & (tap < last[:, None]), weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def _resize(
    images: Array, height: int, width: int, after_pass: Callable[[Array], Array]
) -> Float[Array, "N height width C"]:
    """Horizontal pass, then vertical pass, as matrix products; ``after_pass`` is applied to the result of each."""
    x = jnp.asarray(images).astype(jnp.float32)
    for spec, size_in, size_out in (("xw,nhwc->nhxc", x.shape[2], width), ("yh,nhwc->nywc", x.shape[1], height)):
        if size_in != size_out:
            weights = jnp.asarray(bicubic_matrix(size_in, size_out), jnp.float32)
            # Highest precision: TF32 or bfloat16 products would be off by whole levels.
            x = after_pass(jnp.einsum(spec, weights, x, precision=jax.lax.Precision.HIGHEST))
    return x


def resize_pil(images: UInt8[Array, "N H W C"], height: int, width: int) -> UInt8[Array, "N height width C"]:
    """``PIL.Image.resize((width, height), BICUBIC)`` of every image, to at most one level (rounding of ties).

    Pillow 13 swaps the two passes where the image shrinks vertically and grows horizontally; that case differs more.
    """
    return _resize(images, height, width, lambda x: jnp.clip(jnp.floor(x + 0.5), 0.0, 255.0)).astype(jnp.uint8)


def resize_float(images: Real[Array, "N H W C"], height: int, width: int) -> Float[Array, "N height width C"]:
    """Antialiased bicubic resize in float32, never rounded or clipped: it may overshoot the range of the input."""
    return _resize(images, height, width, lambda x: x)


def shortest_side(height: int, width: int, size: int) -> tuple[int, int]:
    """The (height, width) with the shorter side ``size`` and the longer one truncated, as the CLIP processor has it."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def center_crop(images: Array, size: int) -> Array:
    """The central ``size`` x ``size`` window of [N,H,W,C]; an odd margin leaves one pixel more below and right."""
    height, width = images.shape[1:3]
    if height < size or width < size:
        raise InputError(
            f"center_crop: size={size} is larger than the image ({height}x{width}); resize the image first"
        )
    top, left = math.floor((height - size) / 2), math.floor((width - size) / 2)
    return images[:, top : top + size, left : left + size]


def normalize(
    images: Float[Array, "N H W 3"], mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD
) -> Float[Array, "N H W 3"]:
    """(x - mean) / std per channel, x in [0, 1]."""
    return (images - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def clip_pixels(
    images: UInt8[Array, "N H W 3"],
    size: int,
    *,
    path: str = "pil",
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> Float[Array, "N size size 3"]:
    """The CLIP processor: shortest side to ``size`` (bicubic), centre crop, /255, normalise.

    Args:
      images: uint8 [N,H,W,3].
      size: side of the network's input in pixels.
      path: "pil" or "float", see the module docstring.
      mean: per channel, of images in [0, 1].
      std: per channel, of images in [0, 1].
    """
    if path not in RESIZE_PATHS:
        raise InputError(f"clip_pixels: path={path!r} is not one of {', '.join(RESIZE_PATHS)}")
    if images.dtype != jnp.uint8:
        raise InputError(
            f"clip_pixels: images are {images.dtype}; the processor takes uint8 in 0..255, round and cast them"
        )
    height, width = shortest_side(images.shape[1], images.shape[2], size)
    resize = resize_pil if path == "pil" else resize_float
    x = center_crop(resize(images, height, width), size).astype(jnp.float32) / 255.0
    return normalize(x, mean, std)
