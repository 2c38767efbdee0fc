"""Models that this package does not hold (a detector, a text recogniser, a vision-language model): two ways to one.

``package.module:function`` is a function of the user's; ``http://...`` a server. Both get the images of a batch and
give one answer for each. The server is sent ``POST {"image": [base64 PNG, ...], ...}`` and answers with one JSON object
that holds the list. PNG, because JPEG would change the image.
"""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ddpo_jax.errors import InputError
from ddpo_jax.find import find
from ddpo_jax.rewards._shared import http
from ddpo_jax.rewards._shared.check import RewardError
from ddpo_jax.serving import protocol


@dataclasses.dataclass(frozen=True)
class Closable:
    """A function that may wait for a server, and ``close``, which lets a call that waits fail at once."""

    fn: Callable[..., Any]
    close: Callable[[], None]
    waits_for_others: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)


def connect(source: str, key: str, answers: str, timeout_s: float, patience_s: float) -> Closable:
    """The model that ``source`` names, as ``ask(images u8[N,H,W,3], **fields) -> N answers``.

    Args:
      source: ``package.module:function`` of the user's, called as ``function(images, **fields)``; or a URL.
      key: the config key that holds ``source``, for messages.
      answers: the key of the list in the answer of a server.
      timeout_s: seconds that one answer of a server may take.
      patience_s: seconds during which a request to a server is repeated.

    Raises:
      InputError: it is neither, or there is no such function, or a time is none. What is returned raises
        ``RewardError`` where the model does not give one answer for each image, or the server none.
    """
    for name, seconds, least in (("timeout_s", timeout_s, 0.001), ("patience_s", patience_s, 0)):
        if not least <= seconds < math.inf:
            raise InputError(f"reward.{name}: received {seconds}; it must be a finite number of at least {least}")
    if source.startswith(("http://", "https://")):
        client = http.JsonClient(source, key=key, timeout_s=timeout_s, patience_s=patience_s)
        return Closable(_Remote(client, key, answers), client.close, True)
    if ":" not in source:
        raise InputError(
            f"{key}: received {source!r}; it must name a model; write package.module:function or http://HOST:PORT/PATH"
        )
    try:
        function = find("rewards", source)
    except InputError as error:
        raise InputError(f"{key}: received {source!r}; {error}") from error

    def ask(images: UInt8[np.ndarray, "N H W 3"], **fields: Any) -> list[Any]:
        found = function(images, **fields)
        if (fault := _fault(found, len(images))) is not None:
            raise RewardError(f"{key}={source!r} gave {fault}")
        return list(found)

    return Closable(ask, lambda: None)


@dataclasses.dataclass(frozen=True)
class _Remote:
    """A model behind a server."""

    client: http.JsonClient
    key: str
    answers: str

    def __call__(self, images: UInt8[np.ndarray, "N H W 3"], **fields: Any) -> list[Any]:
        def read(reply: Any) -> list[Any]:
            if not isinstance(reply, dict) or self.answers not in reply:
                raise http.Retry(f"answered {reply!r:.80}; it must answer {{{self.answers!r}: [...]}}")
            if (fault := _fault(reply[self.answers], len(images))) is not None:
                raise http.Retry(f"gave {fault}")
            return reply[self.answers]

        try:
            encoded = [base64.b64encode(protocol.encode_image(image)).decode() for image in images]
            return self.client.post("", {"image": encoded, **fields}, read)
        except http.HttpError as error:
            raise RewardError(f"{self.key}: {error}") from error


def _fault(found: Any, count: int) -> str | None:
    """What is wrong with the answers for ``count`` images."""
    if isinstance(found, list | tuple) and len(found) == count:
        return None
    what = f"{len(found)} answers" if isinstance(found, list | tuple) else f"a {type(found).__name__}"
    return f"{what} for {count} images; it must give a list of one each"


def texts(found: list[Any], key: str) -> list[str]:
    """``found``, if all of it is text.

    Raises:
      RewardError: it is not.
    """
    for index, text in enumerate(found):
        if not isinstance(text, str):
            raise RewardError(f"{key} gave {text!r:.80} for image {index}; it must give a string for each image")
    return found
