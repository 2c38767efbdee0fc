"""What people think of an image, asked in a web page that the run itself serves (``feedback.page.html``).

``mode="score"``: a person gives each image 1 to 5 stars for its prompt; the score is the number of stars, averaged if
several people rated it. ``mode="pairs"``: a person picks the better of two images of a prompt or says that they are
equally good; an image's score is the share of its comparisons that it won, a tie counting half, so 0 to 1 with a mean
of 0.5 for each prompt. It compares images of a prompt within a batch and says nothing across prompts or epochs.

Several people may rate at the same time, each in a page of their own. Every answer is kept in ``answers.jsonl`` in
``folder`` (see ``ddpo_jax.feedback.answers``) with the image beside it, and is never asked again: a run that stopped in
mid-batch goes on where it was. Learning from people's scores of samples: Lee et al. 2023, arXiv:2302.12192; from
pairs: Yang et al. 2024, arXiv:2311.13231.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ddpo_jax.errors import InputError
from ddpo_jax.feedback import app
from ddpo_jax.feedback.queue import MODES, Queue, Stopped
from ddpo_jax.rewards._shared import check as _check
from ddpo_jax.serving.server import Server

FREE_TO_ASK = False  # so it is not evaluated in training unless log.evaluate_every is set


def default_config() -> ConfigDict:
    """Options."""
    config = ConfigDict()
    config.mode = "score"  # what is asked: score = 1 to 5 stars; pairs = the better of two images of a prompt
    config.opponents = 3  # pairs: other images of its prompt that an image is compared with, at least; 0 = all
    config.folder = "runs/human"  # where answers and images are kept; runs may share it
    config.port = 8001  # of the web page; 0 = any free one
    config.host = "127.0.0.1"  # address of the page; 0.0.0.0 = this machine's on every network, needs a token
    config.token = ""  # asked of browsers; empty = the environment variable DDPO_TOKEN, if any
    config.lease_s = 120.0  # seconds until a question that a page got and did not answer is handed to another page
    return config


def make(config: ConfigDict) -> Human:
    """The reward; the page is there from now on.

    Raises:
      InputError: an option is wrong, the port is taken, or the folder cannot be used.
    """
    if config.mode not in MODES:
        raise InputError(f"reward.mode: received {config.mode!r}; it must be {' or '.join(MODES)}")
    if config.opponents < 0:
        raise InputError(f"reward.opponents: received {config.opponents}; it must be at least 0, which is all")
    if not 1 <= config.lease_s <= 10**6:
        raise InputError(f"reward.lease_s: received {config.lease_s}; it must be from 1 to 1000000 seconds; use 120")
    try:
        folder = pathlib.Path(config.folder).expanduser()
        queue = Queue(folder, config.mode, config.opponents, config.lease_s)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home of such a user
        cause = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"reward.folder: received {config.folder!r}; cannot write there: {cause}; give a folder you can write"
        ) from error
    server = app.serve(queue, host=config.host, port=config.port, token=config.token, flag="reward.")
    logging.info("people rate images at %s", app.address(server))
    return Human(queue, server)


class Human:
    """Waits for people, for as long as it takes; has no parts."""

    waits_for_others = True

    def __init__(self, queue: Queue, server: Server):
        self._queue, self._server = queue, server

    @property
    def address(self) -> str:
        """Where people rate."""
        return app.address(self._server)

    def __call__(
        self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores. Raises ``RewardError`` if it is closed meanwhile."""
        del metadata
        try:
            return self._queue.rate(images, prompts, self.address), {}
        except Stopped as error:
            raise _check.RewardError(f"reward 'human': {error}") from error

    def close(self) -> None:
        """Lets a call that waits fail at once, and takes the page away."""
        self._queue.close()
        self._server.close()
