"""A reward that a server computes, on this or another machine: ``reward.url=http://...``.

``ddpo_jax serve`` starts such a server for any reward; another one answers ``GET /health`` and ``POST /compute`` in the
JSON of ``ddpo_jax.serving.protocol``. Sign, scale and parts are the server's. The server must be there when the run
starts. If it dies later, is slow, or answers what cannot be scores, the run waits for it ``patience_s`` seconds with a
line in the log, and then ends as a failure that has saved its last epoch; the same command goes on from there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.rewards._shared import check as _check
from ddpo_jax.rewards._shared import http as _http
from ddpo_jax.serving import protocol
from ddpo_jax.serving.server import token_or_environment


def default_config() -> ConfigDict:
    """Options."""
    config = ConfigDict()
    config.url = "http://127.0.0.1:8000"  # of the server; "ddpo_jax serve" starts one there
    config.batch_size = 16  # images per request
    config.timeout_s = 120.0  # seconds until the scores of a request must be there
    config.patience_s = 600.0  # seconds during which a failed request is repeated before the run gives up
    config.token = ""  # what the server asks for, if anything; empty = the environment variable DDPO_TOKEN
    return config


def make(config: ConfigDict) -> Remote:
    """The reward.

    Raises:
      InputError: an option is wrong, or no server answers.
    """
    for key, least in (("batch_size", 1), ("timeout_s", 0.001), ("patience_s", 0)):
        if not least <= config[key] <= 10**9:
            raise InputError(f"reward.{key}: received {config[key]}; it must be at least {least}")
    client = _http.JsonClient(
        config.url,
        key="reward.url",
        timeout_s=config.timeout_s,
        patience_s=config.patience_s,
        token=token_or_environment(config.token, "reward.token"),
    )
    try:
        client.get("/health")
    except _http.HttpError as error:
        raise InputError(
            f"reward.url: received {config.url!r}; {error}; start a server there, "
            "such as: ddpo_jax serve --reward=aesthetic --port=8000"
        ) from error
    return Remote(client, config.batch_size)


class Remote:
    """Scores images by asking a server; its parts are those of the server, NaN where a request got none of a name."""

    waits_for_others = True  # patience_s for each request

    def __init__(self, client: _http.JsonClient, batch_size: int):
        self._client, self._batch_size = client, batch_size

    def __call__(
        self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores and parts. Raises ``RewardError`` if the server gave none in time."""
        rows = [slice(start, start + self._batch_size) for start in range(0, len(prompts), self._batch_size)]
        replies = [self._ask(images[part], prompts[part], metadata[part]) for part in rows]
        names = dict.fromkeys(name for _, parts in replies for name in parts)
        absent = [np.full(len(scores), np.nan, np.float32) for scores, _ in replies]
        return np.concatenate([scores for scores, _ in replies]), {
            name: np.concatenate([parts.get(name, nan) for (_, parts), nan in zip(replies, absent, strict=True)])
            for name in names
        }

    def close(self) -> None:
        """Lets a call that waits for the server fail at once."""
        self._client.close()

    def _ask(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        def read(body: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
            try:
                return _check.check(protocol.decode_reply(body), prompts, "remote")
            except (protocol.ProtocolError, _check.RewardError) as error:
                raise _http.Retry(f"answered what cannot be used: {error}") from error

        try:
            return self._client.post("/compute", protocol.encode_request(images, prompts, metadata), read)
        except (_http.HttpError, protocol.ProtocolError) as error:
            raise _check.RewardError(f"reward 'remote': {error}") from error
