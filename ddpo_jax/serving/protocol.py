"""The JSON in which images go to a reward server and scores come back.

A request is ``{"prompt": [text, ...], "image": [PNG as base64, ...], "metadata": [object, ...]}`` with one entry for
each image; ``metadata`` may be left out. The reply is ``{"rewards": [number, ...]}`` and, where the reward has parts,
``"parts": {name: [number or null, ...]}``; null stands for NaN, which JSON has no word for: the part says nothing of
that image. A fault is ``{"error": "one line"}`` with a status of 400 or more.

Images travel as PNG, since JPEG would change what is scored, and nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 2**27  # of all images of a request: 512 images of 512 x 512. A small PNG can unpack to a huge image.


class ProtocolError(ValueError):
    """A request or a value does not fit the protocol; the message is one line."""


def encode_image(image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """The image as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)  # quick; the pixels are the same at any level
    return buffer.getvalue()


def encode_request(
    images: UInt8[np.ndarray, "N H W 3"], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The body of a request for the rewards of N images."""
    return {
        "prompt": list(prompts),
        "image": [base64.b64encode(encode_image(image)).decode() for image in images],
        "metadata": [_plain(entry) for entry in metadata],
    }


def _plain(value: Any) -> Any:
    """``value`` with numpy's numbers and arrays as those of JSON."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise ProtocolError(f"metadata holds a {type(value).__name__}, which JSON has no word for; use text or numbers")


def decode_request(body: Any) -> tuple[UInt8[np.ndarray, "N H W 3"], list[str], list[dict[str, Any]]]:
    """Images, prompts and metadata of a request.

    Raises:
      ProtocolError: it is not one of the protocol, or the images differ in size.
    """
    if not isinstance(body, dict):
        raise ProtocolError(f"the body is {_kind(body)}; it must be an object with 'prompt' and 'image'")
    prompts, encoded = _list(body, "prompt"), _list(body, "image")
    metadata = _list(body, "metadata") if "metadata" in body else [{} for _ in prompts]
    if not len(prompts) == len(encoded) == len(metadata):
        raise ProtocolError(
            f"received {len(prompts)} prompts, {len(encoded)} images and {len(metadata)} metadata; "
            "there must be one of each for every image"
        )
    if not prompts:
        raise ProtocolError("received no image; there must be at least one")
    for index, (prompt, entry) in enumerate(zip(prompts, metadata, strict=True)):
        if not isinstance(prompt, str):
            raise ProtocolError(f"prompt {index} is {_kind(prompt)}; it must be text")
        if not isinstance(entry, dict):
            raise ProtocolError(f"metadata {index} is {_kind(entry)}; it must be an object")
    room = MAX_PIXELS // len(encoded)
    images = [decode_image(text, f"image {index}", room) for index, text in enumerate(encoded)]
    for index, image in enumerate(images):
        if image.shape != images[0].shape:
            sizes = [f"{width} x {height}" for height, width, _ in (images[0].shape, image.shape)]
            raise ProtocolError(
                f"image 0 is {sizes[0]} and image {index} is {sizes[1]}; all images of a request must have one size; "
                "send a request for each size"
            )
    return np.stack(images), prompts, metadata


def _list(body: dict[str, Any], key: str) -> list[Any]:
    if key not in body:
        raise ProtocolError(f"the body has no {key!r}; it must be a list with one entry for each image")
    if not isinstance(body[key], list):
        raise ProtocolError(f"{key!r} is {_kind(body[key])}; it must be a list with one entry for each image")
    return body[key]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def decode_image(text: Any, what: str, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of a PNG in base64.

    Args:
      text: of the JSON.
      what: the image's name in messages.
      max_pixels: of a larger image nothing is unpacked.

    Raises:
      ProtocolError: it is no such thing.
    """
    if not isinstance(text, str):
        raise ProtocolError(f"{what} is {_kind(text)}; it must be a PNG as base64 text")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters that are not ASCII
        raise ProtocolError(f"{what} is not base64: {error}") from error
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if picture.width * picture.height > max_pixels:
                raise Image.DecompressionBombError  # as Pillow does where it is far beyond
            if picture.mode != "RGB":
                raise ProtocolError(f"{what} has the colour mode {picture.mode}; it must be RGB, 8 bits a channel")
            return np.asarray(picture)
    except ProtocolError:
        raise
    except Image.DecompressionBombError as error:
        raise ProtocolError(
            f"{what} is too large; the images of a request may have {MAX_PIXELS} pixels in all; "
            "send fewer or smaller ones"
        ) from error
    except UnidentifiedImageError as error:
        raise ProtocolError(f"{what} is not a PNG file ({len(data)} bytes)") from error
    except Exception as error:  # what else Pillow raises on damaged files is not written down
        raise ProtocolError(f"{what} is not a whole PNG file: {' '.join(str(error).split())}") from error


def encode_reply(scores: Float32[np.ndarray, " N"], parts: Mapping[str, Float32[np.ndarray, " N"]]) -> dict[str, Any]:
    """The body of the reply: finite scores, and parts in which what is not finite becomes null."""
    reply: dict[str, Any] = {"rewards": [float(score) for score in scores]}
    if parts:
        reply["parts"] = {
            name: [float(x) if math.isfinite(x) else None for x in values] for name, values in parts.items()
        }
    return reply


def decode_reply(body: Any) -> tuple[list[Any], dict[str, list[Any]]]:
    """Scores and parts as the server wrote them, null as NaN: what they hold is checked as any reward's output is.

    Raises:
      ProtocolError: they are not lists.
    """
    if not isinstance(body, dict) or "rewards" not in body:
        raise ProtocolError(f"answered {_shown(body)}; it must be an object with 'rewards'")
    scores, parts = body["rewards"], body.get("parts", {})
    if not isinstance(scores, list):
        raise ProtocolError(f"answered rewards that are {_kind(scores)}; they must be a list, one score per image")
    if not isinstance(parts, dict) or not all(isinstance(values, list) for values in parts.values()):
        raise ProtocolError("answered parts that are not an object of lists")
    return scores, {name: [math.nan if x is None else x for x in values] for name, values in parts.items()}


def _shown(body: Any) -> str:
    return f"an object with {', '.join(map(repr, body)) or 'nothing in it'}" if isinstance(body, dict) else _kind(body)
