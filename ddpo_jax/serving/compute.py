"""A reward as a server: ``GET /health`` and ``POST /compute``, one batch at a time.

The protocol is that of ``ddpo_jax.serving.protocol``. Requests beyond the one that is computed wait in a short queue;
beyond that they are sent away with status 503, upon which a client tries again later.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging

from ddpo_jax.errors import InputError
from ddpo_jax.serving import protocol
from ddpo_jax.serving.server import Handler, Refusal, Reply, Request, json_reply

Score = Callable[[np.ndarray, list[str], list[dict[str, Any]]], tuple[np.ndarray, dict[str, np.ndarray]]]


class Compute:
    """Answers requests with the scores of a reward.

    Args:
      score: the reward, whose output has been checked; it may raise anything, which is answered with status 500.
      name: of the reward, shown by ``GET /health``.
      queue: requests that may wait while one is computed.
    """

    def __init__(self, score: Score, name: str, queue: int):
        self._score, self._name, self._queue = score, name, queue
        self._turn, self._count_lock = threading.Lock(), threading.Lock()
        self._inside = 0  # the request that is computed and those that wait
        self._computed = 0  # images

    def routes(self) -> dict[str, Handler]:
        """For ``Server``."""
        return {"GET /health": self._health, "POST /compute": self._compute}

    @property
    def threads(self) -> int:
        """How many a server needs so that ``GET /health`` is answered while all others wait."""
        return self._queue + 3

    def _health(self, request: Request) -> Reply:
        del request
        return json_reply(
            {"status": "ok", "reward": self._name, "requests": self._inside, "images_computed": self._computed}
        )

    def _compute(self, request: Request) -> Reply:
        with self._count_lock:
            if self._inside > self._queue:
                raise Refusal(503, f"{self._inside} requests are before this one", {"Retry-After": "1"})
            self._inside += 1
        try:
            with self._turn:
                if request.gone():
                    raise Refusal(408, "the client hung up before its turn")
                return self._answer(request)
        finally:
            with self._count_lock:
                self._inside -= 1

    def _answer(self, request: Request) -> Reply:
        try:
            images, prompts, metadata = protocol.decode_request(request.json())
        except protocol.ProtocolError as error:
            raise Refusal(400, str(error)) from error
        try:
            scores, parts = self._score(images, prompts, metadata)
        except BaseException as error:  # a reward may raise anything, and must not take the server along
            logging.exception("the reward failed on %d images", len(images))
            wrong = isinstance(error, InputError) or isinstance(error.__cause__, InputError)
            # 5xx is asked again: what is wrong with a prompt stays so.
            raise Refusal(422 if wrong else 500, " ".join(str(error).split()) or type(error).__name__) from error
        self._computed += len(images)
        return json_reply(protocol.encode_reply(scores, parts))
