"""Size of an image as JPEG, shared by the two compressibility rewards."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
from jaxtyping import Float32, UInt8

QUALITY = 95


def kilobytes(images: UInt8[np.ndarray, "N H W 3"]) -> Float32[np.ndarray, " N"]:
    """Bytes / 1000 of each image as JPEG: Pillow, quality 95, all else at its default (Black et al. 2023)."""
    sizes = np.empty(len(images), np.float32)
    for i, image in enumerate(images):
        buffer = io.BytesIO()
        PIL.Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
        sizes[i] = buffer.tell() / 1000
    return sizes
