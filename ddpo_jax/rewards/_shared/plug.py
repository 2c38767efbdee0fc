"""Models that this package does not hold (a detector, a text recogniser, a vision-language model): two ways to one.

``package.module:function`` is a function of the user's; ``http://...`` a server. Both get the images of a batch and
give one answer for each. The server is sent ``POST {"image": [base64 PNG, ...], ...}`` and answers with one JSON object
that holds the list. PNG, because JPEG would change the image.
"""

from __future__ import annotations

import base64
import io
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from ddpo_jax.errors import InputError
from ddpo_jax.find import find
from ddpo_jax.rewards._shared.check import RewardError

TRIES, FIRST_WAIT_S = 4, 0.5


def connect(source: str, key: str, answers: str, timeout_s: float) -> Callable[..., list[Any]]:
    """The model that ``source`` names, as ``ask(images u8[N,H,W,3], **fields) -> N answers``.

    Args:
      source: ``package.module:function`` of the user's, called as ``function(images, **fields)``; or a URL.
      key: the config key that holds ``source``, for messages.
      answers: the key of the list in the answer of a server.
      timeout_s: seconds that one answer of a server may take.

    Raises:
      InputError: it is neither, or there is no such function. What is returned raises ``RewardError`` where the model
        does not give one answer for each image, or the server none.
    """
    if not 0 < timeout_s < math.inf:
        raise InputError(f"reward.timeout_s: received {timeout_s}; it must be a finite number above 0; use 60.0")
    if source.startswith(("http://", "https://")):

        def call(images: np.ndarray, **fields: Any) -> Any:
            reply = _post_json(source, {"image": [png(image) for image in images], **fields}, key, timeout_s)
            if not isinstance(reply, dict) or answers not in reply:
                raise RewardError(f"{key}={source!r} answered {reply!r:.80}; it must answer {{{answers!r}: [...]}}")
            return reply[answers]

    elif ":" in source:
        try:
            call = find("rewards", source)
        except ValueError as error:
            raise InputError(f"{key}: received {source!r}; {error}") from error
    else:
        raise InputError(
            f"{key}: received {source!r}; it must name a model; write package.module:function or http://HOST:PORT/PATH"
        )

    def ask(images: UInt8[np.ndarray, "N H W 3"], **fields: Any) -> list[Any]:
        found = call(images, **fields)
        if not isinstance(found, list | tuple) or len(found) != len(images):
            what = f"{len(found)} answers" if isinstance(found, list | tuple) else f"a {type(found).__name__}"
            raise RewardError(f"{key}={source!r} gave {what} for {len(images)} images; it must give a list of one each")
        return list(found)

    return ask


def texts(found: list[Any], key: str) -> list[str]:
    """``found``, if all of it is text.

    Raises:
      RewardError: it is not.
    """
    for index, text in enumerate(found):
        if not isinstance(text, str):
            raise RewardError(f"{key} gave {text!r:.80} for image {index}; it must give a string for each image")
    return found


def png(image: UInt8[np.ndarray, "H W 3"]) -> str:
    """An image as base64 text of a PNG file."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


# Stands in for the JSON client of the rewards (``_http``), which replaces it: JsonClient(...).post("", payload, read).
def _post_json(url: str, payload: dict[str, Any], key: str, timeout_s: float) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(payload).encode(), headers, method="POST")
    for attempt in range(TRIES):
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            why = f"answered {error.code} {error.reason}"
            if error.code not in (408, 429) and error.code < 500:
                break
        except (OSError, ValueError) as error:  # no server, no answer in time, or no JSON
            why = f"gave no answer ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        if attempt + 1 < TRIES:
            time.sleep(FIRST_WAIT_S * 2**attempt)
    raise RewardError(f"{key}={url!r} {why}; tried {attempt + 1} times")
